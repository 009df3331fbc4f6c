"""Putting rows into the tables and the sums, inside of the transaction that moves the watermark.

Nearly always everything is new, and then COPY brings it, for a third of what `insert … on conflict` costs. Where a unique
constraint says that something was here already, the savepoint is rolled back and every row goes its own way. So an entry
counts exactly when its insertion made a row, in both ways.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import asyncpg

from aggregator import copying, metrics, queries
from aggregator.copying import Fields
from aggregator.fold import SellerPosting, Sums, fold
from aggregator.rows import (
    Life,
    content_columns,
    entry_columns,
    failure_of,
    items_and_fee,
    latest_payments,
    link_columns,
    lives_of,
    number_array,
    payment_columns,
    payout_columns,
    sorted_entries,
    sorted_links,
    text_array,
)
from oncepay.feed import EntryRow, FeedBatch, LinkRow, PaymentRow, PayoutRow
from oncepay.logs import get_logger

SQL = queries.load("apply.sql")
PAYOUTS = queries.load("payouts.sql")
CHUNK_ROWS = 500
"""Rows are encoded by so many: in between the loop carries on with what Postgres is doing."""

_log = get_logger("apply")

_Job = tuple["_Table", Callable[[], Sequence[Any]], Callable[[Sequence[Any], str], list[Fields]]]
"""A table, what makes rows for it when their turn comes, and how they become columns."""


class _Table(NamedTuple):
    """A table that COPY fills, and its columns."""

    name: str
    columns: tuple[str, ...]


_ENTRIES = _Table(
    "entries",
    (
        *("key", "entry_id", "slot", "kind", "currency", "source", "accounts", "amounts", "sellers", "created_at", "lsn"),
        "shard",
    ),
)
_POSTINGS = _Table(
    "seller_postings",
    (
        *("seller", "currency", "created_at", "key", "entry_id", "slot", "kind", "amount", "total", "fee"),
        *("shard", "lsn", "debit", "credit", "named"),
    ),
)
_LINKS = _Table("balance_links", ("balance_transaction", "key", "entry_id", "slot", "created_at", "lsn", "shard"))
_VERSIONS = _Table("payment_versions", ("key", "slot", "first_version", "last_version", "versions", "shard"))
_PAYMENTS = _Table(
    "payments",
    (
        *("key", "slot", "status", "version", "buyer", "currency", "amount", "amount_captured", "amount_refunded"),
        *("payment_intent", "items", "platform_fee", "failure", "created_at", "updated_at", "lsn", "shard"),
    ),
)


async def put_rows(connection: asyncpg.Connection, batch: FeedBatch, *, sum_sellers: bool = True) -> Opened:
    """Put a batch of the feed into the tables and the sums. Without `sum_sellers` the sellers' sums are left as they are: the
    batch's postings are open then, and what is returned says how many there are."""
    shard = batch.shard
    payments, lives = latest_payments(batch.payments), lives_of(batch.payments)
    entries, links = sorted_entries(batch.entries), sorted_links(batch.links)
    begun = {life.key for life in lives if life.first_version == 1}
    new = [row for row in payments if row.key in begun]
    folded = cache(lambda: fold(entries, of_sellers=sum_sellers))
    try:
        async with connection.transaction():
            jobs: list[_Job] = [
                (_VERSIONS, lambda: lives, _life_fields),
                (_ENTRIES, lambda: entries, _entry_fields),
                (_POSTINGS, lambda: _sorted_postings(folded()), _posting_fields),
                (_LINKS, lambda: links, _link_fields),
                (_PAYMENTS, lambda: new, _payment_fields),
            ]
            await _copy_behind(connection, shard, jobs)
            sums = folded()
            await add_sums(connection, shard, sums)
    except asyncpg.UniqueViolationError:
        metrics.REPEATED.labels(shard).inc()
        await _copy_all(connection, shard, _VERSIONS, lives, _life_fields)
        sums = fold(await _insert_entries(connection, shard, entries), of_sellers=sum_sellers)
        await _copy_all(connection, shard, _POSTINGS, _sorted_postings(sums), _posting_fields)
        await _insert_links(connection, shard, links)
        await add_sums(connection, shard, sums)
        begun.clear()
    await _upsert_payments(connection, shard, [row for row in payments if row.key not in begun])
    await _upsert_payouts(connection, shard, batch.payouts)
    return Opened.of(sums.postings)


class Opened(NamedTuple):
    """Postings of a batch: when the earliest is of, how many there are, and how many one seller has at most."""

    since_us: int | None
    postings: int
    of_one: int

    @classmethod
    def of(cls, postings: Sequence[SellerPosting]) -> Opened:
        """What the aggregator keeps of postings whose sums it doesn't add yet."""
        if not postings:
            return cls(None, 0, 0)
        of_each = Counter(map(itemgetter(0), postings))
        return cls(min(row.entry.created_at_us for row in postings), len(postings), max(of_each.values()))


