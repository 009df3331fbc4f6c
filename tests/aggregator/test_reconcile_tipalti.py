"""Tipalti's half of a reconciliation, against the stand-in: what agrees is silent, and each planted difference is named."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import asyncpg
import msgspec
import pytest

from aggregator import apply, queries
from aggregator.reconcile.explain import KINDS
from aggregator.reconcile.tipalti import TipaltiBooks, TipaltiRun
from oncepay.errors import Unavailable
from oncepay.feed import PayoutRow
from oncepay.keys import funding_key, slot
from oncepay.ledger import (
    Entry,
    Posting,
    payout_by_hand_entry,
    payout_entry,
    payout_fee_entry,
    payout_returned_entry,
)
from oncepay.payout import PaymentView, Payout, PayoutProgress, PayoutStatus, new_payout
from oncepay.settings import TipaltiSettings
from oncepay.tipalti_client import BATCH_MAX, Listed, TipaltiClient
from tests.aggregator.database import empty
from tests.aggregator.strategies import History, entry_row
from tests.sandbox.process import StandIn

pytestmark = pytest.mark.cluster

SQL = queries.load("reconcile.sql")
FEE = 100
"""What the stand-in takes for a payment that was paid."""
LATER = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
Found = dict[tuple[str, str], tuple[int | None, int | None]]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    made = StandIn("tipalti").start()
    yield made
    made.stop()


class NobodyThere:
    """No shard books anything, or has a payout that the feed hasn't brought."""

    async def book_funding(self, funding: str, currency: str, amount: int) -> str:
        raise Unavailable("the shard is away")

    async def has_payout(self, ref_code: str) -> bool:
        return False


class Payroll:
    """Payouts at the stand-in, and the rows and entries that the platform would have for them."""

    def __init__(self, stand_in: StandIn, tipalti: TipaltiClient, dsn: str) -> None:
        self.stand_in = stand_in
        self.tipalti = tipalti
        self.dsn = dsn
        self.history = History("s0")
        self.payouts: dict[str, Payout] = {}
        self.began = dt.datetime.now(dt.UTC)

    async def order(self, *sellers: str, told: bool = True, amount: int = 5_000) -> None:
        """A payout of each seller, booked, and told to Tipalti. A word in the name says what becomes of it there."""
        made = []
        for seller in sellers:
            payout = new_payout(
                seller, "usd", 1, amount=amount, payee=seller, run="r", created_by="ann", positions={}, needs_approval=False,
                now_ms=int(dt.datetime.now(dt.UTC).timestamp() * 1000),
            )  # fmt: skip
            made.append(payout)
            self.put(payout)
            self.book(payout.key, payout_entry(seller, "usd", amount, payout.ref_code))
            await self.tipalti.create_payee(seller)
            self.stand_in.control("POST", "payee", {"payee": seller, "payable": True})
        if told:
            for start in range(0, len(made), BATCH_MAX):
                lines = await self.tipalti.submit(made[start : start + BATCH_MAX])
                assert {line.result for line in lines.values()} == {"OK"}

    def put(self, payout: Payout) -> None:
        self.payouts[payout.seller] = payout

    def become(self, seller: str, status: str, *entries: Entry, fee: int = 0, reference: str = "") -> None:
        """What its row comes to, and the entries of that."""
        was = self.payouts[seller]
        progress = PayoutProgress(payment="pay", fee=fee, reference=reference)
        self.put(msgspec.structs.replace(was, status=PayoutStatus(status), version=was.version + 1, progress=progress))
        self.book(was.key, *entries)

    def paid(self, seller: str, status: str = "paid", fee: int = FEE) -> None:
        self.become(seller, status, payout_fee_entry("usd", "pay", fee, fee), fee=fee)

    def returned(self, seller: str, status: str, fee: int = 0) -> None:
        payout = self.payouts[seller]
        entries = [payout_returned_entry(seller, "usd", payout.amount, payout.ref_code)]
        entries += [payout_fee_entry("usd", "pay", fee, fee)] if fee else []
        self.become(seller, status, *entries, fee=fee)

    def book(self, key: str, *entries: Entry) -> None:
        at_us = int(dt.datetime.now(dt.UTC).timestamp() * 1_000_000)
        self.history.entries += [entry_row(self.history.commit(), key, entry, at_us) for entry in entries]

    async def fund(self, amount: int, *, booked: int | None = None) -> str:
        """Money from the bank; its id. It is booked with `amount`, or with `booked` (0: not at all)."""
        funding = str(self.stand_in.control("POST", "funding", {"amount": amount})["id"])
        if booked != 0:
            self.book(funding_key(funding), funding_entry(funding, amount if booked is None else booked))
        return funding

    async def feed(self) -> None:
        rows = tuple(payout_row(self.history.commit(), payout) for payout in self.payouts.values())
        owner = await asyncpg.connect(self.dsn)
        await empty(owner)
        await apply.apply(owner, msgspec.structs.replace(self.history.whole(), payouts=rows))
        await owner.close()

    async def reconciled(self, settled: dt.datetime = LATER, books: TipaltiBooks | None = None) -> tuple[Found, Counter[str]]:
        """What a run finds, as {(kind, payout's or funding's key, or payment): (expected, actual)}."""
        owner = await asyncpg.connect(self.dsn)
        await owner.execute("truncate oncepay.reconciliations, oncepay.reconciliation_differences")
        first, last = self.began - dt.timedelta(seconds=1), dt.datetime.now(dt.UTC) + dt.timedelta(days=2)
        await owner.execute(SQL["begin"], "rec", first, last, "test")

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[asyncpg.Connection]:
            each = await asyncpg.connect(self.dsn.replace("postgres@", "oncepay_aggregator:a@"))
            try:
                yield each
            finally:
                await each.close()

        async def note() -> None:
            pass

        checked: Counter[str] = Counter()
        run = TipaltiRun(
            "rec", first, last, tipalti=self.tipalti, books=books or NobodyThere(), connect=connect, settled=settled,
            checked=checked, note=note,
        )  # fmt: skip
        await run.whole()
        rows = await owner.fetch(SQL["differences"], "rec", 0, 100)
        await owner.close()
        assert {row["kind"] for row in rows} <= set(KINDS)
        found = {(row["kind"], row["key"] or row["transaction"]): (row["expected_minor"], row["actual_minor"]) for row in rows}
        assert len(found) == len(rows), "each is named once"
        return found, checked


