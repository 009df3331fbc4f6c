"""The checker's own rules against the project's, and when it is sure."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import fold as project_fold
from loadtest.checker import books, charges, derived
from loadtest.checker.books import Books
from loadtest.checker.looks import Looks
from loadtest.checker.model import (
    Derived,
    Difference,
    Entry,
    Findings,
    Intent,
    Link,
    Payment,
    Shard,
    ShardTarget,
    Share,
    State,
    Stripe,
    Target,
    Transaction,
    silent,
)
from oncepay import cart, money
from oncepay.entry_rows import entries_of
from tests.aggregator.strategies import History, histories

TARGET = Target((ShardTarget("s0", ""), ShardTarget("s1", "")), "", "", "", wait_s=0, grace_s=60)
NOW = 1_790_000_000
SHARES = (Share("ann", 1000, 130), Share("bob", 500, 80))


def slot(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big") >> 240


def payment(key: str = "k", **changes: Any) -> Payment:
    made = Payment(
        "s0", slot(key), key, "succeeded", 5, "b", "usd", 1500, 1500, 0, f"pi_{key}", f"ch_{key}", True, False, SHARES,
        tuple(share._replace(fee=0) for share in SHARES),
    )  # fmt: skip
    return made._replace(**changes)


def paid_entry(key: str = "k", **changes: Any) -> Entry:
    accounts = ("stripe:clearing", "seller:ann:payable", "platform:fees", "seller:bob:payable", "platform:fees")
    made = Entry(
        "s0", slot(key), key, f"payment:ch_{key}", "payment", "usd", f"ch_{key}", accounts, (1500, -870, -130, -420, -80),
        ("", "ann", "ann", "bob", "bob"), NOW * 1_000_000,
    )  # fmt: skip
    return made._replace(**changes)


def fee_entry(key: str = "k") -> Entry:
    accounts, amounts = ("stripe:fees", "stripe:clearing"), (60, -60)
    return paid_entry(key, entry_id=f"fee:{key}", kind="stripe_fee", accounts=accounts, amounts=amounts, sellers=("", ""))


def shards(*payments: Payment, entries: tuple[Entry, ...] = (), links: tuple[Link, ...] = ()) -> list[Shard]:
    """Two shards that share the slots; all of this is where it says."""
    made = [Shard("s0", [(0, 65535)]), Shard("s1", [])]
    made[0].payments[:] = [row for row in payments if row.shard == "s0"]
    made[1].payments[:] = [row for row in payments if row.shard == "s1"]
    made[0].entries[:], made[0].links[:] = entries, links
    return made


def whole() -> tuple[list[Shard], Stripe]:
    """One payment, rightly booked and linked."""
    links = tuple(Link("txn", "k", entry.entry_id) for entry in (paid_entry(), fee_entry()))
    stripe = Stripe(
        [Intent("pi_k", "k", "succeeded", 1500, "ch_k", True)], [Transaction("txn", "charge", "usd", 1440, "ch_k", NOW)]
    )
    stripe.now = NOW + 100
    return shards(payment(), entries=(paid_entry(), fee_entry()), links=links), stripe


def all_checks(made: list[Shard], stripe: Stripe, target: Target = TARGET) -> Findings:
    found = Findings()
    books.check_placement(made, target, found)
    books.check_balanced(Books(made), found)
    charges.check_charges(Books(made), stripe, target, found)
    charges.check_reconciled(Books(made), stripe, target, found)
    return found


def numbers(found: Findings) -> set[int]:
    return {difference.promise for difference in found.differences}


def test_what_is_right_is_right() -> None:
    found = all_checks(*whole())
    assert found.differences == set()
    assert found.waiting == set()


@given(st.text(min_size=1, max_size=50))
def test_slots(key: str) -> None:
    assert books.slot_of(key) == slot(key)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8).filter(any), st.data())
def test_a_part_is_spread_as_the_project_spreads_it(weights: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(weights)))
    assert books.spread(total, weights) == money.allocate(total, weights)


@given(st.integers(1, 1500))
def test_a_part_that_was_captured_is_split_as_the_project_splits_it(captured: int) -> None:
    project = cart.shares_of_part(tuple(cart.Share(*share) for share in SHARES), captured)
    expected = {share.seller: (share.gross, share.fee) for share in project}
    assert books._expected(payment(captured=captured)) == expected


@given(histories())
def test_both_folds_agree(history: History) -> None:
    entries = [
        Entry(
            *("s0", row.slot, row.key, read.entry_id, read.kind, read.currency, read.source),
            *(read.accounts, read.amounts, read.sellers, row.created_at_us),
        )
        for row in history.entries
        for read in entries_of(row.stored)
    ]
    days, accounts, kinds = derived.fold(entries)
    theirs = project_fold.fold(history.entries)
    epoch = dataclasses.replace(theirs).seller_days
    assert {(seller, currency, project_day(day)): tuple(row) for (seller, currency, day), row in days.items()} == {
        name: (row.payments, row.gross, row.refunded, row.disputed, row.fees, row.net) for name, row in epoch.items()
    }
    assert accounts == {name: (total.debit, total.credit) for name, total in theirs.accounts.items()}
    assert kinds == {name: (total.entries, total.amount) for name, total in theirs.kinds.items()}


def project_day(day: int) -> object:
    return project_fold.day_of(day * derived.DAY_US)


def test_a_copy_is_allowed_in_slots_that_are_moved() -> None:
    made, stripe = whole()
    made[1].payments.append(payment(shard="s1"))
    assert numbers(all_checks(made, stripe)) == {1}
    moving = all_checks(made, stripe, dataclasses.replace(TARGET, moving=((0, 65535),)))
    assert numbers(moving) == set()
    assert moving.checked["copies"] == 1


def test_a_row_that_only_a_shard_has_that_does_not_own_it() -> None:
    found = all_checks(shards(payment(shard="s1", status="created", intent="", captured=0)), Stripe())
    assert {(each.promise, each.key) for each in found.differences} == {(1, "k")}


@pytest.mark.parametrize(
    ("change", "promises"),
    [
        ({"status": "canceled"}, {4, 5}), ({"status": "confirming"}, {5}), ({"captured": 1499}, {4, 5}),
        ({"charge": "ch_x"}, {4, 5}),
        ({"intent": ""}, {3, 4}), ({"intent": "pi_other"}, {3, 4}), ({"amount": 1501}, {5}), ({"slot": 1}, {1}),
        ({"shares": (Share("ann", 1000, 130), Share("bob", 500, 81))}, {5}),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong(change: dict[str, Any], promises: set[int]) -> None:
    made, stripe = whole()
    made[0].payments[:] = [payment(**change)]
    found = all_checks(made, stripe)
    assert numbers(found) == promises
    assert all(difference.key in ("k", "pi_k") for difference in found.differences)


@pytest.mark.parametrize(
    ("status", "attempted", "promises"), [("requires_payment_method", False, set()), ("processing", True, {1, 3})]
)
def test_an_intent_that_no_row_names(status: str, attempted: bool, promises: set[int]) -> None:
    made, stripe = whole()
    stripe.intents.append(Intent("pi_2", "k", status, 0, "", attempted))
    found = all_checks(made, stripe)
    assert numbers(found) == promises
    assert found.checked["orphans"] == (not attempted)


def test_two_rows_that_name_one_intent() -> None:
    made, stripe = whole()
    made[0].payments.append(payment("other", intent="pi_k", status="canceled", captured=0))
    assert (1, "other") in {(found.promise, found.key) for found in all_checks(made, stripe).differences}


@pytest.mark.parametrize(("net", "currency"), [(1439, "usd"), (1440, "eur")])
def test_another_net(net: int, currency: str) -> None:
    made, stripe = whole()
    stripe.transactions[0] = stripe.transactions[0]._replace(net=net, currency=currency)
    assert {(found.promise, found.key) for found in all_checks(made, stripe).differences} == {(7, "k")}


def test_a_settlement_in_another_currency_matches_in_each() -> None:
    made, stripe = whole()
    none = ("", "")
    fx = [
        paid_entry(entry_id="out", kind="fx", accounts=("fx:usd", "stripe:clearing"), amounts=(1500, -1500), sellers=none),
        paid_entry(entry_id="in", kind="fx", accounts=("stripe:clearing", "fx:eur"), amounts=(1300, -1300), sellers=none),
    ]
    fx[1] = fx[1]._replace(currency="eur")
    fee = fee_entry()._replace(currency="eur")
    made[0].entries[:] = [paid_entry(), *fx, fee]
    made[0].links[:] = [Link("txn", "k", entry.entry_id) for entry in made[0].entries]
    stripe.transactions[0] = stripe.transactions[0]._replace(net=1240, currency="eur")
    assert all_checks(made, stripe).differences == set()


def test_what_stripe_posts_late_is_awaited() -> None:
    made, stripe = whole()
    made[0].links.clear()
    stripe.now = NOW + 59
    young = all_checks(made, stripe)
    assert (young.differences, len(young.waiting)) == (set(), 3)
    stripe.now = NOW + 60
    assert numbers(all_checks(made, stripe)) == {7}


def test_an_entry_linked_twice() -> None:
    made, stripe = whole()
    stripe.transactions.append(Transaction("txn_2", "charge", "usd", -60, "", NOW))
    made[0].links.append(Link("txn_2", "k", "fee:k"))
    assert numbers(all_checks(made, stripe)) == {7}


def held(made: list[Shard]) -> Derived:
    row = made[0].payments[0]
    state = State(row.slot, row.status, row.version, row.buyer, row.currency, row.amount, row.captured, row.refunded, row.intent)
    days, accounts, kinds = derived.fold(made[0].entries)
    return Derived({"s0": 10, "s1": 10}, {row.key: state}, list(made[0].entries), set(made[0].links), days, accounts, kinds)


def test_what_the_aggregator_lacks_is_awaited_while_its_feed_is_behind() -> None:
    made, _ = whole()
    lacking = held(made)
    lacking.entries.pop()
    lacking.links.clear()
    for position, waits in ((11, True), (10, False)):
        made[0].position = position
        found = Findings()
        derived.check_derived(Books(made), dataclasses.replace(lacking), found)
        assert (6, "k") in {(each.promise, each.key) for each in found.differences} or waits
        assert found.lagging == ({"k"} if waits else set())
    clean = Findings()
    derived.check_derived(Books(made), held(made), clean)
    assert (clean.differences, clean.waiting) == (set(), set())


class Scripted(Looks):
    """Looks that find what a script says; the last of it again and again."""

    def __init__(self, *script: Findings, wait_s: float = 0.0) -> None:
        super().__init__(dataclasses.replace(TARGET, wait_s=wait_s), time.monotonic() + wait_s, silent)
        self.script: Iterator[Findings] = iter(script)
        self.latest = script[-1]
        self.count = 0
        self._moved = {shard.name: (0, time.monotonic()) for shard in TARGET.shards}

    async def _look(self) -> tuple[Findings, int]:
        self.count += 1
        self.latest = next(self.script, self.latest)
        return self.latest, 0


def differing(*keys: str, waiting: tuple[str, ...] = ()) -> Findings:
    found = Findings(waiting=set(waiting))
    for key in keys:
        found.differ(3, key, "what", "advice")
    return found


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.checker.looks.PAUSE_S", 0.0)


async def test_nothing_differs_and_one_look_is_enough() -> None:
    looks = Scripted(differing())
    assert (await looks.until_sure()).ok
    assert looks.count == 1


async def test_what_was_only_on_its_way_is_no_difference() -> None:
    report = await Scripted(differing("a", "b"), differing("b"), wait_s=30).until_sure()
    assert {found.key for found in report.differences} == {"b"}
    assert (await Scripted(differing("a"), differing()).until_sure()).ok


async def test_what_differs_twice_is_a_difference() -> None:
    looks = Scripted(differing("a"))
    assert [found.key for found in (await looks.until_sure()).differences] == ["a"]
    assert looks.count == 2


async def test_it_waits_for_what_may_still_come_and_names_what_did_not() -> None:
    looks = Scripted(differing(waiting=("x",)), differing(waiting=("x",)), differing(), wait_s=30)
    assert (await looks.until_sure()).ok
    assert looks.count == 3
    late = Scripted(differing("a", waiting=("x",)), wait_s=0.05)
    report = await late.until_sure()
    assert [found.key for found in report.differences] == ["a"]
    assert report.checked["awaited"] == 1


class Late(Scripted):
    """What is awaited turns out to be missing just when the time is over."""

    async def _look(self) -> tuple[Findings, int]:
        self.count += 1
        over = time.monotonic() >= self._deadline
        return (differing("late") if over else differing(waiting=("late",))), 0


async def test_what_comes_up_only_at_the_end_is_looked_at_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.checker.looks.PAUSE_S", 0.02)
    report = await Late(differing(), wait_s=0.05).until_sure()
    assert {found.key for found in report.differences} == {"late"}


async def test_a_feed_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.checker.looks.STILL_S", 0.0)
    report = await Scripted(differing(waiting=("the feed of s1 to bring entry e of k",))).until_sure()
    assert [(found.promise, found.key) for found in report.differences] == [(6, "shard s1")]
    assert isinstance(report.differences[0], Difference)
