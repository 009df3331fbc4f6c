"""A seller's statement: opening balance, entries, closing balance; page by page as JSON, whole as CSV."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import AsyncIterator

import asyncpg
import msgspec

from aggregator import queries
from aggregator.cursor import EntryCursor
from aggregator.reads import known_zone
from aggregator.views import StatementEntry
from oncepay.cart import PLATFORM_SELLER
from oncepay.errors import InvalidField
from oncepay.money import exponent

SQL = queries.load("read.sql")
FINAL_AFTER_S = 900
"""So long after its end a statement is final: entries carry the time of their commit, and are here by then."""
CSV_ROWS = 2_000
"""Rows that are read from the database and sent at once."""
BEGINNING = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
COLUMNS = ("at", "kind", "key", "entry", "amount_minor", "balance_minor", "amount", "balance", "currency")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Period(msgspec.Struct, frozen=True):
    """Whose statement, from which moment (inclusive; None: the beginning) to which (exclusive; None: now)."""

    seller: str
    currency: str
    first: dt.datetime | None
    end: dt.datetime | None

    @property
    def start(self) -> EntryCursor:
        """The place in the order of entries after which the first page begins."""
        return EntryCursor(self.first or BEGINNING, "", "")

    def final(self, now: dt.datetime) -> bool:
        """Whether no entry can come into it any more."""
        return self.end is not None and (now - self.end).total_seconds() >= FINAL_AFTER_S


async def period(
    connection: asyncpg.Connection, seller: str, currency: str, days: tuple[dt.date | None, dt.date | None], timezone: str
) -> Period:
    """The statement of these days, both inclusive, in a time zone. Raises InvalidField for one that isn't known."""
    if seller == PLATFORM_SELLER:
        raise InvalidField("the platform has no statement: /v1/profit and /v1/trial-balance show its accounts", field="seller")
    first, last = days
    with known_zone():
        begins = await connection.fetchval(SQL["day_begins"], first or BEGINNING.date(), timezone)
        ends = await connection.fetchval(SQL["day_begins"], last + dt.timedelta(1), timezone) if last else None
    return Period(seller, currency, begins if first else None, ends)


async def opening(connection: asyncpg.Connection, of: Period, after: EntryCursor) -> int:
    """What the seller was owed before the entries that come after `after`, in minor units."""
    owed, since = await connection.fetchrow(SQL["owed_from"], of.seller, of.currency, *msgspec.structs.astuple(after))
    return int(owed - since)


async def page(
    connection: asyncpg.Connection, of: Period, after: EntryCursor, balance: int, limit: int
) -> tuple[list[StatementEntry], EntryCursor | None]:
    """The entries after `after` with the balance after each, from `balance` on; where the next page begins."""
    rows = await connection.fetch(SQL["statement"], of.seller, of.currency, of.end, *msgspec.structs.astuple(after), limit + 1)
    entries = []
    for at, key, entry, kind, amount in rows[:limit]:
        balance += amount
        entries.append(StatementEntry(_time(at), key, entry, kind, amount, balance))
    if len(rows) <= limit:
        return entries, None
    last = rows[limit - 1]
    return entries, EntryCursor(last["created_at"], last["key"], last["entry_id"])


async def lines(connection: asyncpg.Connection, of: Period) -> AsyncIterator[bytes]:
    """The whole statement as CSV, piece by piece: a header, the opening balance, the entries, the closing balance."""
    after: EntryCursor | None = of.start
    balance = await opening(connection, of, of.start)
    rows: list[tuple[object, ...]] = [COLUMNS, _balance_row("opening_balance", of, of.first, balance)]
    while after is not None:
        entries, after = await page(connection, of, after, balance, CSV_ROWS)
        rows += [_row(entry, of.currency) for entry in entries]
        balance = entries[-1].balance if entries else balance
        if after is None:
            rows.append(_balance_row("closing_balance", of, of.end, balance))
        yield _csv(rows)
        rows = []


def _row(entry: StatementEntry, currency: str) -> tuple[object, ...]:
    amounts = _decimal(entry.amount, currency), _decimal(entry.balance, currency)
    return entry.at, entry.kind, _text(entry.key), _text(entry.entry), entry.amount, entry.balance, *amounts, currency


def _balance_row(name: str, of: Period, at: dt.datetime | None, balance: int) -> tuple[object, ...]:
    return _time(at) if at else "", name, "", "", "", balance, "", _decimal(balance, of.currency), of.currency


def _text(value: str) -> str:
    """A client's own text: a spreadsheet must not take it for a formula."""
    return f"'{value}" if value.startswith(_FORMULA) else value


def _decimal(amount_minor: int, currency: str) -> str:
    """An amount in major units, as `-12.30`."""
    digits = exponent(currency)
    text = f"{abs(amount_minor):0{digits + 1}d}"
    whole = f"{text[:-digits]}.{text[-digits:]}" if digits else text
    return f"-{whole}" if amount_minor < 0 else whole


def _time(at: dt.datetime) -> str:
    return at.astimezone(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _csv(rows: list[tuple[object, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()
