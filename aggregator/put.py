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
    by_payment,
    content_columns,
    entry_columns,
    failure_of,
    items_and_fee,
    latest_of,
    life_of,
    link_columns,
    number_array,
    payment_columns,
    payout_columns,
    sorted_entries,
    sorted_links,
    text_array,
)
from oncepay.entry_rows import FEE
from oncepay.feed import COPIED, EntryRow, FeedBatch, LinkRow, PaymentRow, PayoutRow
from oncepay.logs import get_logger

SQL = queries.load("apply.sql")
PAYOUTS = queries.load("payouts.sql")
CHUNK_ROWS = 500
"""Rows are encoded by so many: in between the loop carries on with what Postgres is doing."""

_log = get_logger("apply")

_Encode = Callable[[Sequence[Any]], list[Fields]]
_Job = tuple["_Table", Callable[[], Sequence[Any]], _Encode]
"""A table, what makes rows for it when their turn comes, and how they become columns."""


class _Table(NamedTuple):
    """A table that COPY fills, and its columns."""

    name: str
    columns: tuple[str, ...]


_ENTRY = ("key", "entry_id", "kind", "currency", "slot", "created_at", "lsn")
"""What an entry and its postings have in common, as `_Encoder` makes it once for both."""
_ENTRIES = _Table("entry_rows", COPIED["entry_rows"])
_POSTINGS = _Table("seller_postings", ("shard", *_ENTRY, "seller", "amount", "total", "fee", "named", "debit", "credit"))
_LINKS = _Table("link_rows", COPIED["link_rows"])
_VERSIONS = _Table("payment_versions", COPIED["payment_versions"])
_PAYMENTS = _Table("payments", COPIED["payments"])


async def put_rows(connection: asyncpg.Connection, batch: FeedBatch, *, sum_sellers: bool = True) -> Opened:
    """Put a batch of the feed into the tables and the sums. Without `sum_sellers` the sellers' sums are left as they are: the
    batch's postings are open then, and what is returned says how many there are."""
    shard, encoder = batch.shard, _Encoder(batch.shard)
    grouped = by_payment(batch.payments)
    payments, lives = [latest_of(rows) for rows in grouped], [life_of(rows) for rows in grouped]
    entries, links = sorted_entries(batch.entries), sorted_links(batch.links)
    begun = {life.key for life in lives if life.first_version == 1}
    new = [row for row in payments if row.key in begun]
    folded = cache(lambda: fold(entries, of_sellers=sum_sellers))
    try:
        async with connection.transaction():
            if await _stand_already(connection, entries, links):
                raise _Repeated
            jobs: list[_Job] = [
                (_VERSIONS, lambda: lives, encoder.lives),
                (_ENTRIES, lambda: entries, encoder.entries),
                (_POSTINGS, lambda: _sorted_postings(folded()), encoder.postings),
                (_LINKS, lambda: links, encoder.links),
                (_PAYMENTS, lambda: new, encoder.payments),
            ]
            async with Copier(connection) as copier:
                await copier.copy(jobs)
            sums = folded()
            await add_sums(connection, shard, sums)
    except (asyncpg.UniqueViolationError, _Repeated):
        metrics.REPEATED.labels(shard).inc()
        await _copy_all(connection, _VERSIONS, lives, encoder.lives)
        sums = fold(await _insert_entries(connection, shard, entries), of_sellers=sum_sellers)
        await _copy_all(connection, _POSTINGS, _sorted_postings(sums), encoder.postings)
        await _insert_links(connection, shard, links)
        await add_sums(connection, shard, sums)
        begun.clear()
    await _upsert_payments(connection, shard, [row for row in payments if row.key not in begun])
    await _upsert_payouts(connection, shard, batch.payouts)
    return Opened.of(sums.postings)


class _Repeated(Exception):
    """Something of a batch is here already, where no key says so."""


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


async def put_anew(copier: Copier, batch: FeedBatch, *, versions: bool) -> None:
    """Put rows of a shard's tables, where nothing is yet or where they are staged; the last of them are still on their way then.
    With `versions` each payment's is kept as its history. Postings and sums are left to be made of the rows.

    Raises UniqueViolationError when a row comes twice and isn't staged.
    """
    encoder, entries, links = _Encoder(batch.shard), sorted_entries(batch.entries), sorted_links(batch.links)
    grouped = by_payment(batch.payments)
    payments = [latest_of(rows) for rows in grouped]
    lives = [life_of(rows, at_commit=False) for rows in grouped] if versions else []
    jobs: list[_Job] = [
        (_VERSIONS, lambda: lives, encoder.lives),
        (_ENTRIES, lambda: entries, encoder.entries),
        (_LINKS, lambda: links, encoder.links),
        (_PAYMENTS, lambda: payments, encoder.payments),
    ]
    await copier.copy(jobs)
    if batch.payouts:
        await _upsert_payouts(await copier.idle(), batch.shard, batch.payouts)