def payout_row(lsn: int, payout: Payout) -> PayoutRow:
    return PayoutRow(
        lsn, 0, slot(payout.key), payout.key, payout.seller, payout.currency, payout.sequence, payout.status.value,
        payout.version, payout.amount, payout.payee, payout.ref_code, payout.run, payout.created_by, "{}",
        msgspec.json.encode(payout.progress).decode(), not payout.over, payout.created_at_ms * 1000, payout.updated_at_ms * 1000,
    )  # fmt: skip


def funding_entry(funding: str, amount: int) -> Entry:
    return Entry(f"funding:{funding}", "funding", "usd", funding, (Posting("tipalti:clearing", amount), Posting("bank", -amount)))


@pytest.fixture
async def payroll(connection: asyncpg.Connection, aggregator_dsn: str, stand_in: StandIn) -> AsyncIterator[Payroll]:
    owner = await asyncpg.connect(aggregator_dsn)
    await owner.execute("truncate oncepay.tipalti_payments, oncepay.tipalti_fundings, oncepay.tipalti_reading")
    await owner.close()
    stand_in.control("PUT", "funding", {"automatic": False})
    async with TipaltiClient(TipaltiSettings(base_url=stand_in.url, refresh_token="rt_test_1")) as tipalti:
        made = Payroll(stand_in, tipalti, aggregator_dsn)
        await made.fund(1_000_000)
        yield made