async def put_anew(connection: asyncpg.Connection, batch: FeedBatch, *, known_versions: bool) -> Sums:
    """Put rows of a table that is rebuilt, whose slots were forgotten. What it returns is to be added to the sums; the
    sellers' are made of their postings.

    `known_versions`: there is a history already, and what it has stays.

    Raises UniqueViolationError when the body of a rebuild brings a row twice.
    """
    shard, entries = batch.shard, sorted_entries(batch.entries)
    payments, links = latest_payments(batch.payments), sorted_links(batch.links)
    lives = lives_of(batch.payments, at_commit=False)
    if known_versions:
        lives = await _unknown(connection, lives)
    folded = cache(lambda: fold(entries, of_sellers=False))
    jobs: list[_Job] = [
        (_VERSIONS, lambda: lives, _life_fields),
        (_ENTRIES, lambda: entries, _entry_fields),
        (_POSTINGS, lambda: _sorted_postings(folded()), _posting_fields),
        (_LINKS, lambda: links, _link_fields),
        (_PAYMENTS, lambda: payments, _payment_fields),
    ]
    await _copy_behind(connection, shard, jobs)
    await _upsert_payouts(connection, shard, batch.payouts)
    return folded()


# What is new


async def _copy_behind(connection: asyncpg.Connection, shard: str, jobs: Sequence[_Job]) -> None:
    """Copy each job's rows. While Postgres works at those of one, the next ones are made and encoded.

    Two shards' batches may have entries, links and payments in common: these tables come in the order of `put_rows`.
    """
    running: asyncio.Future[None] | None = None
    try:
        for table, rows, fields in jobs:
            body = await _encoded(rows(), shard, fields)
            if running is not None:
                await running
            sent = asyncio.Event()
            running = asyncio.ensure_future(_copy(connection, table, body, sent))
            await sent.wait()  # else Postgres would wait for it while this process encodes
    finally:
        if running is not None:
            await running


async def _copy_all(
    connection: asyncpg.Connection, shard: str, table: _Table, rows: Sequence[Any], fields: Callable[..., list[Fields]]
) -> None:
    await _copy(connection, table, await _encoded(rows, shard, fields), asyncio.Event())


async def _encoded(rows: Sequence[Any], shard: str, fields: Callable[..., list[Fields]]) -> list[bytes]:
    """The rows as COPY takes them. Between two parts others have their turn."""
    parts = []
    for first in range(0, len(rows), CHUNK_ROWS):
        parts.append(copying.rows(fields(rows[first : first + CHUNK_ROWS], shard)))
        await asyncio.sleep(0)
    return parts


async def _copy(connection: asyncpg.Connection, table: _Table, parts: list[bytes], sent: asyncio.Event) -> None:
    """Copy encoded rows. `sent` is set when Postgres has been given them, or nothing more comes of it."""

    async def body() -> AsyncIterator[bytes]:
        yield b"".join((copying.HEADER, *parts, copying.TRAILER))
        sent.set()

    try:
        if parts:
            await connection.copy_to_table(
                table.name, schema_name="oncepay", source=body(), columns=table.columns, format="binary"
            )
    finally:
        sent.set()


def _sorted_postings(sums: Sums) -> list[SellerPosting]:
    """In the order of the table's index, as far as sellers go."""
    return sorted(sums.postings, key=itemgetter(0))


def _entry_fields(rows: Sequence[EntryRow], shard: str) -> list[Fields]:
    return [
        copying.texts([row.key for row in rows]),
        copying.texts([row.entry_id for row in rows]),
        copying.int4s([row.slot for row in rows]),
        copying.words([row.kind for row in rows]),
        copying.words([row.currency for row in rows]),
        copying.texts([row.source for row in rows]),
        copying.text_arrays([row.accounts for row in rows]),
        copying.int8_arrays([row.amounts for row in rows]),
        copying.text_arrays([row.sellers for row in rows]),
        copying.times([row.created_at_us for row in rows]),
        copying.lsns([row.lsn for row in rows]),
        copying.words([shard] * len(rows)),
    ]


def _posting_fields(rows: Sequence[SellerPosting], shard: str) -> list[Fields]:
    entries = [row.entry for row in rows]
    return [
        copying.texts([row.seller for row in rows]),
        copying.words([entry.currency for entry in entries]),
        copying.times([entry.created_at_us for entry in entries]),
        copying.texts([entry.key for entry in entries]),
        copying.texts([entry.entry_id for entry in entries]),
        copying.int4s([entry.slot for entry in entries]),
        copying.words([entry.kind for entry in entries]),
        copying.int8s([row.amount for row in rows]),
        copying.int8s([row.total for row in rows]),
        copying.int8s([row.fee for row in rows]),
        copying.words([shard] * len(rows)),
        copying.lsns([entry.lsn for entry in entries]),
        copying.optional_int8s([row.debit for row in rows]),
        copying.optional_int8s([row.credit for row in rows]),
        copying.booleans([row.named for row in rows]),
    ]


def _link_fields(rows: Sequence[LinkRow], shard: str) -> list[Fields]:
    return [
        copying.texts([row.balance_transaction for row in rows]),
        copying.texts([row.key for row in rows]),
        copying.texts([row.entry_id for row in rows]),
        copying.int4s([row.slot for row in rows]),
        copying.times([row.created_at_us for row in rows]),
        copying.lsns([row.lsn for row in rows]),
        copying.words([shard] * len(rows)),
    ]


