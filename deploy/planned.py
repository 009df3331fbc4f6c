"""Planned work on a running shard: another leader, and a restart of its nodes one after the other.

Two rules (design: high availability traps):
- Before a standby restarts, the other one has flushed all that the leader has: else Patroni, which then counts on the other one
  alone, could elect it without what was acknowledged through the first.
- The leader restarts last, and only after it has handed over: a planned change costs its clients a slower answer, no error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import asyncpg

from deploy.members import Member, PatroniRest, ShardMembers, read
from oncepay.errors import OncepayError, ShardUnavailable, Unavailable
from oncepay.etcd import Etcd
from oncepay.settings import Settings

WAIT_S = 120.0
"""How long a node may take to catch up, or to come back."""
ASK_S = 5.0
PAUSE_S = 0.2
AGAIN_S = 1.0
IN_QUORUM = ("quorum", "sync")

T = TypeVar("T")
Report = Callable[[str], None]
"""Called with what is being done now, in a few words."""


class NotNow(OncepayError):
    """The shard's state doesn't allow this work now."""

    status = 409
    slug = "not-now"


class Step(NamedTuple):
    """One step of a rolling restart. `wait`: until `other` has flushed all that the leader has."""

    do: Literal["wait", "restart", "switchover"]
    node: str
    other: str = ""

    def text(self) -> str:
        if self.do == "wait":
            return f"wait until {self.other} has all that the leader has"
        if self.do == "switchover":
            return f"hand over from {self.node} to {self.other}"
        return f"restart {self.node}"


class Standby(NamedTuple):
    """A standby as the leader's `pg_stat_replication` shows it; `flushed` is a position in bytes."""

    flushed: int
    streams: bool
    in_quorum: bool


class Replication(NamedTuple):
    """The leader's own flushed position (bytes), and its standbys by name."""

    flushed: int
    standbys: dict[str, Standby]


def restart_steps(leader: str, standbys: Sequence[str]) -> tuple[Step, ...]:
    """A rolling restart of a whole shard: standbys first, each while another has everything, then the leader as a standby.

    Raises NotNow for a shard with fewer than two standbys: while its only one restarts, nothing could be committed.
    """
    if len(standbys) < 2:
        raise NotNow(f"{leader} has {len(standbys)} standbys; a rolling restart needs two that stream")
    steps = []
    for n, node in enumerate(standbys):
        steps += [Step("wait", node, standbys[n - 1]), Step("restart", node)]
    successor = standbys[-1]
    steps += [Step("wait", leader, successor), Step("switchover", leader, successor)]
    return (*steps, Step("wait", leader, standbys[0]), Step("restart", leader))


