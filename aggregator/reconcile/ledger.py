"""Stripe's side of a reconciliation: its lists, page by page, into the copy that the aggregator keeps."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import asyncpg

from aggregator import queries

if TYPE_CHECKING:
    from oncepay.stripe_client import StripeGateway
    from oncepay.stripe_objects import BankPayoutObject, LedgerTransactionObject

SQL = queries.load("reconcile.sql")
READERS = 4
"""So many spans are read at once."""
SPANS_MAX = 32
"""A period is read in so many spans, or in days when those are more."""

Connect = Callable[[], AbstractAsyncContextManager[asyncpg.Connection]]
Span = tuple[dt.datetime, dt.datetime]


def spans(first: dt.datetime, last: dt.datetime, longest: dt.timedelta) -> Iterator[Span]:
    """[first, last) cut into pieces of at most `longest`, and of whole seconds."""
    length = max(dt.timedelta(seconds=1), min(longest, (last - first) / SPANS_MAX))
    length = dt.timedelta(seconds=int(length.total_seconds()))
    while first < last:
        yield first, min(first + length, last)
        first += length


async def keep(connection: asyncpg.Connection, found: list[LedgerTransactionObject]) -> None:
    """Put transactions into the copy, each as it is now."""
    rows = [(t.id, t.type, category(t), t.currency, t.amount, t.fee, t.net, t.source, _time(t.created)) for t in found]
    if rows:
        await connection.execute(SQL["keep"], *map(list, zip(*rows, strict=True)))


def category(transaction: LedgerTransactionObject) -> str:
    """Its reporting category; its type where an old answer has none."""
    return transaction.reporting_category or transaction.type


async def read_transactions(
    stripe: StripeGateway, connect: Connect, first: dt.datetime, last: dt.datetime, taken: Callable[[int], None]
) -> None:
    """Read all balance transactions of [first, last) into the copy; memory holds READERS pages. Raises StripeUnavailable."""
    waiting = spans(first, last, dt.timedelta(days=1))

    async def reader() -> None:
        for start, end in waiting:
            async for page in _pages(stripe, int(start.timestamp()), int(end.timestamp())):
                async with connect() as connection:
                    await keep(connection, page)
                taken(len(page))

    async with asyncio.TaskGroup() as group:
        for _ in range(READERS):
            group.create_task(reader())


async def _pages(stripe: StripeGateway, first: int, last: int) -> AsyncIterator[list[LedgerTransactionObject]]:
    after = ""
    while True:
        page = await stripe.balance_transactions(created_gte=first, created_lt=last, starting_after=after)
        yield page.data
        if not page.has_more or not page.data:
            return
        after = page.data[-1].id


async def bank_payouts(stripe: StripeGateway, first: dt.datetime, last: dt.datetime) -> AsyncIterator[BankPayoutObject]:
    """All payouts to the bank of [first, last), newest first. Raises StripeUnavailable."""
    after = ""
    while True:
        page = await stripe.bank_payouts(
            created_gte=int(first.timestamp()), created_lt=int(last.timestamp()), starting_after=after
        )
        for payout in page.data:
            yield payout
        if not page.has_more or not page.data:
            return
        after = page.data[-1].id


def _time(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
