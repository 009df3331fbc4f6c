"""A shard's tables as they were at one exact position of its log, as the feed would have brought them.

The position and the snapshot come from a logical slot that is made for this: the snapshot holds exactly the transactions
that committed before the slot's consistent point.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, NamedTuple

import asyncpg

from oncepay.errors import ShardUnavailable
from oncepay.feed import (
    FeedBatch,
    PaymentRow,
    PayoutRow,
    RebuildHead,
    encode_batch,
    encode_copy,
    encode_head,
    lsn_text,
    parse_lsn,
)
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.store.leader import Node
from shard.worker.errors import StandDown, WrongNode
from shard.worker.replication import ReplicationConnection
from shard.worker.stream import ROLE, SLOT, SLOT_S, revive_slot

PAGE_ROWS = 2_000
COPIED = {
    "entry_rows": "oncepay.entries",
    "link_rows": "oncepay.balance_links",
    "payment_versions": "oncepay.payments",
    "payments": "oncepay.payments",
}
"""Which of the shard's tables the aggregator's are copied from."""
PIECE_BLOCKS = 1_024
"""A table is copied by so many of its blocks at a time: then progress is known."""
PARTS_AHEAD = 8
"""So many parts of a copy are read ahead of what the aggregator takes."""
FENCED_S = 30.0
"""How long a fence that is under way may take to commit."""

_IDENTITY = "select pg_is_in_recovery(), i.incarnation, w.epoch from oncepay.identity i cross join oncepay.worker_epoch w"
_SQL = (resources.files("shard.worker") / "sql" / "snapshot.sql").read_text()
_log = get_logger("snapshot")

Connect = Callable[[str, int], Awaitable[asyncpg.Connection]]


def _statements() -> dict[str, str]:
    parts = [part.partition("\n") for part in _SQL.split("\n-- name: ")[1:]]
    return {name: statement.strip() for name, _, statement in parts}


SQL = _statements()


class Part(NamedTuple):
    """A frame of a rebuild's body, and how many rows end with it."""

    frame: bytes
    rows: int = 0


class Snapshot:
    """All that `node` held at `head.lsn`. `expected` is about how many rows there are, for showing progress."""

    def __init__(
        self, head: RebuildHead, node: Node, timeline: int, expected: int, session: asyncpg.Connection,
        maker: ReplicationConnection,
    ) -> None:  # fmt: skip
        self.head = head
        self.node = node
        self.timeline = timeline
        self.expected = expected
        self._session = session
        self._maker = maker
        self._copying: asyncio.Task[int] | None = None

    async def close(self) -> None:
        """Let go of the view; the shard keeps nothing for it any more. A copy that runs is ended."""
        self._session.terminate()
        self._maker.close()
        if self._copying is not None:
            self._copying.cancel()
            await asyncio.gather(self._copying, return_exceptions=True)

    async def parts(self) -> AsyncIterator[Part]:
        """A rebuild's body, but for its end. Raises ShardUnavailable."""
        lsn = self.head.lsn
        yield Part(encode_head(self.head))
        try:
            for number, name in enumerate(self.head.copied):
                async for part in self._copied(number, name):
                    yield part
            for piece in await self._pieces("oncepay.payments"):
                async for page in self._pages(SQL["unusual_payments"].replace("{part}", piece)):
                    yield self._batch(payments=tuple(_payment(lsn, row) for row in page))
            async for page in self._pages(SQL["payouts"]):
                yield self._batch(payouts=tuple(_payout(lsn, row) for row in page))
        except _FAILURES as error:
            raise ShardUnavailable(f"the shard's tables can't be read: {error!r}") from error

    async def _copied(self, number: int, name: str) -> AsyncIterator[Part]:
        """A table as COPY writes it, piece by piece."""
        for piece in await self._pieces(COPIED[name]):
            parts: asyncio.Queue[bytes] = asyncio.Queue(PARTS_AHEAD)
            query = SQL[name].replace("{part}", piece).replace("{lsn}", lsn_text(self.head.lsn))
            self._copying = asyncio.create_task(self._copy(query, parts))
            while part := await parts.get():
                yield Part(encode_copy(number, part))
            rows = await self._copying
            yield Part(encode_copy(number), 0 if name == "payment_versions" else rows)  # payments count by themselves

    async def _pieces(self, table: str) -> list[str]:
        """Conditions for the rows `e` of a table, PIECE_BLOCKS of its blocks each. Rows that come later aren't of this view."""
        blocks = await self._session.fetchval(SQL["blocks"], table)
        firsts = range(0, blocks, PIECE_BLOCKS)
        return [f"e.ctid >= '({first},0)' and e.ctid < '({first + PIECE_BLOCKS},0)'" for first in firsts]

    async def _copy(self, query: str, parts: asyncio.Queue[bytes]) -> int:
        """Put what COPY writes into `parts`, and an empty one at the end, or after what went wrong; how many rows."""
        try:
            told = await self._session.copy_from_query(query, self.head.shard, output=parts.put, format="binary")
        except Exception:
            await parts.put(b"")
            raise
        await parts.put(b"")
        return int(told.removeprefix("COPY "))

    async def _pages(self, query: str) -> AsyncIterator[Sequence[Any]]:
        cursor = await self._session.cursor(query)
        while page := await cursor.fetch(PAGE_ROWS):
            yield page

    def _batch(self, **rows: Any) -> Part:
        head = self.head
        batch = FeedBatch(head.shard, head.incarnation, head.epoch, 0, head.lsn, **rows)
        return Part(encode_batch(batch), batch.rows)


