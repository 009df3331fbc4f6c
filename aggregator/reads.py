"""The reads behind the API: a connection with its snapshot in, views out."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import asyncpg
import msgspec

from aggregator import queries
from aggregator.cursor import Cursor
from aggregator.fold import SELLER_ACCOUNTS
from aggregator.views import (
    AccountSum,
    Balance,
    CurrencyTotal,
    HistoryRow,
    Interval,
    Order,
    OrderFailure,
    OrderItem,
    ProfitRow,
    RevenueRow,
    SellerSum,
    TrialAccount,
    TrialCurrency,
)
from oncepay.errors import InvalidField
from oncepay.ledger import PLATFORM_FEES, STRIPE_FEES

SQL = queries.load("read.sql")

_items = msgspec.json.Decoder(list[OrderItem])
_failure = msgspec.json.Decoder(OrderFailure)


UTC = "UTC"
_ANY_DAY = dt.date(2000, 1, 1)


class Span(msgspec.Struct, frozen=True):
    """Days from `first` to `last`, both inclusive (None: all), cut into intervals (None: one row) of a time zone.

    A page has at most `limit` rows.
    """

    first: dt.date | None
    last: dt.date | None
    interval: Interval | None
    limit: int
    timezone: str = UTC


async def revenue(connection: asyncpg.Connection, seller: str, currency: str, span: Span) -> tuple[list[RevenueRow], str | None]:
    """A page of revenue, and where the next page begins. Raises InvalidField for a time zone that isn't known."""
    first, last, interval = span.first, span.last, span.interval
    if span.timezone != UTC:
        with known_zone():
            await connection.fetchval(SQL["day_begins"], _ANY_DAY, span.timezone)  # also where there is no row to place
            rows = await connection.fetch(
                SQL["revenue_zoned"], seller, currency, first, last, interval or "", span.limit + 1, span.timezone
            )
        return _page([RevenueRow(*row) for row in rows], span.limit)
    if interval is not None:
        rows = await connection.fetch(SQL["revenue_by"], seller, currency, first, last, interval, span.limit + 1)
        return _page([RevenueRow(*row) for row in rows], span.limit)
    first_day, *sums = await connection.fetchrow(SQL["revenue_whole"], seller, currency, first, last)
    begins = first or first_day
    return ([RevenueRow(begins, *sums)] if begins is not None else []), None


Row = TypeVar("Row", RevenueRow, ProfitRow)


def _page(rows: list[Row], limit: int) -> tuple[list[Row], str | None]:
    return rows[:limit], rows[limit].from_.isoformat() if len(rows) > limit else None


@contextlib.contextmanager
def known_zone() -> Iterator[None]:
    """Raises InvalidField where the database doesn't know the time zone."""
    try:
        yield
    except asyncpg.InvalidParameterValueError as error:
        raise InvalidField(str(error), field="timezone") from None


async def balance(connection: asyncpg.Connection, seller: str, held_since: dt.datetime) -> list[Balance]:
    """What is on the seller's account, in each currency that it ever had. Payments from `held_since` on are pending."""
    rows = await connection.fetch(SQL["balance"], seller, held_since)
    return [_balance(currency, int(debit), int(credit), int(pending)) for currency, debit, credit, pending in rows]


def _balance(currency: str, debit: int, credit: int, pending: int) -> Balance:
    owed = credit - debit
    return Balance(currency, owed, credit, debit, pending, owed - pending)


async def trial_balance(connection: asyncpg.Connection, currency: str | None, at: Mapping[str, int]) -> list[TrialCurrency]:
    """All accounts by currency, where each shard of `at` was at that position; the others as they are."""
    rows = await connection.fetch(SQL["trial_balance"], list(at), list(at.values()), currency)
    found: dict[str, list[TrialAccount]] = {}
    for account, code, debit, credit in rows:
        found.setdefault(code, []).append(TrialAccount(account, int(debit), int(credit), int(debit - credit)))
    return [
        TrialCurrency(code, accounts, sum(account.debit for account in accounts), sum(account.credit for account in accounts))
        for code, accounts in found.items()
    ]


async def profit(connection: asyncpg.Connection, currency: str, span: Span) -> tuple[list[ProfitRow], str | None]:
    """A page of the platform's profit, and where the next page begins."""
    rows = await connection.fetch(SQL["profit"], currency, span.first, span.last, span.interval or "", span.limit + 1)
    made = []
    for day, *sums in rows:
        fees, stripe, tipalti, other, disputed = map(int, sums)
        made.append(ProfitRow(day, fees, stripe, tipalti, other, disputed, fees - stripe - tipalti - other))
    return _page(made, span.limit)


async def orders(
    connection: asyncpg.Connection, buyer: str, after: Cursor | None, limit: int
) -> tuple[list[Order], Cursor | None]:
    """A page of the buyer's payments, newest first, and where the next page begins."""
    created_at, key = (after.created_at, after.key) if after else (None, None)
    rows = await connection.fetch(SQL["orders"], buyer, created_at, key, limit + 1)
    page = [_order(row) for row in rows[:limit]]
    if len(rows) <= limit:
        return page, None
    last = rows[limit - 1]
    return page, Cursor(last["created_at"], last["key"])


def _order(row: asyncpg.Record) -> Order:
    members = dict(row)
    members["items"] = _items.decode(row["items"]) if row["items"] else []
    members["platform_fee"] = row["platform_fee"] or 0
    members["failure"] = _failure.decode(row["failure"]) if row["failure"] else msgspec.UNSET
    for name in ("created_at", "updated_at"):
        members[name] = _shown(row[name])
    return Order(**members)


def _shown(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def history(connection: asyncpg.Connection, key: str) -> list[HistoryRow]:
    """All versions of a payment that are known, oldest first."""
    rows = await connection.fetch(SQL["history"], key)
    return [HistoryRow(**{**dict(row), "at": _shown(row["at"])}) for row in rows]


async def sellers(connection: asyncpg.Connection, currency: str | None, limit: int) -> list[SellerSum]:
    """Those with the most gross first."""
    return [SellerSum(*row) for row in await connection.fetch(SQL["sellers"], currency, limit)]


async def totals(connection: asyncpg.Connection) -> tuple[list[CurrencyTotal], list[AccountSum]]:
    """The books as a whole: by currency, and by account."""
    rows = await connection.fetch(SQL["accounts"])
    accounts = [AccountSum(name, currency, int(d), int(c), int(d - c)) for name, currency, d, c in rows]
    paid = {row["currency"]: row for row in await connection.fetch(SQL["kinds"]) if row["kind"] == "payment"}
    currencies = sorted({account.currency for account in accounts})
    return [_currency_total(currency, accounts, paid.get(currency)) for currency in currencies], accounts


def _currency_total(currency: str, accounts: Sequence[AccountSum], paid: asyncpg.Record | None) -> CurrencyTotal:
    balances = {account.account: account.balance for account in accounts if account.currency == currency}
    return CurrencyTotal(
        currency,
        payments=paid["entries"] if paid else 0,
        money_in=int(paid["amount"]) if paid else 0,
        platform_fees=-balances.get(PLATFORM_FEES, 0),
        stripe_fees=balances.get(STRIPE_FEES, 0),
        owed=-balances.get(SELLER_ACCOUNTS, 0),
    )
