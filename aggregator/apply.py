"""Applying a feed: one batch, one transaction, with the shard's watermark.

The invariant: whatever the tables hold is exactly what the shards committed up to the watermarks. A batch is applied only
where it starts at its shard's watermark, in the same incarnation, by a worker whose epoch isn't over; an entry counts in
the sums only when its insertion made a row, so that what is sent again, by whichever shard, counts once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from aggregator import queries
from aggregator.events.record import Event, events_of
from aggregator.put import SQL, put_rows
from oncepay.errors import MalformedBody
from oncepay.feed import FEED_ROWS_MAX, EntryRow, FeedAnswer, FeedBatch, FeedPosition, LinkRow, PaymentRow, PayoutRow

EVENTS = queries.load("events.sql")
CATCHING_UP_ROWS = FEED_ROWS_MAX // 4
"""A batch of so many rows has more behind it."""
OPEN_MAX = 200_000
"""Postings of a shard that may wait for being added to the sums: some hundred milliseconds for who reads all sellers' sums, and a
second for the batch that adds them."""
OPEN_OF_ONE_MAX = 10_000
"""And of one seller: some milliseconds for who reads its sums."""


def check(batch: FeedBatch) -> None:
    """Raises MalformedBody for a batch that no worker may send: unnamed, backwards, or with rows from outside of it."""
    if not batch.shard or not batch.incarnation:
        raise MalformedBody("a batch names its shard and its incarnation")
    if not 0 <= batch.from_lsn <= batch.to_lsn < 1 << 64 or batch.epoch < 0:
        raise MalformedBody(f"a batch can't go from {batch.from_lsn} to {batch.to_lsn} in epoch {batch.epoch}")
    rows: Sequence[Sequence[PaymentRow | EntryRow | LinkRow | PayoutRow]] = (
        *(batch.payments, batch.entries, batch.links, batch.payouts),
    )
    for row in itertools.chain.from_iterable(rows):
        if not batch.from_lsn < row.lsn <= batch.to_lsn:
            raise MalformedBody(f"a row at {row.lsn} is not of the batch from {batch.from_lsn} to {batch.to_lsn}")


async def position(connection: asyncpg.Connection, shard: str) -> FeedPosition:
    """How far `shard` has been applied."""
    row = await connection.fetchrow("select incarnation, epoch, lsn from oncepay.watermarks where shard = $1", shard)
    return FeedPosition(None, "", 0) if row is None else FeedPosition(row["lsn"], row["incarnation"], row["epoch"])


async def apply(connection: asyncpg.Connection, batch: FeedBatch, *, recording: bool = False) -> FeedAnswer:
    """Apply `batch` whole, or say why not. When this raises after the commit was sent, the outcome is to be read back.

    With `recording` its events are kept for the endpoints that they are sent to.
    """
    check(batch)
    async with connection.transaction():
        known = await connection.fetchrow(SQL["lock_watermark"], batch.shard)
        if known is None:
            await connection.execute(SQL["begin_watermark"], batch.shard, batch.incarnation, batch.epoch, batch.from_lsn)
            known = await connection.fetchrow(SQL["lock_watermark"], batch.shard)
        incarnation, epoch, lsn, *behind = known
        reason = refusal(batch, incarnation, epoch, lsn)
        if reason:
            return FeedAnswer(False, lsn, incarnation, epoch, reason)
        events = await _events(connection, batch) if recording else []
        await _put(connection, batch, Behind(*behind))
        await _record(connection, batch.shard, events)
        await connection.execute(SQL["move_watermark"], batch.shard, batch.to_lsn, batch.epoch)
    return FeedAnswer(True, batch.to_lsn, batch.incarnation, batch.epoch)


class Behind(NamedTuple):
    """The shard's open postings before a batch: since which position (None: there are none), how many, and how many of one seller
    at most."""

    after_lsn: int | None
    postings: int
    of_one: int


async def _put(connection: asyncpg.Connection, batch: FeedBatch, behind: Behind) -> None:
    """Put the rows. The sellers' sums wait while the shard catches up, and are made for many batches at once."""
    catching_up = batch.rows >= CATCHING_UP_ROWS
    if behind.after_lsn is None and not catching_up:
        await put_rows(connection, batch)
        return
    opened = await put_rows(connection, batch, sum_sellers=False)
    if catching_up and behind.postings + opened.postings < OPEN_MAX and behind.of_one + opened.of_one < OPEN_OF_ONE_MAX:
        await connection.execute(SQL["open_postings"], batch.shard, batch.from_lsn, *opened)
        return
    await connection.execute(SQL["sum_in_memory"])
    await connection.execute(SQL["by_position"])
    after_lsn = batch.from_lsn if behind.after_lsn is None else behind.after_lsn
    await connection.execute(SQL["sum_postings"], [batch.shard], after_lsn + 1)
    await connection.execute(SQL["close_postings"], batch.shard)


def refusal(batch: FeedBatch, incarnation: str, epoch: int, lsn: int) -> str:
    """Why a batch can't be applied where the shard is at these; empty when it can."""
    if batch.incarnation != incarnation:
        return "incarnation"
    if batch.epoch < epoch:
        return "epoch"
    return "" if batch.from_lsn == lsn else "gap"


async def _events(connection: asyncpg.Connection, batch: FeedBatch) -> list[Event]:
    """The batch's events, while the tables still hold what was before it."""
    payments = await _before(connection, "payments_before", batch.payments)
    payouts = await _before(connection, "payouts_before", batch.payouts)
    return events_of(batch, payments, payouts)


async def _before(
    connection: asyncpg.Connection, statement: str, rows: Sequence[PaymentRow] | Sequence[PayoutRow]
) -> dict[str, str]:
    """The state before the batch of each key whose life didn't begin in it. Of a moved payment a later one may be here: none."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row.key, row.version)
    keys = [key for key, version in first.items() if version > 1]
    found = await connection.fetch(EVENTS[statement], keys) if keys else ()
    return {key: status for key, status, version in found if version < first[key]}


async def _record(connection: asyncpg.Connection, shard: str, events: list[Event]) -> None:
    if events:
        lsn, ids, types, keys, at, data = map(list, zip(*events, strict=True))
        await connection.execute(EVENTS["record"], shard, lsn, list(range(len(events))), ids, types, keys, at, data)
