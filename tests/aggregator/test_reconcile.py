"""Reconciliation against the stand-in for Stripe: what agrees is silent, and each planted difference is named."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncpg
import pytest
from stripe import StripeClient

from aggregator import apply, queries
from aggregator.reconcile.explain import KINDS
from aggregator.reconcile.ledger import spans
from aggregator.reconcile.office import daily_first, due
from aggregator.reconcile.run import Run
from aggregator.reconcile.tipalti import TipaltiRun
from oncepay.errors import ShardUnavailable
from oncepay.feed import LinkRow
from oncepay.keys import transaction_key
from oncepay.ledger import BalanceLink, Entry, Posting, exchange_entries, stripe_fee_entry, transaction_entries
from oncepay.settings import StripeSettings, TipaltiSettings
from oncepay.stripe_client import StripeGateway, StripeRefused
from oncepay.stripe_objects import ErrorObject
from oncepay.tipalti_client import TipaltiClient
from tests.aggregator.strategies import History, coded_rows, entry_row
from tests.sandbox.process import KEY, StandIn, event_of, stripe_client

SQL = queries.load("reconcile.sql")
REAL = pytest.mark.cluster
Found = dict[tuple[str, str], asyncpg.Record]


class OnlyTheseRows:
    """Names the payments whose intents the test says have rows. Nothing here is booked: payments cause all of it."""

    def __init__(self, intents: dict[str, tuple[str, str]]) -> None:
        self.intents = intents

    async def book(self, transaction: str, currency: str, amount: int, fee: int, *, bank: bool) -> str:
        raise AssertionError(f"{transaction} was caused by a payment")

    async def book_funding(self, funding: str, currency: str, amount: int) -> str:
        raise AssertionError(f"{funding}: there is no Tipalti")

    async def has_payout(self, ref_code: str) -> bool:
        raise AssertionError(f"{ref_code}: there is no Tipalti")

    async def payment_of(self, intent: str) -> tuple[str, str] | None:
        return self.intents.get(intent)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn("stripe", None, "--settlement-currency", "usd").start()
    yield made
    made.stop()


class Shop:
    """Charges at the stand-in, and the entries that the platform would have made for them."""

    def __init__(self, client: StripeClient, *, packed: bool) -> None:
        self.client = client
        self.packed = packed
        self.history = History("s0")
        self.intents: dict[str, tuple[str, str]] = {}
        self.began = dt.datetime.now(dt.UTC)

    async def charge(self, amount: int, currency: str = "usd", card: str = "pm_card_visa") -> tuple[str, str, Any]:
        """A charge: the key of its payment, its id, its balance transaction."""
        params: Any = {
            "amount": amount,
            "currency": currency,
            "payment_method": card,
            "confirm": True,
            "capture_method": "automatic",
            "expand": ["latest_charge.balance_transaction"],
        }
        made = await self.client.v1.payment_intents.create_async(params)
        charge: Any = made.latest_charge
        key = f"key-{made.id}"
        self.intents[made.id] = (key, "succeeded")
        return key, charge.id, charge.balance_transaction

    def book(self, key: str, transaction: str, *entries: Entry, linked: bool = True) -> None:
        """The entries as they come out of a shard."""
        at_us = int(dt.datetime.now(dt.UTC).timestamp() * 1_000_000)
        if self.packed:
            links = [BalanceLink(transaction, entry.entry_id) for entry in entries] if linked else []
            self.history.entries += coded_rows(self.history.commit(), key, list(entries), links, at_us)
            return
        for entry in entries:
            lsn = self.history.commit()
            row = entry_row(lsn, key, entry, at_us)
            self.history.entries.append(row)
            if linked:
                self.history.links.append(LinkRow(lsn, 0, row.slot, key, entry.entry_id, transaction, at_us))

    async def paid(self, amount: int, currency: str = "usd", card: str = "pm_card_visa") -> tuple[str, Any]:
        """A charge that is booked as it should be."""
        key, charge, transaction = await self.charge(amount, currency, card)
        entries = [paid_entry(amount, currency, charge)]
        if transaction.currency != currency:
            entries += exchange_entries(transaction.id, currency, amount, transaction.currency, transaction.amount)
        entries.append(stripe_fee_entry(transaction.currency, transaction.id, transaction.fee))
        self.book(key, transaction.id, *entries)
        return key, transaction


def paid_entry(amount: int, currency: str, charge: str) -> Entry:
    postings = (Posting("stripe:clearing", amount), Posting("seller:ann:payable", -amount, "ann"))
    return Entry(f"payment:{charge}", "payment", currency, charge, postings)


@pytest.fixture(params=["packed", "apart"])
async def shop(stand_in: StandIn, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    """Its entries are in rows with their links and fees, or, as earlier versions had them, each by itself."""
    async with stripe_client(stand_in.url) as client:
        yield Shop(client, packed=request.param == "packed")


async def reconciled(
    shop: Shop, stand_in: StandIn, dsn: str, grace: dt.timedelta = dt.timedelta(0), tipalti: TipaltiClient | None = None
) -> tuple[Found, Run]:
    """What a run finds, as {(kind, transaction or entry): row}."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("truncate oncepay.reconciliations, oncepay.reconciliation_differences, oncepay.stripe_transactions")
    await apply.apply(connection, shop.history.whole())

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[asyncpg.Connection]:
        each = await asyncpg.connect(dsn)
        try:
            yield each
        finally:
            await each.close()

    first = shop.began.replace(microsecond=0)
    last = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
    await connection.execute(SQL["begin"], "rec", first, last, "test")
    settings = StripeSettings(base_url=stand_in.url, api_key=KEY)
    async with StripeGateway(settings) as stripe:
        books = OnlyTheseRows(shop.intents)
        run = Run("rec", first, last, stripe=stripe, books=books, connect=connect, grace=grace, tipalti=tipalti)
        await run.whole()
    rows = await connection.fetch(SQL["differences"], "rec", 0, 100)
    await connection.close()
    return {(row["kind"], row["transaction"] or row["entry"]): row for row in rows if row["kind"] in KINDS}, run


