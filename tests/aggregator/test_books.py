"""Statements, the trial balance, balances and revenue in a time zone, against naive folds of random histories."""

from __future__ import annotations

import csv
import datetime as dt
import io
import itertools
from collections import defaultdict
from collections.abc import Iterable
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator import apply, reads, statement
from aggregator.reads import Span
from aggregator.views import RevenueRow
from oncepay.errors import InvalidField
from oncepay.feed import EntryRow
from tests.aggregator.database import EPOCH, empty, naive_postings
from tests.aggregator.strategies import FIRST_US, SELLERS, History, histories

pytestmark = pytest.mark.cluster
REAL = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ZONES = ["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Kiritimati", "Asia/Kathmandu"]
FIRST_DAY = dt.date(2026, 9, 20)
sellers = st.sampled_from([seller for seller in SELLERS if seller != "platform"])
currencies = st.sampled_from(["usd", "eur", "jpy"])


async def filled(aggregator_dsn: str, connection: asyncpg.Connection, *streams: History) -> None:
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    for history in streams:
        await apply.apply(connection, history.whole())


def of_seller(entries: Iterable[EntryRow], seller: str, currency: str) -> list[tuple[int, str, str, str, int]]:
    """(time, key, entry, kind, amount), in the order of a statement."""
    rows = (row for row in naive_postings(entries) if row[:2] == (seller, currency))
    return sorted((at, key, entry, kind, amount) for _, _, at, key, entry, kind, amount, _, _ in rows)


@REAL
@given(history=histories(), seller=sellers, currency=currencies, zone=st.sampled_from(ZONES), data=st.data())
async def test_statements_of_consecutive_days_chain_and_are_the_fold(
    aggregator_dsn: str,
    connection: asyncpg.Connection,
    history: History,
    seller: str,
    currency: str,
    zone: str,
    data: st.DataObject,
) -> None:
    await filled(aggregator_dsn, connection, history)
    cuts = sorted(data.draw(st.sets(st.integers(0, 12), max_size=4), label="cuts"))
    days = [None, *(FIRST_DAY + dt.timedelta(cut) for cut in cuts), None]
    seen, closing = [], 0
    for first, following in itertools.pairwise(days):
        last = following - dt.timedelta(1) if following else None
        of = await statement.period(connection, seller, currency, (first, last), zone)
        opening = await statement.opening(connection, of, of.start)
        assert opening == closing
        after, pages = of.start, 0
        while after is not None:
            assert await statement.opening(connection, of, after) == closing, "pages chain, too"
            entries, following_page = await statement.page(connection, of, after, closing, data.draw(st.integers(1, 4)))
            seen += entries
            closing = entries[-1].balance if entries else closing
            for entry in entries:
                local = dt.datetime.fromisoformat(entry.at).astimezone(ZoneInfo(zone)).date()
                assert first is None or first <= local
                assert last is None or local <= last
            after = following_page  # type: ignore[assignment]
            pages += 1
    wanted = of_seller(history.booked, seller, currency)
    assert [(entry.key, entry.entry, entry.kind, entry.amount) for entry in seen] == [row[1:] for row in wanted]
    assert closing == sum(row[-1] for row in wanted)


@REAL
@given(history=histories(), seller=sellers, currency=currencies)
async def test_the_csv_says_the_same(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, seller: str, currency: str
) -> None:
    await filled(aggregator_dsn, connection, history)
    of = await statement.period(connection, seller, currency, (None, None), "UTC")
    text = b"".join([piece async for piece in statement.lines(connection, of)]).decode()
    first, *entries, last = csv.DictReader(io.StringIO(text))
    wanted = of_seller(history.booked, seller, currency)
    assert (first["kind"], first["balance_minor"], last["kind"]) == ("opening_balance", "0", "closing_balance")
    assert [(row["entry"], int(row["amount_minor"])) for row in entries] == [(row[2], row[-1]) for row in wanted]
    assert int(last["balance_minor"]) == sum(int(row["amount_minor"]) for row in entries)
    for row in entries:
        digits = 0 if currency == "jpy" else 2
        assert round(float(row["amount"]) * 10**digits) == int(row["amount_minor"])