def _life_fields(rows: Sequence[Life], shard: str) -> list[Fields]:
    return [
        copying.texts([row.key for row in rows]),
        copying.int4s([row.slot for row in rows]),
        copying.int8s([row.first_version for row in rows]),
        copying.int8s([row.last_version for row in rows]),
        copying.texts([row.versions for row in rows]),
        copying.words([shard] * len(rows)),
    ]


def _payment_fields(rows: Sequence[PaymentRow], shard: str) -> list[Fields]:
    terms = [items_and_fee(row.terms) for row in rows]
    return [
        copying.texts([row.key for row in rows]),
        copying.int4s([row.slot for row in rows]),
        copying.words([row.status for row in rows]),
        copying.int8s([row.version for row in rows]),
        copying.texts([row.buyer for row in rows]),
        copying.words([row.currency for row in rows]),
        copying.int8s([row.amount for row in rows]),
        copying.int8s([row.amount_captured for row in rows]),
        copying.int8s([row.amount_refunded for row in rows]),
        copying.optional_texts([row.intent for row in rows]),
        copying.optional_texts([items for items, _ in terms]),
        copying.optional_int8s([fee for _, fee in terms]),
        copying.optional_texts([failure_of(row.progress) for row in rows]),
        copying.times([row.created_at_us for row in rows]),
        copying.times([row.updated_at_us for row in rows]),
        copying.lsns([row.lsn for row in rows]),
        copying.words([shard] * len(rows)),
    ]


# What may be here already


async def _insert_entries(connection: asyncpg.Connection, shard: str, rows: Sequence[EntryRow]) -> list[EntryRow]:
    """Inserts the entries; those that weren't here before."""
    if not rows:
        return []
    columns = entry_columns(rows)
    inserted = {tuple(made) for made in await connection.fetch(SQL["insert_entries"], shard, *columns)}
    new = {(row.key, row.entry_id): row for row in rows if (row.key, row.entry_id) in inserted}
    if len(new) < len(rows):
        for key, entry_id in await connection.fetch(SQL["differing_entries"], *content_columns(columns)):
            metrics.CONTRADICTIONS.labels(shard).inc()
            _log.error("an entry came again with another content", shard=shard, key=key, entry_id=entry_id)
    return list(new.values())


async def _insert_links(connection: asyncpg.Connection, shard: str, rows: Sequence[LinkRow]) -> None:
    if rows:
        await connection.execute(SQL["insert_links"], shard, *link_columns(rows))


async def _unknown(connection: asyncpg.Connection, lives: Sequence[Life]) -> list[Life]:
    """Those whose last version the history doesn't have."""
    columns = text_array(life.key for life in lives), number_array(life.last_version for life in lives)
    known = {tuple(row) for row in await connection.fetch(SQL["known_versions"], *columns)}
    return [life for life in lives if (life.key, life.last_version) not in known]


async def _upsert_payments(connection: asyncpg.Connection, shard: str, rows: Sequence[PaymentRow]) -> None:
    if not rows:
        return
    columns = payment_columns(rows)
    tag = await connection.execute(SQL["upsert_payments"], shard, *columns)
    if int(tag.rpartition(" ")[2]) < len(rows):
        await connection.execute(SQL["fill_terms"], columns[0], columns[10], columns[11])


async def _upsert_payouts(connection: asyncpg.Connection, shard: str, rows: Sequence[PayoutRow]) -> None:
    if rows:
        await connection.execute(PAYOUTS["upsert"], shard, *payout_columns(rows))


async def add_sums(connection: asyncpg.Connection, shard: str, sums: Sums) -> None:
    """Add what new entries come to."""
    if not sums.kinds:
        return
    sellers = sorted(sums.seller_days.items(), key=itemgetter(0))
    accounts = sorted(sums.accounts.items(), key=itemgetter(0))
    days = sorted(sums.account_days.items(), key=itemgetter(0))
    kinds = sorted(sums.kinds.items(), key=itemgetter(0))
    await connection.execute(
        SQL["add_sums"],
        shard,
        *_names(sellers, 3),
        *(number_array(map(attrgetter(name), [row for _, row in sellers])) for name in _SELLER_DAY),
        *_names(accounts, 2),
        number_array([total.debit for _, total in accounts]),
        number_array([total.credit for _, total in accounts]),
        *_names(days, 4),
        number_array([total.debit for _, total in days]),
        number_array([total.credit for _, total in days]),
        *_names(kinds, 2),
        number_array([total.entries for _, total in kinds]),
        number_array([total.amount for _, total in kinds]),
    )


def _names(sums: Sequence[tuple[tuple[Any, ...], Any]], width: int) -> list[str]:
    """The columns of their keys."""
    return [text_array([str(name[i]) for name, _ in sums]) for i in range(width)]


_SELLER_DAY = ("payments", "gross", "refunded", "disputed", "fees")