# What is new


class Copier:
    """Copies rows over a connection that nobody else uses meanwhile. While Postgres works at those of one table, the next ones
    are made and encoded. With `staged` they go to the tables of a rebuild (`stage_rebuild`). `rows` is how many went to which."""

    def __init__(self, connection: asyncpg.Connection, *, staged: bool = False) -> None:
        self._connection = connection
        self._staged = staged
        self.rows: Counter[str] = Counter()
        self._running: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Copier:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """All is in. After an error that of the last rows is no news."""
        try:
            await self.idle()
        except asyncpg.PostgresError:
            if kind is None:
                raise

    async def idle(self) -> asyncpg.Connection:
        """The connection, once all rows are in. Raises what Postgres says to the last ones."""
        running, self._running = self._running, None
        if running is not None:
            await running
        return self._connection

    async def copy(self, jobs: Sequence[_Job]) -> None:
        """Copy each job's rows; the last ones are on their way when this returns.

        Two shards' batches may have entries, links and payments in common: these tables come in the order of `put_rows`.
        """
        for table, rows, encode in jobs:
            body = await _encoded(table, rows(), encode)
            if not body:
                continue
            await self.idle()
            sent = asyncio.Event()
            self._running = asyncio.ensure_future(self._copy(table, body, sent))
            await sent.wait()  # else Postgres would wait for it while this process encodes

    async def take(self, table: str, parts: AsyncIterator[bytes]) -> None:
        """Copy what COPY wrote elsewhere for a table of `COPIED`. Raises what `parts` raises, and what Postgres says to them."""
        connection = await self.idle()
        self.rows[table] += await _copy_in(connection, table, COPIED[table], parts, staged=self._staged)

    async def _copy(self, table: _Table, body: list[bytes], sent: asyncio.Event) -> None:
        self.rows[table.name] += await _copy(self._connection, table, body, sent, staged=self._staged)


async def _copy_all(connection: asyncpg.Connection, table: _Table, rows: Sequence[Any], encode: _Encode) -> None:
    await _copy(connection, table, await _encoded(table, rows, encode), asyncio.Event())


async def _encoded(table: _Table, rows: Sequence[Any], encode: _Encode) -> list[bytes]:
    """The rows as COPY takes them. Between two parts others have their turn."""
    parts = []
    for first in range(0, len(rows), CHUNK_ROWS):
        shard, *columns = encode(rows[first : first + CHUNK_ROWS])
        parts.append(copying.rows(len(table.columns), columns, shard[0]))
        await asyncio.sleep(0)
    return parts


async def _copy(
    connection: asyncpg.Connection, table: _Table, parts: list[bytes], sent: asyncio.Event, *, staged: bool = False
) -> int:
    """Copy encoded rows; how many. `sent` is set when Postgres has been given them, or nothing more comes of it."""

    async def body() -> AsyncIterator[bytes]:
        yield b"".join((copying.HEADER, *parts, copying.TRAILER))
        sent.set()

    try:
        return await _copy_in(connection, table.name, table.columns, body(), staged=staged) if parts else 0
    finally:
        sent.set()


async def _copy_in(
    connection: asyncpg.Connection, name: str, columns: Sequence[str], body: AsyncIterator[bytes], *, staged: bool
) -> int:
    schema, name = ("pg_temp", f"staged_{name}") if staged else ("oncepay", name)
    told = await connection.copy_to_table(name, schema_name=schema, source=body, columns=columns, format="binary")
    return int(told.removeprefix("COPY "))


def _sorted_postings(sums: Sums) -> list[SellerPosting]:
    """In the order of the table's index, as far as sellers go."""
    return sorted(sums.postings, key=itemgetter(0))


