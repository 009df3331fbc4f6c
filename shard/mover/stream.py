"""A stream of one range's changes from one shard to another: Postgres' own logical replication.

Row filter on the slot, `origin = none`, inserts and updates only, `synchronous_commit = on` for the subscription (with `off` the
slot would confirm what the other side's quorum doesn't have), and a slot that follows the leader. Only while a backlog is
replayed, before the verification, its transactions don't wait for the quorum (`hurry`): there are thousands, each would flush the
log of three nodes, and the payments beside them would wait for that too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import asyncpg
import msgspec

from oncepay.feed import lsn_text, parse_lsn
from oncepay.logs import get_logger
from shard.mover.errors import MoveStopped, StreamLost
from shard.mover.side import Side
from shard.mover.tables import Table

APPLIED_PAUSE_S = 0.003
BEAT_S = 1.0
"""A mark is sent again this often while its arrival is awaited: the first may have been erased by a failover."""
SLOT_TRIES = 50

_log = get_logger("mover")

_SLOT = """
select confirmed_flush_lsn::text as confirmed, wal_status, active, active_pid, invalidation_reason,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), confirmed_flush_lsn)::bigint as lag_bytes
from pg_replication_slots where slot_name = $1
"""
_SUBSCRIPTION = """
select s.oid, s.subenabled, pg_replication_origin_progress('pg_' || s.oid, true)::text as progress,
       t.apply_error_count as errors
from pg_subscription s join pg_stat_subscription_stats t on t.subid = s.oid where s.subname = $1
"""


_NOW = "select (extract(epoch from clock_timestamp()) * 1000)::bigint as ms"
_MARK = """
update oncepay.move_marks set beat = greatest(beat + 1, (extract(epoch from clock_timestamp()) * 1000)::bigint)
where stream = $1 returning beat
"""
"""A mark grows, and says when it was made, in milliseconds since 1970."""
_MARKED = "select beat from oncepay.move_marks where stream = $1"


class SlotState(msgspec.Struct, frozen=True):
    """Where a slot stands. `lag_bytes`: how much log it keeps that the other side has not confirmed."""

    confirmed: int
    lag_bytes: int
    active_pid: int | None


def stream_names(move: str) -> tuple[str, str]:
    """The names of a move's streams, to the target and back: of publication, slot and subscription alike."""
    return f"oncepay_move_{move}", f"oncepay_back_{move}"


