"""The copy of a range: chunk by chunk, out of one snapshot of the giver into one transaction of the taker.

The stream's slot is older than every chunk, and its subscription stands still meanwhile: so it brings whatever changed since, in
order, and no snapshot has to live for longer than a chunk. What was copied is kept in the taker's own transaction: any operator
process goes on from there, after any crash or failover.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack

import asyncpg
import msgspec

from oncepay.logs import get_logger
from shard.mover.pace import Pace
from shard.mover.side import Side
from shard.mover.tables import Table

CHUNK_ROWS = 20_000
"""Rows of all tables in one chunk, about."""
QUEUE_PIECES = 32
COPY_NAME = "oncepay_copy_"
"""Before a move's id: its copy's origin, and the name of the session that has it."""
LAG_PAUSE_S = 0.1

_log = get_logger("mover")

_COPIED = "select copied_to, copied_rows, copied_bytes from oncepay.moves where id = $1"
_NOTE = """
update oncepay.moves set copied_to = $2, copied_rows = copied_rows + $3, copied_bytes = copied_bytes + $4 where id = $1
"""
_LAG = """
select coalesce(max(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), w.replay_lsn)), 0)::bigint as lag_bytes
from pg_stat_replication w join pg_replication_slots s on s.active_pid = w.pid where s.slot_type = 'physical'
"""


class Copied(msgspec.Struct, frozen=True):
    """How far a copy is: the next slot, rows and bytes so far."""

    next_slot: int
    rows: int
    bytes: int


class Copier:
    """Copies the slots `first` to `last` of `tables`, those that others refer to first.

    `limit_rows_per_s` (0: none) and `lag_max_bytes` of the taker's standbys throttle it. `on_chunk` hears of every chunk, and may
    raise to stop.
    """

    def __init__(
        self,
        move: str,
        epoch: int,
        giver: Side,
        taker: Side,
        first: int,
        last: int,
        tables: Sequence[Table],
        *,
        rows_total: int,
        limit_rows_per_s: int,
        lag_max_bytes: int,
    ) -> None:
        self._move = move
        self._epoch = epoch
        self._giver = giver
        self._taker = taker
        self._first = first
        self._last = last
        self._tables = tables
        self._rows_per_slot = max(rows_total / (last - first + 1), 0.001)
        self._pace = Pace(limit_rows_per_s)
        self._lag_max_bytes = lag_max_bytes

    async def begin(self) -> None:
        """Forget what was copied before. The rows themselves must be gone."""
        await self._taker.commit(
            "update oncepay.moves set copied_to = $2, copied_rows = 0, copied_bytes = 0"
            " where id = $1 and oncepay.assert_move($1, $3) returning 1",
            self._move,
            self._first,
            self._epoch,
        )

    async def copied(self) -> Copied:
        """How far the copy is."""
        row = await self._taker.one(_COPIED, self._move)
        assert row is not None
        next_slot = self._first if row["copied_to"] is None else row["copied_to"]
        return Copied(next_slot, row["copied_rows"], row["copied_bytes"])

    async def run(self, on_chunk: Callable[[Copied], Awaitable[None]]) -> Copied:
        """Copy what is left. Raises Unavailable when a side went away: then run it again."""
        done = await self.copied()
        with ExitStack() as sessions, self._taker.own_errors():
            source = await self._giver.open()
            sessions.callback(source.terminate)
            target = await self._taker.open()
            sessions.callback(target.terminate)
            await self._set_up(target)
            slots = max(1, int(self._pace.chunk(CHUNK_ROWS) / self._rows_per_slot))
            while done.next_slot <= self._last:
                last = min(done.next_slot + slots - 1, self._last)
                rows, size = await self._chunk(source, target, done.next_slot, last)
                done = Copied(last + 1, done.rows + rows, done.bytes + size)
                await on_chunk(done)
                await self._throttle(target, rows)
        return done

    async def _set_up(self, target: asyncpg.Connection) -> None:
        """Rows come in under an origin, so that the taker's change feed leaves them out."""
        name = COPY_NAME + self._move
        await target.execute("set idle_in_transaction_session_timeout = '60s'")
        await target.execute("select pg_replication_origin_create($1) where pg_replication_origin_oid($1) is null", name)
        await self._end_former(target, name)
        await target.execute("select pg_replication_origin_session_setup($1)", name)

    @staticmethod
    async def _end_former(target: asyncpg.Connection, name: str) -> None:
        """A session that a killed process left behind still has the origin until Postgres notices."""
        await target.execute(
            "select pg_terminate_backend(pid, 2000) from pg_stat_activity"
            " where application_name = $1 and pid <> pg_backend_pid()",
            name,
        )
        await target.execute("select set_config('application_name', $1, false)", name)

    async def _chunk(self, source: asyncpg.Connection, target: asyncpg.Connection, first: int, last: int) -> tuple[int, int]:
        """Copy some slots; rows and bytes. All tables come from one snapshot, so what refers to a row comes with it."""
        rows = size = 0
        async with source.transaction(isolation="repeatable_read", readonly=True), target.transaction():
            await target.fetchval("select oncepay.assert_move($1, $2)", self._move, self._epoch)
            for table in self._tables:
                count, length = await _pipe(source, target, table, first, last)
                rows += count
                size += length
            await target.execute(_NOTE, self._move, last + 1, rows, size)
        return rows, size

    async def _throttle(self, target: asyncpg.Connection, rows: int) -> None:
        await self._pace.after(rows)
        while await target.fetchval(_LAG) > self._lag_max_bytes:  # noqa: ASYNC110 (the database tells of no event)
            await asyncio.sleep(LAG_PAUSE_S)


async def drop_origin(taker: Side, move: str) -> None:
    """Unmake the origin of a move's copy."""
    name = COPY_NAME + move
    async with taker.session() as session:
        await session.execute("select pg_terminate_backend(pid, 2000) from pg_stat_activity where application_name = $1", name)
        await session.execute("select pg_replication_origin_drop($1) where pg_replication_origin_oid($1) is not null", name)


async def _pipe(source: asyncpg.Connection, target: asyncpg.Connection, table: Table, first: int, last: int) -> tuple[int, int]:
    """COPY out piped into COPY in; rows and bytes."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_PIECES)
    size = 0

    async def out() -> None:
        try:
            await source.copy_from_query(table.copy_out(first, last), output=pieces.put, format="binary")
        except BaseException:
            while not pieces.empty():  # what waits for room would wait for ever
                pieces.get_nowait()
            pieces.put_nowait(None)
            raise
        await pieces.put(None)

    async def incoming() -> AsyncIterator[bytes]:
        nonlocal size
        while (piece := await pieces.get()) is not None:
            size += len(piece)
            yield piece

    reading = asyncio.create_task(out(), name="copy-out")
    try:
        tag = await target.copy_to_table(
            table.name, schema_name="oncepay", columns=table.columns, source=incoming(), format="binary"
        )
    except BaseException as error:
        came_first = reading.done()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if came_first and isinstance(error, asyncpg.PostgresError):
            await reading  # it tells why
        raise
    await reading
    return int(tag.rpartition(" ")[2]), size