@REAL
async def test_what_agrees_is_silent_and_each_planted_difference_is_named(
    connection: asyncpg.Connection, aggregator_dsn: str, stand_in: StandIn, shop: Shop
) -> None:
    for amount in (1000, 2599, 77_700):
        await shop.paid(amount)
    await shop.paid(5000, "eur")
    settled = (await shop.paid(5000, "eur"))[1]
    assert settled.currency == "usd", "the stand-in settles in another currency"

    wanted: dict[tuple[str, str], tuple[int | None, int | None]] = {}
    # A charge that no row names, and one whose payment's open work stopped.
    _, _, nobody = await shop.charge(1234)
    shop.intents.popitem()
    wanted["money_without_row", nobody.id] = (nobody.net, 0)
    key, charge, forgotten = await shop.charge(4321)
    wanted["unbooked", forgotten.id] = (forgotten.net, 0)
    # A wrong amount, and a fee that was never booked.
    key, charge, short = await shop.charge(900)
    shop.book(key, short.id, paid_entry(800, "usd", charge), stripe_fee_entry("usd", short.id, short.fee))
    wanted["net_differs", short.id] = (short.net, short.net - 100)
    key, charge, feeless = await shop.charge(901)
    shop.book(key, feeless.id, paid_entry(901, "usd", charge))
    wanted["net_differs", feeless.id] = (feeless.net, 901)
    # An exchange of which one side is missing.
    key, charge, half = await shop.charge(700, "eur")
    shop.book(key, half.id, paid_entry(700, "eur", charge))
    wanted["net_differs", half.id] = (half.net, 0)
    # Two payments for one transaction.
    key, twice = await shop.paid(650)
    shop.book("key-other", twice.id, *zero("other"))
    wanted["of_several", twice.id] = (None, None)
    # An entry without a transaction, one with two, and one whose transaction isn't Stripe's.
    shop.book("key-alone", "", paid_entry(55, "usd", "ch_alone"), linked=False)
    wanted["unlinked", "payment:ch_alone"] = (0, 55)
    (doubled,) = zero("doubled")
    shop.book(key, twice.id, doubled)
    shop.history.links.append(LinkRow(shop.history.lsn, 0, 0, key, doubled.entry_id, settled.id, 0))
    wanted["linked_twice", doubled.entry_id] = (None, None)
    wanted["of_several", settled.id] = (None, None)
    shop.book("key-odd", "txn_odd", paid_entry(66, "usd", "ch_odd"))
    wanted["not_at_stripe", "txn_odd"] = (None, None)

    found, run = await reconciled(shop, stand_in, aggregator_dsn)
    shown = {name: (row["expected_minor"], row["actual_minor"]) for name, row in found.items()}
    for name in [name for name in shown if name[0] == "net_differs" and name[1] == half.id]:
        assert shown.pop(name) in {(0, 700), (half.net, 0)}, "euros are left over and dollars are missing"
    wanted.pop(("net_differs", half.id))
    assert shown == wanted
    assert found["money_without_row", nobody.id]["detail"].endswith("no row names it")
    assert found["unbooked", forgotten.id]["key"].startswith("key-pi_")
    assert run.checked["transactions"] == 11


def zero(name: str) -> tuple[Entry]:
    """An entry that comes to nothing on the clearing account."""
    postings = (Posting("stripe:clearing", 1), Posting("stripe:clearing", -1))
    return (Entry(name, "fx", "usd", name, postings),)


@REAL
async def test_what_is_younger_than_the_grace_is_no_difference_yet(
    connection: asyncpg.Connection, aggregator_dsn: str, stand_in: StandIn, shop: Shop
) -> None:
    await shop.charge(1234)
    shop.book("key-alone", "", paid_entry(55, "usd", "ch_alone"), linked=False)
    assert (await reconciled(shop, stand_in, aggregator_dsn, dt.timedelta(hours=1)))[0] == {}
    assert len((await reconciled(shop, stand_in, aggregator_dsn))[0]) == 2


