"""Applying a feed: one batch, one transaction, with the shard's watermark.

The invariant: whatever the tables hold is exactly what the shards committed up to the watermarks. A batch is applied only
where it starts at its shard's watermark, in the same incarnation, by a worker whose epoch isn't over; an entry counts in
the sums only when its insertion made a row, so that what is sent again, by whichever shard, counts once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import asyncpg

from aggregator import queries
from aggregator.events.record import events_of
from aggregator.put import SQL, put_rows
from oncepay.errors import MalformedBody
from oncepay.feed import EntryRow, FeedAnswer, FeedBatch, FeedPosition, LinkRow, PaymentRow, PayoutRow

EVENTS = queries.load("events.sql")


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
        incarnation, epoch, lsn = known
        reason = refusal(batch, incarnation, epoch, lsn)
        if reason:
            return FeedAnswer(False, lsn, incarnation, epoch, reason)
        await put_rows(connection, batch)
        if recording:
            await _events(connection, batch)
        await connection.execute(SQL["move_watermark"], batch.shard, batch.to_lsn, batch.epoch)
    return FeedAnswer(True, batch.to_lsn, batch.incarnation, batch.epoch)


def refusal(batch: FeedBatch, incarnation: str, epoch: int, lsn: int) -> str:
    """Why a batch can't be applied where the shard is at these; empty when it can."""
    if batch.incarnation != incarnation:
        return "incarnation"
    if batch.epoch < epoch:
        return "epoch"
    return "" if batch.from_lsn == lsn else "gap"


async def _events(connection: asyncpg.Connection, batch: FeedBatch) -> None:
    found = events_of(batch)
    if found:
        lsn, ids, types, keys, at, data = map(list, zip(*found, strict=True))
        await connection.execute(EVENTS["record"], batch.shard, lsn, list(range(len(found))), ids, types, keys, at, data)