class Stream:
    """The stream `name` of the slots `first` to `last`, from `giver` to `taker`, for the operator process with `epoch`."""

    def __init__(self, name: str, move: str, epoch: int, giver: Side, taker: Side, first: int, last: int) -> None:
        self.name = name
        self.giver = giver
        self.taker = taker
        self.first = first
        self.last = last
        self._move = move
        self._epoch = epoch

    # Making

    async def publish(self, tables: Sequence[Table]) -> None:
        """Make the publication, unless it is there."""
        where = f"where (slot between {self.first} and {self.last})"
        parts = [f"{table.qualified} {where}" for table in tables]
        parts.append(f"oncepay.move_marks where (stream = '{self.name}')")
        async with self.giver.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            if not await session.fetchval("select exists (select from pg_publication where pubname = $1)", self.name):
                await session.execute(
                    f"create publication {self.name} for table {', '.join(parts)} with (publish = 'insert, update')"
                )

    async def make_slot(self, name: str = "") -> bool:
        """Make the slot, unless it is there; whether it was made now. What is committed from now on comes in the stream."""
        name = name or self.name
        async with self.giver.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            if await session.fetchval("select exists (select from pg_replication_slots where slot_name = $1)", name):
                return False
            await session.execute("select pg_create_logical_replication_slot($1, 'pgoutput', false, false, true)", name)
            return True

    async def subscribe(self) -> None:
        """Make the subscription, unless it is there. It does nothing yet."""
        async with self.taker.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            await session.execute("select oncepay.ready_for_streams()")
            if not await session.fetchval("select exists (select from pg_subscription where subname = $1)", self.name):
                conninfo = self.giver.conninfo().replace("'", "''")
                await session.execute(
                    f"create subscription {self.name} connection '{conninfo}' publication {self.name} with ("
                    f"create_slot = false, slot_name = '{self.name}', enabled = false, copy_data = false, origin = none,"
                    " synchronous_commit = 'on', streaming = off, failover = true)"
                )

    async def enable(self) -> None:
        """Let changes come."""
        async with self.taker.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            await session.execute(f"alter subscription {self.name} enable")

    async def hurry(self, *, wanted: bool) -> None:
        """Whether what comes needn't wait for the taker's quorum. What a failover of the taker erases then doesn't come again:
        only before all is compared, and with `secured` after it."""
        async with self.taker.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            await session.execute(f"alter subscription {self.name} set (synchronous_commit = '{'off' if wanted else 'on'}')")

    async def secured(self) -> None:
        """Return when all that the taker has replayed is on its quorum: a commit with the evidence, behind it in its log."""
        await self.taker.commit(
            "update oncepay.moves set copied_rows = copied_rows where id = $1 and oncepay.assert_move($1, $2) returning 1",
            self._move,
            self._epoch,
        )

    # Looking

    async def slot(self, name: str = "") -> SlotState | None:
        """Where the slot stands, None when there is none. Raises StreamLost when it has lost its log."""
        row = await self.giver.one(_SLOT, name or self.name)
        if row is None or row["confirmed"] is None:
            return None
        if row["wal_status"] == "lost" or row["invalidation_reason"]:
            raise StreamLost(f"slot {self.name} has lost its log: {row['invalidation_reason'] or row['wal_status']}")
        return SlotState(parse_lsn(row["confirmed"]), row["lag_bytes"], row["active_pid"])

    async def origin(self) -> str | None:
        """The origin under which the taker keeps the stream's progress, None when there is no subscription."""
        row = await self.taker.one(_SUBSCRIPTION, self.name)
        return None if row is None else f"pg_{row['oid']}"

    async def progress(self) -> int:
        """How far the taker has replayed the giver's log. Raises StreamLost without a subscription."""
        row = await self.taker.one(_SUBSCRIPTION, self.name)
        if row is None:
            raise StreamLost(f"shard {self.taker.shard} has no subscription {self.name}")
        return parse_lsn(row["progress"]) if row["progress"] else 0

    async def errors(self) -> int:
        """How often applying has failed."""
        row = await self.taker.one(_SUBSCRIPTION, self.name)
        return int(row["errors"]) if row is not None else 0

    async def mark(self) -> None:
        """Commit a mark, seen with the evidence: all before it is on the giver's quorum, and it will come in the stream."""
        await self.giver.commit(_MARK, self.name)

    async def behind_s(self) -> float:
        """How long ago, by the giver's clock, the last mark was made that the taker has replayed."""
        came, now = await self.taker.one(_MARKED, self.name), await self.giver.one(_NOW)
        if came is None or now is None:
            raise StreamLost(f"shard {self.taker.shard} has no mark of {self.name}")
        return float(max(0, now["ms"] - came["beat"])) / 1000

    async def applied(self, position: int, timeout_s: float) -> None:
        """Return when the taker has replayed all up to `position`, and shows it.

        Raises StreamLost or MoveStopped when it doesn't come.
        """
        began_s = marked_s = time.monotonic()
        errors = await self.errors()
        await self.mark()
        while await self.progress() < position:
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                if await self.slot() is None:
                    raise StreamLost(f"shard {self.giver.shard} has no slot {self.name}")
                failed = await self.errors() - errors
                hint = f"; applying failed {failed} times, see the log of {self.taker.shard}'s leader" if failed else ""
                raise MoveStopped(f"stream {self.name} has not come to {lsn_text(position)} in {timeout_s:.0f} s{hint}")
            if now_s - marked_s > BEAT_S:
                marked_s = now_s
                await self.mark()
            await asyncio.sleep(APPLIED_PAUSE_S)
        await self.taker.until_visible(timeout_s - (time.monotonic() - began_s))

    # Unmaking

    async def drop(self, *slots: str) -> None:
        """Unmake the subscription first, then slots (the stream's own and `slots`) and publication."""
        await self.unsubscribe()
        await self.unpublish(*slots)

    async def unsubscribe(self) -> None:
        """The taker's part, for which the giver isn't asked."""
        async with self.taker.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            if await session.fetchval("select exists (select from pg_subscription where subname = $1)", self.name):
                await session.execute(f"alter subscription {self.name} disable")
                await session.execute(f"alter subscription {self.name} set (slot_name = none)")
                await session.execute(f"drop subscription {self.name}")

    async def unpublish(self, *slots: str) -> None:
        """The giver's part."""
        for slot in (self.name, *slots):
            await self.drop_slot(slot)
        async with self.giver.session() as session, session.transaction():
            await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            await session.execute(f"drop publication if exists {self.name}")

    async def drop_slot(self, name: str) -> None:
        """Drop a slot on the leader, and what is left of it on nodes that led before."""
        for _ in range(SLOT_TRIES):
            async with self.giver.session() as session:
                row = await session.fetchrow("select active_pid from pg_replication_slots where slot_name = $1", name)
                if row is None:
                    break
                try:
                    async with session.transaction():
                        await session.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
                        if row["active_pid"]:
                            await session.execute("select pg_terminate_backend($1, 2000)", row["active_pid"])
                        await session.execute("select pg_drop_replication_slot($1)", name)
                    break
                except (asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
                    await asyncio.sleep(0.1)
        else:
            raise MoveStopped(f"slot {name} of shard {self.giver.shard} stays in use: end its walsender, then run this again")
        await drop_stale(self.giver, [name])


async def drop_stale(side: Side, names: Sequence[str]) -> None:
    """Drop slots that a former leader still has: nobody else does, and they would keep its log for ever.

    Only where a node follows another one: while etcd names no leader, the primary is visited as well.
    """
    leader = side.leaders.current(side.shard)
    for node in side.leaders.nodes(side.shard):
        if node == leader:
            continue
        with contextlib.suppress(Exception):  # a node that is down keeps its slot; the next clean-up finds it
            session = await side.open(node)
            try:
                await session.execute(
                    "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
                    " where pg_is_in_recovery() and slot_name = any ($1::text[]) and not synced and not active",
                    list(names),
                )
            finally:
                session.terminate()