@REAL
@given(first=histories(prefix="k"), second=histories(shard="s1", prefix="m"), data=st.data())
async def test_the_trial_balance_at_a_position_is_the_fold_up_to_it(
    aggregator_dsn: str, connection: asyncpg.Connection, first: History, second: History, data: st.DataObject
) -> None:
    await filled(aggregator_dsn, connection, first, second)
    at = {
        history.shard: data.draw(st.integers(1000, history.lsn), label=history.shard)
        for history in (first, second)
        if data.draw(st.booleans())
    }
    wanted: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for history in (first, second):
        for entry in history.booked:
            if entry.lsn <= at.get(history.shard, history.lsn):
                for account, amount in zip(entry.accounts, entry.amounts, strict=True):
                    name = "seller:*:payable" if account.endswith(":payable") else account
                    wanted[entry.currency, name][amount < 0] += abs(amount)
    found = await reads.trial_balance(connection, None, at)
    shown = {(one.currency, a.account): [a.debit, a.credit] for one in found for a in one.accounts}
    assert shown == {name: sums for name, sums in wanted.items() if any(sums)}
    assert all(one.debit == one.credit for one in found)


@REAL
@given(
    history=histories(),
    seller=st.sampled_from(SELLERS),
    currency=currencies,
    interval=st.sampled_from([None, "day", "week", "month"]),
)
async def test_revenue_by_postings_is_revenue_by_days(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, seller: str, currency: str, interval: str | None
) -> None:
    """Etc/UTC goes the way of every other zone, UTC the way of the sums; both say the same, page by page."""
    await filled(aggregator_dsn, connection, history)
    of_days = await pages(connection, seller, currency, Span(None, None, interval, 2, "UTC"))  # type: ignore[arg-type]
    of_postings = await pages(connection, seller, currency, Span(None, None, interval, 2, "Etc/UTC"))  # type: ignore[arg-type]
    assert of_days == of_postings


async def pages(connection: asyncpg.Connection, seller: str, currency: str, span: Span) -> list[RevenueRow]:
    """All rows, page by page."""
    found: list[RevenueRow] = []
    first = span.first
    while True:
        rows, following = await reads.revenue(
            connection, seller, currency, Span(first, span.last, span.interval, span.limit, span.timezone)
        )
        found += rows
        if following is None:
            return found
        first = dt.date.fromisoformat(following)


@REAL
@given(history=histories(), seller=sellers, held_days=st.integers(0, 8))
async def test_pending_is_what_new_payments_still_brought(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, seller: str, held_days: int
) -> None:
    await filled(aggregator_dsn, connection, history)
    since_us = FIRST_US + held_days * 86_400_000_000
    found = await reads.balance(connection, seller, EPOCH + dt.timedelta(microseconds=since_us))
    for balance in found:
        rows = of_seller(history.booked, seller, balance.currency)
        by_key: dict[str, int] = defaultdict(int)
        for at, key, _, _, amount in rows:
            by_key[key] += amount if at >= since_us else 0
        new = {key for at, key, _, kind, _ in rows if kind == "payment" and at >= since_us}
        assert balance.balance == sum(row[-1] for row in rows)
        assert balance.pending == sum(max(by_key[key], 0) for key in new)
        assert balance.payable == balance.balance - balance.pending


async def test_a_zone_that_nobody_knows_is_named(connection: asyncpg.Connection) -> None:
    for asking in (
        reads.revenue(connection, "ann", "usd", Span(None, None, "day", 9, "Mars/Olympus")),
        statement.period(connection, "ann", "usd", (FIRST_DAY, None), "Mars/Olympus"),
    ):
        with pytest.raises(InvalidField) as caught:
            await asking
        assert caught.value.field == "timezone"


async def test_a_spreadsheet_takes_no_key_for_a_formula() -> None:
    assert statement._text("=cmd()") == "'=cmd()"
    assert [statement._decimal(amount, "usd") for amount in (5, -5, 12345)] == ["0.05", "-0.05", "123.45"]
    assert statement._decimal(-5, "jpy") == "-5"
