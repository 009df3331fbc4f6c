"""The reads behind the API: a connection with its snapshot in, views out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import asyncpg
import msgspec

from aggregator import queries
from aggregator.cursor import Cursor
from aggregator.views import (
    AccountSum,
    Balance,
    CurrencyTotal,
    HistoryRow,
    Interval,
    Order,
    OrderFailure,
    OrderItem,
    RevenueRow,
    SellerSum,
)
from oncepay.ledger import PLATFORM_FEES, STRIPE_FEES, payable

SQL = queries.load("read.sql")
SELLER_ACCOUNTS = "seller:*:payable"

_items = msgspec.json.Decoder(list[OrderItem])
_failure = msgspec.json.Decoder(OrderFailure)


async def revenue(
    connection: asyncpg.Connection,
    seller: str,
    currency: str,
    first: dt.date | None,
    last: dt.date | None,
    interval: Interval | None,
) -> list[RevenueRow]:
    """Revenue of the days from `first` to `last`, both inclusive (None: all)."""
    if interval is not None:
        rows = await connection.fetch(SQL["revenue_by"], seller, currency, first, last, interval)
        return [RevenueRow(*row) for row in rows]
    first_day, *sums = await connection.fetchrow(SQL["revenue_whole"], seller, currency, first, last)
    begins = first or first_day
    return [RevenueRow(begins, *sums)] if begins is not None else []


async def balance(connection: asyncpg.Connection, seller: str) -> list[Balance]:
    """What is on the seller's account, in each currency that it ever had."""
    rows = await connection.fetch(SQL["balance"], payable(seller))
    return [Balance(currency, int(credit - debit), int(credit), int(debit)) for currency, debit, credit in rows]


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