_FAILURES = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


@asynccontextmanager
async def open_snapshot(
    shard: str, node: Node, settings: Settings, name: str, epoch: int, connect: Connect
) -> AsyncIterator[Snapshot]:
    """Freeze a view of `node`'s tables. A feed slot that has lost its log is made anew first, so that it begins before.

    Raises WrongNode when the node isn't the leader, StandDown when the epoch is over, ShardUnavailable, ReplicationClosed.
    """
    postgres = settings.postgres
    maker = await ReplicationConnection.open(node.host, node.port, ROLE, postgres.worker_password, postgres.database, name)
    try:
        [(_, timeline, _, _)] = await maker.query("IDENTIFY_SYSTEM")
        incarnation = await _identify(maker, node, epoch)
        await revive_slot(maker, epoch)
        # The exported snapshot lives in an idle transaction of this connection, until the session below has it.
        await maker.query("set idle_in_transaction_session_timeout = 0")
        [(_, point, exported, _)] = await maker.query(
            f"CREATE_REPLICATION_SLOT \"{SLOT}_rebuild_{epoch}\" TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')", SLOT_S
        )
        assert timeline is not None
        assert point is not None
        assert exported is not None
        session = await _session(node, connect)
        try:
            slots, expected = await _begin(session, exported)
            head = RebuildHead(shard, incarnation, epoch, parse_lsn(point), slots, tuple(COPIED))
            _log.info("snapshot taken", node=node.name, lsn=lsn_text(head.lsn), slots=slots, expected=expected)
            snapshot = Snapshot(head, node, int(timeline), expected, session, maker)
            try:
                yield snapshot
            finally:
                await snapshot.close()
        finally:
            session.terminate()
    finally:
        maker.close()


@asynccontextmanager
async def no_range_leaves(node: Node, connect: Connect) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """`fence_range` is refused at `node` meanwhile. Gives a call that raises ShardUnavailable when it may not have been."""
    session = await _session(node, connect)

    async def still() -> None:
        try:
            await session.execute("select")
        except _FAILURES as error:
            raise ShardUnavailable(f"a range may have left the shard meanwhile ({error!r}): run it again") from error

    try:
        try:
            await session.execute("set idle_session_timeout = 0")
            await session.execute(f"set lock_timeout = '{FENCED_S:g}s'")
            await session.execute("select pg_advisory_lock(4, 0)")
        except _FAILURES as error:
            raise ShardUnavailable(
                f"a range is just leaving the shard, or it is being rebuilt ({error!r}): run it again"
            ) from error
        yield still
    finally:
        session.terminate()


async def _begin(session: asyncpg.Connection, exported: str) -> tuple[tuple[tuple[int, int], ...], int]:
    """Take the view; the shard's ranges in it, and about how many rows there are. It ends with the session: a rollback would be
    refused where a copy is cut off."""
    try:
        await session.execute("begin isolation level repeatable read read only")
        await session.execute(f"set transaction snapshot '{exported}'")
        await session.execute("set local idle_in_transaction_session_timeout = 0")  # the aggregator sets the pace
        await session.execute("set local enable_seqscan = on")
        slots = tuple((row[0], row[1]) for row in await session.fetch(SQL["ranges"]))
        return slots, int(await session.fetchval(SQL["expected"]))
    except _FAILURES as error:
        raise ShardUnavailable(f"the shard's tables can't be read: {error!r}") from error


async def _session(node: Node, connect: Connect) -> asyncpg.Connection:
    try:
        return await connect(node.host, node.port)
    except _FAILURES as error:
        raise ShardUnavailable(f"{node.name} can't be reached: {error!r}") from error


async def _identify(maker: ReplicationConnection, node: Node, epoch: int) -> str:
    rows = await maker.query(_IDENTITY)
    if not rows or rows[0][0] == "t" or rows[0][1] is None or rows[0][2] is None:
        raise WrongNode(f"{node.name} is not the leader, or has no identity yet")
    [(_, incarnation, known)] = rows
    assert incarnation is not None
    if int(known or 0) != epoch:
        raise StandDown(f"epoch {epoch} is over: the shard's worker holds {known}")
    return incarnation


def _payment(lsn: int, row: Sequence[Any]) -> PaymentRow:
    return PaymentRow(lsn, row[13] // 1000, *row)


def _payout(lsn: int, row: Sequence[Any]) -> PayoutRow:
    return PayoutRow(lsn, row[16] // 1000, *row)
