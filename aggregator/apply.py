"""Applying a feed: one batch, one transaction, with the shard's watermark.

The invariant: whatever the tables hold is exactly what the shards committed up to the watermarks. A batch is applied only
where it starts at its shard's watermark, in the same incarnation, by a worker whose epoch isn't over; an entry counts in
the sums only when its insertion made a row, so that what is sent again, by whichever shard, counts once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import asyncpg

from aggregator import metrics, queries
from aggregator.events.record import events_of
from aggregator.fold import Sums, fold
from aggregator.rows import (
    content_columns,
    entry_columns,
    history_columns,
    latest_payments,
    link_columns,
    payment_columns,
    payout_columns,
    sorted_entries,
)
from oncepay.errors import MalformedBody
from oncepay.feed import EntryRow, FeedAnswer, FeedBatch, FeedPosition, LinkRow, PaymentRow, PayoutRow
from oncepay.logs import get_logger

SQL = queries.load("apply.sql")
PAYOUTS = queries.load("payouts.sql")
EVENTS = queries.load("events.sql")

_log = get_logger("apply")


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


async def put_rows(connection: asyncpg.Connection, batch: FeedBatch, *, at_commit: bool = True) -> None:
    """Put the batch's rows into the tables and the sums. Without `at_commit` they are no commits but a table's rows."""
    await _payments(connection, batch.shard, batch.payments, at_commit=at_commit)
    new = await _entries(connection, batch.shard, batch.entries)
    await _links(connection, batch.shard, batch.links)
    await _payouts(connection, batch.shard, batch.payouts)
    await add_sums(connection, batch.shard, fold(new))


async def _payments(connection: asyncpg.Connection, shard: str, rows: Sequence[PaymentRow], *, at_commit: bool) -> None:
    if not rows:
        return
    await connection.execute(SQL["add_history"], shard, *history_columns(rows, at_commit=at_commit))
    latest = latest_payments(rows)
    columns = payment_columns(latest)
    tag = await connection.execute(SQL["upsert_payments"], shard, *columns)
    if int(tag.rpartition(" ")[2]) < len(latest):
        await connection.execute(SQL["fill_terms"], columns[0], columns[10], columns[11])


async def _entries(connection: asyncpg.Connection, shard: str, rows: Sequence[EntryRow]) -> list[EntryRow]:
    """Inserts the entries; those that weren't here before."""
    if not rows:
        return []
    ordered = sorted_entries(rows)
    columns = entry_columns(ordered)
    inserted = {tuple(made) for made in await connection.fetch(SQL["insert_entries"], shard, *columns)}
    new = {(row.key, row.entry_id): row for row in ordered if (row.key, row.entry_id) in inserted}
    if len(new) < len(ordered):
        for key, entry_id in await connection.fetch(SQL["differing_entries"], *content_columns(columns)):
            metrics.CONTRADICTIONS.labels(shard).inc()
            _log.error("an entry came again with another content", shard=shard, key=key, entry_id=entry_id)
    return list(new.values())


async def _links(connection: asyncpg.Connection, shard: str, rows: Sequence[LinkRow]) -> None:
    if rows:
        await connection.execute(SQL["insert_links"], shard, *link_columns(rows))


async def _payouts(connection: asyncpg.Connection, shard: str, rows: Sequence[PayoutRow]) -> None:
    if rows:
        await connection.execute(PAYOUTS["upsert"], shard, *payout_columns(rows))


async def add_sums(connection: asyncpg.Connection, shard: str, sums: Sums) -> None:
    """Add what new entries come to."""
    if not sums.kinds:
        return
    days = sorted(sums.seller_days.items())
    if days:
        keys = [[key[i] for key, _ in days] for i in range(3)]
        values = [[getattr(row, name) for _, row in days] for name in ("payments", "gross", "refunded", "disputed", "fees")]
        await connection.execute(SQL["add_seller_days"], shard, *keys, *values)
    accounts = sorted(sums.accounts.items())
    await connection.execute(
        SQL["add_account_totals"],
        shard,
        [account for (account, _), _ in accounts],
        [currency for (_, currency), _ in accounts],
        [total.debit for _, total in accounts],
        [total.credit for _, total in accounts],
    )
    of_days = sorted(sums.account_days.items())
    await connection.execute(
        SQL["add_account_days"],
        shard,
        *([key[i] for key, _ in of_days] for i in range(4)),
        [total.debit for _, total in of_days],
        [total.credit for _, total in of_days],
    )
    kinds = sorted(sums.kinds.items())
    await connection.execute(
        SQL["add_kind_totals"],
        shard,
        [kind for (kind, _), _ in kinds],
        [currency for (_, currency), _ in kinds],
        [total.entries for _, total in kinds],
        [total.amount for _, total in kinds],
    )