class _Encoder:
    """Makes the columns of one batch's rows, each table's as `_Table.columns` has them; the first is the shard, once. What comes
    in several rows is made once."""

    def __init__(self, shard: str) -> None:
        self._shard = [copying.text(shard)]
        self._common: dict[int, bytes] = {}

    def entries(self, rows: Sequence[EntryRow]) -> list[Fields]:
        """For _ENTRIES."""
        return [
            self._shard,
            self._in_common(rows),
            copying.optional_texts([row.source for row in rows]),
            copying.text_arrays([row.accounts for row in rows]),
            copying.int8_arrays([row.amounts for row in rows]),
            copying.optional_text_arrays([row.sellers for row in rows]),
            copying.optional_texts([row.balance_transaction for row in rows]),
            copying.optional_int8s([row.fee for row in rows]),
        ]

    def postings(self, rows: Sequence[SellerPosting]) -> list[Fields]:
        """For _POSTINGS."""
        whole, part, nulls = _POSTING_ON_ACCOUNT, _POSTING, copying.NULL * 2
        numbers = [
            part(8, amount, 8, total, 8, fee, 1, named) + nulls
            if debit is None
            else whole(8, amount, 8, total, 8, fee, 1, named, 8, debit, 8, credit)
            for _, _, amount, total, fee, debit, credit, named in rows
        ]
        return [self._shard, self._in_common([row[1] for row in rows]), copying.words([row[0] for row in rows]), numbers]

    def links(self, rows: Sequence[LinkRow]) -> list[Fields]:
        """For _LINKS."""
        return [
            self._shard,
            copying.words([row.balance_transaction for row in rows]),
            copying.words([row.key for row in rows]),
            copying.texts([row.entry_id for row in rows]),
            _place_and_time(rows),
        ]

    def lives(self, rows: Sequence[Life]) -> list[Fields]:
        """For _VERSIONS."""
        return [
            self._shard,
            copying.texts([row.key for row in rows]),
            copying.fixed(
                ("int4", [row.slot for row in rows]),
                ("int8", [row.first_version for row in rows]),
                ("int8", [row.last_version for row in rows]),
            ),
            copying.texts([row.versions for row in rows]),
        ]

    def payments(self, rows: Sequence[PaymentRow]) -> list[Fields]:
        """For _PAYMENTS."""
        terms = [items_and_fee(row.terms) for row in rows]
        return [
            self._shard,
            copying.texts([row.key for row in rows]),
            copying.fixed(
                ("int4", [row.slot for row in rows]),
                ("int8", [row.version for row in rows]),
                ("int8", [row.amount for row in rows]),
                ("int8", [row.amount_captured for row in rows]),
                ("int8", [row.amount_refunded for row in rows]),
                ("int8", copying.times([row.created_at_us for row in rows])),
                ("int8", copying.times([row.updated_at_us for row in rows])),
                ("lsn", [row.lsn for row in rows]),
            ),
            copying.words([row.status for row in rows]),
            copying.texts([row.buyer for row in rows]),
            copying.words([row.currency for row in rows]),
            copying.optional_texts([row.intent for row in rows]),
            copying.optional_texts([items for items, _ in terms]),
            copying.optional_int8s([fee for _, fee in terms]),
            copying.optional_texts([failure_of(row.progress) for row in rows]),
        ]

    def _in_common(self, entries: Sequence[EntryRow]) -> Fields:
        """_ENTRY of each. An entry's postings come after it, as a rule; then it has been made."""
        known = self._common
        new = [entry for entry in entries if id(entry) not in known]
        if new:
            made = copying.joined(
                copying.words([entry.key for entry in new]),
                copying.texts([entry.entry_id for entry in new]),
                copying.words([entry.kind for entry in new]),
                copying.words([entry.currency for entry in new]),
                _place_and_time(new),
            )
            known.update(zip(map(id, new), made, strict=True))
        return [known[id(entry)] for entry in entries]


_POSTING = copying.packer("int8", "int8", "int8", "boolean")
_POSTING_ON_ACCOUNT = copying.packer("int8", "int8", "int8", "boolean", "int8", "int8")


def _place_and_time(rows: Sequence[EntryRow] | Sequence[LinkRow]) -> Fields:
    """`slot`, `created_at` and `lsn`."""
    return copying.fixed(
        ("int4", [row.slot for row in rows]),
        ("int8", copying.times([row.created_at_us for row in rows])),
        ("lsn", [row.lsn for row in rows]),
    )


# What may be here already


async def _stand_already(connection: asyncpg.Connection, entries: Sequence[EntryRow], links: Sequence[LinkRow]) -> bool:
    """Whether a fee or a link that comes by itself is told by its payment's row already. Earlier workers sent all of them so."""
    fees = [row for row in entries if row.kind == FEE]
    if not fees and not links:
        return False
    columns = text_array(row.key for row in fees), text_array(row.entry_id for row in fees)
    return bool(await connection.fetchval(SQL["stand_already"], *columns, *link_columns(links)[:3]))


async def _insert_entries(connection: asyncpg.Connection, shard: str, rows: Sequence[EntryRow]) -> list[EntryRow]:
    """Inserts the entries; those that weren't here before."""
    if not rows:
        return []
    columns = entry_columns(rows)
    inserted = {tuple(made) for made in await connection.fetch(SQL["insert_entries"], shard, *columns)}
    new = {(row.key, row.entry_id): row for row in rows if (row.key, row.entry_id) in inserted}
    if len(new) < len(rows):
        for key, entry_id in await connection.fetch(SQL["differing_entries"], *content_columns(rows)):
            metrics.CONTRADICTIONS.labels(shard).inc()
            _log.error("an entry came again with another content", shard=shard, key=key, entry_id=entry_id)
    return list(new.values())


async def _insert_links(connection: asyncpg.Connection, shard: str, rows: Sequence[LinkRow]) -> None:
    if rows:
        await connection.execute(SQL["insert_links"], shard, *link_columns(rows))


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