class Planned:
    """Work on one shard. `report` is told of each step as it begins."""

    def __init__(self, etcd: Etcd, settings: Settings, rest: PatroniRest, shard: str, report: Report) -> None:
        self._etcd = etcd
        self._settings = settings
        self._rest = rest
        self.shard = shard
        self._report = report

    async def members(self) -> ShardMembers:
        """Raises ShardUnavailable for a shard that Patroni doesn't know."""
        found = await read(self._etcd, self.shard)
        if not found.members:
            raise ShardUnavailable(f"no node of shard {self.shard} is in touch with etcd")
        return found

    async def plan_restart(self) -> tuple[Step, ...]:
        """The steps of a rolling restart as the shard is now. Raises NotNow when a standby doesn't stream in the quorum."""
        found = await self.members()
        leader = found.leading()
        replication = await self.replication(leader)
        names = [member.name for member in found.standbys()]
        for name in names:
            standby = replication.standbys.get(name)
            if standby is None or not standby.streams or not standby.in_quorum:
                raise NotNow(f"{name} doesn't stream in the quorum: get all nodes up first (`oncepay shards show {self.shard}`)")
        return restart_steps(leader.name, names)

    async def restart(self, steps: Sequence[Step]) -> None:
        """Do the steps. Raises NotNow where one can't be done in time; what was done until then may be repeated."""
        for step in steps:
            self._report(step.text())
            if step.do == "wait":
                await self._caught_up(step.other)
            elif step.do == "switchover":
                await self.switchover(step.other)
            else:
                await self._restart(step.node)

    async def plan_switchover(self, to: str = "") -> Step:
        """Who would hand over to whom; without `to` it is the standby that has flushed most. Raises NotNow."""
        found = await self.members()
        leader = found.leading()
        standbys = (await self.replication(leader)).standbys
        fit = {name: standby for name, standby in standbys.items() if standby.streams and standby.in_quorum}
        if to == leader.name:
            raise NotNow(f"{to} leads already")
        if to and to not in fit:
            raise NotNow(f"{to} doesn't stream in the quorum of shard {self.shard}; {', '.join(sorted(fit)) or 'nobody'} does")
        if not fit:
            raise NotNow(f"no standby of shard {self.shard} streams in the quorum")
        return Step("switchover", leader.name, to or max(sorted(fit), key=lambda name: fit[name].flushed))

    async def switchover(self, to: str) -> float:
        """Make `to` the leader; seconds until it acknowledged a commit. Raises NotNow when somebody else became leader."""
        await self._caught_up(to)
        began_s = time.monotonic()
        words = ""

        async def changed() -> bool:
            nonlocal words
            found = await self.members()
            if found.leader == to:
                return True
            if found.leader is not None:
                done, words = await self._rest.switchover(found.leading(), to)
                if not done:  # Patroni looks at its members every few seconds only
                    await asyncio.sleep(AGAIN_S)
            return False

        await self._until(changed, lambda: f"{to} didn't become the leader; Patroni says: {words}")
        await self._until(self._acknowledges, lambda: f"{to} leads, but acknowledges nothing")
        return time.monotonic() - began_s

    async def _restart(self, node: str) -> None:
        words = ""

        async def restarted() -> bool:
            nonlocal words
            found = await self.members()
            if found.leader == node:
                raise NotNow(f"{node} leads: it would have to hand over first")
            done, words = await self._rest.restart(found.member(node))
            if not done:
                await asyncio.sleep(AGAIN_S)
            return done

        await self._until(restarted, lambda: f"{node} wasn't restarted; Patroni says: {words}")
        await self._caught_up(node)

    async def _caught_up(self, node: str) -> None:
        """Until `node` counts in the quorum and has flushed what the leader had flushed when this was first asked."""
        target = 0

        async def done() -> bool:
            nonlocal target
            found = await self.members()
            replication = await self.replication(found.leading())
            target = target or replication.flushed
            standby = replication.standbys.get(node)
            voter = node in found.sync.voters
            return voter and standby is not None and standby.streams and standby.in_quorum and standby.flushed >= target

        await self._until(done, lambda: f"{node} hasn't caught up within {WAIT_S:.0f} s")

    async def _acknowledges(self) -> bool:
        """Whether the leader commits: a message in its log that waits for the quorum. Nobody reads it."""
        async with self.session((await self.members()).leading()) as session:
            await session.execute("select pg_logical_emit_message(true, 'oncepay-planned', '')")
        return True

    async def replication(self, leader: Member) -> Replication:
        """Raises ShardUnavailable when the leader can't be asked."""
        async with self.session(leader) as session:
            rows = await session.fetch(_REPLICATION)
        standbys = {
            row["name"]: Standby(row["flushed"], row["state"] == "streaming", row["sync_state"] in IN_QUORUM)
            for row in rows
            if row["name"] is not None
        }
        return Replication(rows[0]["own"], standbys)

    @contextlib.asynccontextmanager
    async def session(self, member: Member) -> AsyncIterator[asyncpg.Connection]:
        """A session in the operator's role, for a few seconds. Raises ShardUnavailable."""
        host, port = member.address
        postgres = self._settings.postgres
        try:
            async with asyncio.timeout(ASK_S):
                connection = await asyncpg.connect(
                    host=host,
                    port=port,
                    user="oncepay_operator",
                    password=postgres.operator_password,
                    database=postgres.database,
                    timeout=ASK_S,
                )
                try:
                    yield connection
                finally:
                    connection.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise ShardUnavailable(f"{member.name} can't be asked: {error!r}") from error

    async def _until(self, check: Callable[[], Awaitable[bool]], why: Callable[[], str]) -> None:
        """Until it holds; that a part can't be reached meanwhile is expected. Raises NotNow after WAIT_S."""
        deadline_s = time.monotonic() + WAIT_S
        reason = ""
        while True:
            try:
                if await check():
                    return
            except Unavailable as error:
                reason = f" ({error})"
            if time.monotonic() > deadline_s:
                raise NotNow(why() + reason)
            await asyncio.sleep(PAUSE_S)


_REPLICATION = """
select (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint as own, s.application_name as name,
       (s.flush_lsn - '0/0'::pg_lsn)::bigint as flushed, s.state, s.sync_state
from (select) one left join pg_stat_replication s on s.flush_lsn is not null
"""