async def test_what_agrees_is_silent_and_each_planted_difference_is_named(stand_in: StandIn, payroll: Payroll) -> None:
    fine = ["fine", "is-rejected", "is-returned", "is-canceled", "in-riskreview"]
    wrong = ["feeless", "kept-rejected", "gone-returned", "otherwise"]
    await payroll.order(*fine, *wrong)
    await payroll.order("never-told", "by-hand", "waits", told=False)
    for seconds in (3, 3, 3_700, 3):
        stand_in.advance(seconds)
    payroll.paid("fine", "cleared")
    payroll.returned("is-rejected", "rejected")
    payroll.returned("is-returned", "returned", fee=2 * FEE)
    payroll.returned("is-canceled", "canceled")
    payroll.paid("in-riskreview")
    payroll.become("by-hand", "cleared", payout_by_hand_entry("usd", 5_000, "wire 7"), reference="wire 7")
    payroll.put(msgspec.structs.replace(payroll.payouts["waits"], status=PayoutStatus.AWAITING_APPROVAL))
    taken_back = await payroll.fund(-300)

    wanted: Found = {}
    key = {seller: payout.key for seller, payout in payroll.payouts.items()}
    payroll.become("feeless", "cleared")
    wanted["payout_net_differs", key["feeless"]] = (-5_000 - FEE, -5_000)
    wanted["payout_net_differs", key["kept-rejected"]] = (0, -5_000)
    payroll.become("gone-returned", "paid", payout_fee_entry("usd", "pay", FEE, FEE), fee=FEE)
    wanted["payout_net_differs", key["gone-returned"]] = (-2 * FEE, -5_000 - FEE)
    payroll.put(msgspec.structs.replace(payroll.payouts["otherwise"], amount=5_001))
    payroll.paid("otherwise")
    wanted["payout_differs", key["otherwise"]] = (None, None)
    payroll.become("never-told", "paid")
    wanted["payout_not_at_tipalti", key["never-told"]] = (0, -5_000)
    # A payment that no payout of ours ordered.
    past = new_payout(
        "past", "usd", 9, amount=777, payee="fine", run="r", created_by="x", positions={}, needs_approval=False, now_ms=0
    )
    (line,) = (await payroll.tipalti.submit([past])).values()
    assert line.paymentId
    wanted["payment_without_payout", line.paymentId] = (-777, 0)
    # Fundings: one that isn't booked, one that is booked otherwise, one that Tipalti doesn't have; and an entry of nothing.
    wanted["funding_not_booked", funding_key(await payroll.fund(40_000, booked=0))] = (40_000, 0)
    wanted["funding_differs", funding_key(await payroll.fund(50_000, booked=50_500))] = (50_000, 50_500)
    payroll.book(funding_key("fnd_none"), funding_entry("fnd_none", 60))
    wanted["funding_not_at_tipalti", funding_key("fnd_none")] = (0, 60)
    payroll.book("payout:nobody:usd:1", payout_entry("nobody", "usd", 70, "op-none"))
    wanted["posted_without_payout", "payout:nobody:usd:1"] = (0, -70)

    await payroll.feed()
    found, checked = await payroll.reconciled()
    assert taken_back
    assert found == wanted
    assert (checked["tipalti_payments"], checked["tipalti_fundings"], checked["payouts_awaiting_approval"]) == (10, 4, 1)


async def test_what_changed_lately_is_no_difference_yet(stand_in: StandIn, payroll: Payroll) -> None:
    await payroll.order("kept-rejected")
    await payroll.order("never-told", told=False)
    payroll.become("never-told", "paid")
    await payroll.fund(40_000, booked=0)
    stand_in.advance(3)
    stand_in.advance(3)
    await payroll.feed()
    assert (await payroll.reconciled(payroll.began - dt.timedelta(seconds=2)))[0] == {}
    assert len((await payroll.reconciled())[0]) == 3


async def test_what_tipalti_was_not_told_yet_is_named_after_an_hour(payroll: Payroll) -> None:
    await payroll.order("new", "old", told=False)
    old = payroll.payouts["old"]
    payroll.put(msgspec.structs.replace(old, updated_at_ms=old.updated_at_ms - 3_700_000))
    await payroll.feed()
    assert set((await payroll.reconciled())[0]) == {("payout_not_at_tipalti", old.key)}


