"""One side of a move: sessions with a shard's leader, and commits there that are proved to be on its quorum."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg

from oncepay.errors import OutcomeUnknown, ShardUnavailable
from oncepay.settings import Settings
from shard.mover.errors import BeingRebuilt, MoveError, MoveTaken, NotDrained, RangeBusy
from shard.store.evidence import prove
from shard.store.leader import Leaders, Node
from shard.store.sessions import watched

LEADER_S = 10.0
CONNECT_S = 5.0
VISIBLE_PAUSE_S = 0.02
ROLE = "oncepay_mover"

_LOST = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Side:
    """A shard as a move sees it. One session for short calls, which follows the leader; others by `open`."""

    def __init__(self, shard: str, leaders: Leaders, settings: Settings, name: str) -> None:
        self.shard = shard
        self.leaders = leaders
        self._settings = settings
        self._name = name
        self._session: asyncpg.Connection | None = None
        self._node: Node | None = None
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """Drop the session."""
        if self._session is not None:
            self._session.terminate()
            self._session = None

    async def open(self, node: Node | None = None, *, mover: bool = False) -> asyncpg.Connection:
        """A session of the caller's own, with the leader unless told. `mover`: in the role that deletes, not as superuser.

        Raises ShardUnavailable.
        """
        node = node or await self.leaders.wait(self.shard, LEADER_S)
        postgres = self._settings.postgres
        user, password = (ROLE, postgres.mover_password) if mover else (postgres.superuser, postgres.superuser_password)
        try:
            session = await asyncpg.connect(
                host=node.host,
                port=node.port,
                user=user,
                password=password,
                database=postgres.database,
                ssl=False,
                timeout=CONNECT_S,
                server_settings={
                    "application_name": self._name,
                    "synchronous_commit": "on",
                    "statement_timeout": "0",
                    "transaction_timeout": "0",
                    "idle_in_transaction_session_timeout": "60000",
                    "timezone": "UTC",
                    "datestyle": "ISO",
                    "jit": "off",
                    "search_path": "pg_catalog",
                    # Right after a copy there are no statistics: keys are looked up one by one all the same.
                    "enable_seqscan": "off",
                    "enable_hashjoin": "off",
                    "enable_mergejoin": "off",
                },
            )
        except (*_LOST, asyncpg.PostgresError) as error:
            raise ShardUnavailable(f"{node.name} of shard {self.shard} can't be reached: {error!r}") from error
        return watched(session)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """The side's own session, for one caller at a time. What Postgres refuses becomes an error of the move."""
        async with self._lock:
            try:
                with self.own_errors():
                    yield await self._current()
            except (OutcomeUnknown, asyncio.CancelledError):
                await self.close()
                raise

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Errors of sessions with this side as the move's own. A session that is gone is OutcomeUnknown."""
        try:
            yield
        except (*_LOST, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
            raise OutcomeUnknown(f"shard {self.shard}: {error!r}") from error
        except asyncpg.PostgresError as error:
            raise self._own(error) from error

    async def _current(self) -> asyncpg.Connection:
        node = await self.leaders.wait(self.shard, LEADER_S)
        if self._session is None or self._session.is_closed() or node != self._node:
            await self.close()
            self._session, self._node = await self.open(node), node
        return self._session

    def _own(self, error: asyncpg.PostgresError) -> Exception:
        """The error of ours that one of Postgres stands for."""
        if error.sqlstate == "OP002":
            return MoveTaken(str(error))
        if error.sqlstate == "OP003":
            return NotDrained(str(error))
        if error.sqlstate == "OP004":
            return MoveError(f"shard {self.shard}: {error}")
        if error.sqlstate == "OP005":
            return BeingRebuilt(f"shard {self.shard}: {error}")
        if isinstance(error, asyncpg.LockNotAvailableError):
            return RangeBusy(f"shard {self.shard}: {error}")
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            return ShardUnavailable(f"the session of shard {self.shard} is not with its leader")
        return MoveError(f"shard {self.shard}: {error}")

    async def commit(self, query: str, *arguments: object) -> Mapping[str, Any]:
        """The one row of a query that commits something by itself, seen with the evidence. Raises OutcomeUnknown.

        When the caller is canceled the session is dropped without a word: a commit in flight is never canceled.
        """
        committing = asyncio.create_task(self._commit(query, arguments), name=f"commit {self.shard}")
        try:
            return await asyncio.shield(committing)
        except asyncio.CancelledError:
            await self.close()
            await asyncio.gather(committing, return_exceptions=True)
            raise

    async def _commit(self, query: str, arguments: tuple[object, ...]) -> Mapping[str, Any]:
        async with self.session() as session:
            row: Mapping[str, Any] = await session.fetchrow(query, *arguments)
            await prove(session, self.shard, self.leaders.member_slots(self.shard))
            return row

    async def read(self, query: str, *arguments: object) -> Sequence[Mapping[str, Any]]:
        """Rows as the leader has them. What a move decides by is read with `sure`."""
        async with self.session() as session:
            rows: Sequence[Mapping[str, Any]] = await session.fetch(query, *arguments)
            return rows

    async def one(self, query: str, *arguments: object) -> Mapping[str, Any] | None:
        """The first row, None when there is none."""
        rows = await self.read(query, *arguments)
        return rows[0] if rows else None

    async def barrier(self) -> None:
        """Commit a message with evidence: what was read in this session before can't be erased by a failover."""
        await self.commit("select pg_logical_emit_message(true, 'oncepay', $1::text)", self._name)

    async def position(self) -> int:
        """The end of the leader's log."""
        row = await self.one("select pg_current_wal_insert_lsn() as lsn")
        assert row is not None
        return int(row["lsn"])

    async def until_visible(self, timeout_s: float) -> None:
        """Return when all that had a transaction's number by now has ended, or after `timeout_s`.

        A commit that waits for its standbys is in the log, and in a subscription's progress, before anybody here sees it.
        """
        deadline_s = time.monotonic() + timeout_s
        row = await self.one("select pg_current_xact_id()::text::bigint as number")
        assert row is not None
        while True:
            seen = await self.one("select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest")
            assert seen is not None
            if seen["oldest"] > row["number"] or time.monotonic() > deadline_s:
                return
            await asyncio.sleep(VISIBLE_PAUSE_S)

    async def timeline(self) -> int:
        """The leader's timeline: it grows with every failover."""
        row = await self.one("select pg_walfile_name(pg_current_wal_insert_lsn()) as name")
        assert row is not None
        return int(row["name"][:8], 16)

    async def owns(self, first: int, last: int) -> bool:
        """Whether all of the slots are this shard's, behind a barrier."""
        row = await self.one(
            "select coalesce(sum(last - first + 1), 0)::integer as slots from oncepay.ranges where first >= $1 and last <= $2",
            first,
            last,
        )
        await self.barrier()
        assert row is not None
        return int(row["slots"]) == last - first + 1

    def conninfo(self, role: str = ROLE) -> str:
        """How the other side's subscription finds this shard's leader, whichever node that is."""
        nodes = self.leaders.nodes(self.shard)
        postgres = self._settings.postgres
        pairs = {
            "host": ",".join(node.host for node in nodes),
            "port": ",".join(str(node.port) for node in nodes),
            "target_session_attrs": "read-write",
            "user": role,
            "password": postgres.mover_password,
            "dbname": postgres.database,
            "connect_timeout": "5",
        }
        return " ".join(f"{name}='{_quoted(value)}'" for name, value in pairs.items())


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'")