@REAL
async def test_that_tipalti_gives_no_answer_hides_nothing_of_stripes(
    monkeypatch: pytest.MonkeyPatch, connection: asyncpg.Connection, aggregator_dsn: str, stand_in: StandIn, shop: Shop
) -> None:
    """And the run isn't one that failed, which would be made again and again."""
    monkeypatch.setattr("oncepay.tipalti_client.PAUSE_S", 0.0)
    _, _, nobody = await shop.charge(1234)
    shop.intents.popitem()
    async with TipaltiClient(TipaltiSettings(base_url="http://127.0.0.1:9", refresh_token="rt")) as tipalti:
        found, _ = await reconciled(shop, stand_in, aggregator_dsn, tipalti=tipalti)
        assert set(found) == {("money_without_row", nobody.id), ("tipalti_not_compared", None)}

        async def away(_: TipaltiRun) -> None:
            raise ShardUnavailable("a shard that was asked for a payout")

        monkeypatch.setattr(TipaltiRun, "whole", away)
        found, _ = await reconciled(shop, stand_in, aggregator_dsn, tipalti=tipalti)
        assert [row["detail"] for row in found.values() if row["kind"] == "tipalti_not_compared"] == [
            "a shard that was asked for a payout"
        ]


@REAL
async def test_a_payout_to_the_bank_that_failed_after_the_period(
    monkeypatch: pytest.MonkeyPatch, connection: asyncpg.Connection, aggregator_dsn: str, stand_in: StandIn, shop: Shop
) -> None:
    """What brought it back isn't in the period's list; it is looked up."""
    await shop.paid(77_700, card="pm_card_bypassPending")
    params: Any = {"amount": 5_000, "currency": "usd", "destination": "ba_sandbox_no_account"}
    payout = await shop.client.v1.payouts.create_async(params)
    transaction = str(payout.balance_transaction)
    shop.book(transaction_key(transaction), transaction, *transaction_entries(transaction, "usd", -5_000, 0, bank=True))
    for seconds in (11, 86_401):
        stand_in.advance(seconds)
    failed = (await event_of(shop.client, "payout.failed", payout.id)).data.object["failure_balance_transaction"]
    found, run = await reconciled(shop, stand_in, aggregator_dsn)
    assert (found, run.checked["bank_payouts"], run.checked["looked_up"]) == ({}, 1, 1)

    async def refused(*_: object) -> None:
        raise StripeRefused(ErrorObject("invalid_request_error", "resource_missing"))

    monkeypatch.setattr(StripeGateway, "balance_transaction", refused)
    found, _ = await reconciled(shop, stand_in, aggregator_dsn)
    assert set(found) == {("bank_payout", failed)}


@pytest.mark.parametrize(
    ("now", "done_to", "hour", "is_due"),
    [
        ("2026-11-05T03:59", None, 4, False),
        ("2026-11-05T04:00", None, 4, True),
        ("2026-11-05T23:00", "2026-11-05T00:00", 4, False),
        ("2026-11-05T05:00", "2026-11-04T00:00", 4, True),
        ("2026-11-05T05:00", None, -1, False),
    ],
)
def test_the_daily_run_is_due_once_a_day(now: str, done_to: str | None, hour: int, is_due: bool) -> None:
    moment: Callable[[str], dt.datetime] = lambda text: dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)  # noqa: E731
    assert due(moment(now), moment(done_to) if done_to else None, hour) is is_due


@pytest.mark.parametrize(
    ("done_to", "days", "first"),
    [
        (None, 3, "2026-11-02T00:00"),
        ("2026-11-04T00:00", 3, "2026-11-02T00:00"),
        ("2026-10-20T00:00", 3, "2026-10-20T00:00"),
        ("2025-01-01T00:00", 3, "2025-10-01T00:00"),
        (None, 500, "2025-10-01T00:00"),
    ],
)
def test_no_day_is_left_out_between_daily_runs(done_to: str | None, days: int, first: str) -> None:
    moment: Callable[[str], dt.datetime] = lambda text: dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)  # noqa: E731
    until = moment("2026-11-05T00:00")
    assert daily_first(until, moment(done_to) if done_to else None, days) == moment(first)


def test_spans_cover_the_period_once() -> None:
    first = dt.datetime(2026, 10, 1, tzinfo=dt.UTC)
    for length in (dt.timedelta(seconds=1), dt.timedelta(seconds=7), dt.timedelta(days=31), dt.timedelta(days=400)):
        found = list(spans(first, first + length, dt.timedelta(days=1)))
        assert (found[0][0], found[-1][1]) == (first, first + length)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
        assert all(end - start <= dt.timedelta(days=1) for start, end in found)