async def test_a_payout_that_changes_meanwhile_is_looked_up_again(
    stand_in: StandIn, payroll: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list shows it scheduled; when rows are compared it was rejected there and given back here."""
    await payroll.order("is-rejected")
    stand_in.advance(3)
    listed = payroll.tipalti.fundings_after

    async def meanwhile(cursor: str = "", limit: int = BATCH_MAX) -> object:
        page = await listed(cursor, limit)
        stand_in.advance(3)
        payroll.returned("is-rejected", "rejected")
        await payroll.feed()
        return page

    async def nothing(_: TipaltiRun) -> None:
        pass

    monkeypatch.setattr(payroll.tipalti, "fundings_after", meanwhile)
    monkeypatch.setattr(TipaltiRun, "_look_again", nothing)
    assert (await payroll.reconciled())[0] == {}


async def test_lists_are_read_on_and_open_payments_looked_up(stand_in: StandIn, payroll: Payroll) -> None:
    sellers = [f"s-{n}-rejected" for n in range(BATCH_MAX + 20)]
    await payroll.order(*sellers, amount=100)
    await payroll.feed()
    found, checked = await payroll.reconciled()
    assert (found, checked["read"], checked["looked_up"]) == ({}, len(sellers) + 1, len(sellers))
    for _ in range(6):  # it does some of what is due at a time
        stand_in.advance(3)
    for seller in sellers:
        payroll.returned(seller, "rejected")
    await payroll.feed()
    found, checked = await payroll.reconciled()
    assert (found, checked["read"], checked["looked_up"]) == ({}, 21, len(sellers) - 20), "a page of both lists was read again"
    found, checked = await payroll.reconciled()
    assert (found, checked["looked_up"]) == ({}, 0), "they are final"

    owner = await asyncpg.connect(payroll.dsn)
    await owner.execute("update oncepay.tipalti_reading set cursor = 'gone'")
    await owner.close()
    found, checked = await payroll.reconciled()
    assert (found, checked["read"]) == ({}, len(sellers) + 1), "a cursor that Tipalti doesn't know: from the beginning"


async def test_a_funding_that_was_not_booked_yet_is_booked(payroll: Payroll) -> None:
    late = await payroll.fund(40_000, booked=0)
    asked = []

    class Shards(NobodyThere):
        async def book_funding(self, funding: str, currency: str, amount: int) -> str:
            asked.append((funding, currency, amount))
            payroll.book(funding_key(funding), funding_entry(funding, amount))
            await payroll.feed()
            return "booked"

    await payroll.feed()
    found, checked = await payroll.reconciled(books=Shards())
    assert (found, asked, checked["booked"]) == ({}, [(late, "usd", 40_000)], 1)


async def test_a_payout_that_tipalti_never_takes_is_named_though_it_is_told_again_and_again(payroll: Payroll) -> None:
    """Each try changes the row."""
    await payroll.order("new", "old", "late", told=False)
    hours_ago_ms = payroll.payouts["old"].created_at_ms - 7_200_000
    for seller, sends, created_at_ms in (("new", 5, 0), ("old", 5, hours_ago_ms), ("late", 1, hours_ago_ms)):
        was = payroll.payouts[seller]
        progress = PayoutProgress(sends=sends)
        payroll.put(
            msgspec.structs.replace(
                was, status=PayoutStatus.SUBMITTING, progress=progress, created_at_ms=created_at_ms or was.created_at_ms
            )
        )
    await payroll.feed()
    assert set((await payroll.reconciled())[0]) == {("payout_not_at_tipalti", payroll.payouts["old"].key)}


async def test_what_is_under_way_is_compared_however_old_it_is(payroll: Payroll) -> None:
    await payroll.order("old", told=False)
    was = payroll.payouts["old"]
    days_ago_ms = was.created_at_ms - 10 * 86_400_000
    payroll.put(msgspec.structs.replace(was, status=PayoutStatus.SUBMITTED, created_at_ms=days_ago_ms, updated_at_ms=days_ago_ms))
    payroll.history.entries = [
        msgspec.structs.replace(row, created_at_us=days_ago_ms * 1000) if row.key == was.key else row
        for row in payroll.history.entries
    ]
    await payroll.feed()
    assert (await payroll.reconciled())[0] == {("payout_not_at_tipalti", was.key): (0, -5_000)}


async def test_a_payment_whose_payout_the_feed_has_not_brought_yet_is_no_difference(payroll: Payroll) -> None:
    await payroll.order("ann-riskreview", "bob-riskreview")
    missing = payroll.payouts.pop("bob-riskreview")
    payroll.history.entries = [row for row in payroll.history.entries if row.key != missing.key]
    await payroll.feed()

    class Shards(NobodyThere):
        async def has_payout(self, ref_code: str) -> bool:
            return ref_code == missing.ref_code

    found, checked = await payroll.reconciled(books=Shards())
    assert (found, checked["payouts_not_fed_yet"]) == ({}, 1)
    assert {kind for kind, _ in (await payroll.reconciled())[0]} == {"payment_without_payout"}


async def test_two_payments_of_one_payout_are_named_while_both_stand(
    stand_in: StandIn, payroll: Payroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in, as Tipalti should, takes no reference code twice: the second payment is shown by what reads the answers."""
    await payroll.order("ann-riskreview")
    second = {"status": "Paid"}
    listed, of = payroll.tipalti.payments_after, payroll.tipalti.payments_of

    def doubled(views: list[PaymentView]) -> list[PaymentView]:
        return views + [msgspec.structs.replace(view, payment=f"{view.payment}-2", status=second["status"]) for view in views]

    async def after(cursor: str = "", limit: int = BATCH_MAX) -> Listed[PaymentView]:
        page = await listed(cursor, limit)
        page.items[:] = doubled(page.items)
        return page

    async def look(ref_codes: Sequence[str]) -> list[PaymentView]:
        return doubled(await of(ref_codes))

    monkeypatch.setattr(payroll.tipalti, "payments_after", after)
    monkeypatch.setattr(payroll.tipalti, "payments_of", look)
    await payroll.feed()
    key = payroll.payouts["ann-riskreview"].key
    assert (await payroll.reconciled())[0] == {("paid_twice", key): (-10_000, -5_000)}
    second["status"] = "Canceled"
    assert (await payroll.reconciled())[0] == {}


async def test_what_can_not_be_read_is_named_and_stops_nothing(payroll: Payroll, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payment without a reference code is one past the platform; one in a currency that isn't known can't be compared."""
    await payroll.order("ann-riskreview")
    read = payroll.tipalti._read
    dollar, other = {"amount": 3, "currency": "USD"}, {"amount": 3, "currency": "XXX"}

    async def odd(call: str, path: str, query: Mapping[str, str]) -> bytes:
        page = json.loads(await read(call, path, query))
        if call == "list":
            page["items"] += [
                {"id": "pay_odd", "refCode": "x", "status": "Paid", "amountSubmitted": other},
                {"id": "pay_past", "refCode": None, "status": "Paid", "amountSubmitted": dollar, "submittedDate": {"odd": 1}},
                7,
            ]
        if call == "fundings":
            page["items"].append({"id": "fund_odd", "amount": other})
        return json.dumps(page).encode()

    monkeypatch.setattr(payroll.tipalti, "_read", odd)
    await payroll.feed()
    found, _ = await payroll.reconciled()
    assert found == {
        ("unreadable", "pay_odd"): (None, None),
        ("unreadable", "?"): (None, None),
        ("unreadable", "fund_odd"): (None, None),
        ("payment_without_payout", "pay_past"): (-300, 0),
    }


async def test_a_list_that_leads_nowhere_ends(payroll: Payroll, monkeypatch: pytest.MonkeyPatch) -> None:
    read = payroll.tipalti._read

    async def leads_on(call: str, path: str, query: Mapping[str, str]) -> bytes:
        page = json.loads(await read(call, path, query))
        page["nextCursor"] = query.get("cursor") or (page["items"][-1]["id"] if page["items"] else "more")
        return json.dumps(page).encode()

    monkeypatch.setattr(payroll.tipalti, "_read", leads_on)
    await payroll.order("ann-riskreview")
    await payroll.feed()
    assert (await asyncio.wait_for(payroll.reconciled(), 20))[0] == {}
