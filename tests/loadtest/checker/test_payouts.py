"""The checker's rules for payouts: what is right passes, and each thing that can be wrong is named under its promise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from loadtest.checker import payouts as rules
from loadtest.checker.books import Books, check_balanced
from loadtest.checker.model import (
    Derived,
    Entry,
    Findings,
    Funding,
    PaidOut,
    Payout,
    Shard,
    ShardTarget,
    Target,
    Tipalti,
)
from oncepay.ledger import payout_entry, payout_fee_entry, payout_returned_entry
from oncepay.payout import AT_TIPALTI, GIVEN_BACK, PayoutStatus
from oncepay.payout import ref_code as code_of

NOW = 1_790_000_000
TARGET = Target((ShardTarget("s0", ""),), "", "", "", wait_s=0, grace_s=60)


def slot(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big")


def payout(number: int = 1, **changes: Any) -> Payout:
    key = f"payout:ann:usd:{number}"
    made = Payout("s0", slot(key), key, "ann", "usd", number, "paid", 5, 4_500, code_of(key), 100, "", NOW * 1_000_000)
    return made._replace(**changes)


def entries(row: Payout, *, fee: int = 100, back: bool = False) -> list[Entry]:
    made = [payout_entry(row.seller, row.currency, row.amount, row.ref_code)]
    if fee:
        made.append(payout_fee_entry(row.currency, "pay_1", fee, fee))
    if back:
        made.append(payout_returned_entry(row.seller, row.currency, row.amount, row.ref_code))
    return [
        Entry(
            *("s0", row.slot, row.key, entry.entry_id, entry.kind, entry.currency, entry.source),
            *(tuple(p.account for p in entry.postings), tuple(p.amount_minor for p in entry.postings)),
            *(tuple(p.seller for p in entry.postings), NOW * 1_000_000),
        )
        for entry in made
    ]


def payment(row: Payout, status: str = "Paid", **changes: Any) -> PaidOut:
    made = PaidOut("pay_1", row.ref_code, status, "usd", row.amount, "usd", row.fee, NOW, NOW)
    return made._replace(**changes)


def funding_entry(amount: int = 4_600, currency: str = "usd") -> Entry:
    key = "tipalti:fund_1"
    return Entry(
        *("s0", slot(key), key, "funding", "funding", currency, "fund_1", ("tipalti:clearing", "bank")),
        *((amount, -amount), ("", ""), NOW * 1_000_000),
    )


class Case:
    """A payout that was paid, funded and booked rightly; tests change what they like."""

    def __init__(self) -> None:
        self.row = payout()
        self.payouts = [self.row]
        self.entries = [*entries(self.row), funding_entry()]
        self.tipalti = Tipalti([payment(self.row)], [Funding("fund_1", "usd", 4_600, NOW)], NOW + 1_000)
        self.derived = Derived(positions={"s0": 10}, payouts={self.row.key: ("paid", 5, 4_500)})

    def check(self) -> Findings:
        shard = Shard("s0", [(0, 65_535)], position=1)
        shard.payouts, shard.entries = self.payouts, self.entries
        found, books = Findings(), Books([shard])
        held = rules.collect([shard])
        check_balanced(books, found)
        rules.check_payouts(books, held, TARGET, found)
        rules.check_tipalti(books, held, self.tipalti, TARGET, found)
        rules.check_derived_payouts(books, held, self.derived, found)
        return found

    def become(self, **changes: Any) -> None:
        """The row in another state, in the shard and in the aggregator."""
        self.row = self.row._replace(**changes)
        self.payouts = [self.row]
        self.derived.payouts = {self.row.key: (self.row.status, self.row.version, self.row.amount)}


def numbers(found: Findings) -> set[int]:
    return {difference.promise for difference in found.differences}


def test_what_is_right_is_right() -> None:
    found = Case().check()
    assert found.differences == set()
    assert found.waiting == set()
    assert (found.checked["payouts"], found.checked["tipalti_payments"], found.checked["tipalti_fundings"]) == (1, 1, 1)


@pytest.mark.parametrize("word", sorted(AT_TIPALTI))
def test_each_state_of_tipaltis_has_its_postings(word: str) -> None:
    case = Case()
    status = AT_TIPALTI[word]
    case.become(status=status.value)
    case.tipalti.payments = [payment(case.row, word.title())]
    case.entries = [*entries(case.row, back=status in GIVEN_BACK), funding_entry()]
    assert case.check().differences == set()
    assert (word in rules.BACK_AT_TIPALTI) == (status in GIVEN_BACK)


def test_the_checker_knows_the_states() -> None:
    assert {status.value for status in GIVEN_BACK} == rules.GIVEN_BACK
    assert {status.value for status in PayoutStatus} >= rules.UNTOLD


def test_what_tipalti_was_not_told_of_is_no_difference() -> None:
    for status, back in (
        ("created", False),
        ("awaiting_approval", False),
        ("submitting", False),
        ("declined", True),
        ("refused", True),
    ):
        case = Case()
        case.become(status=status, fee=0)
        case.tipalti.payments = []
        case.entries = [*entries(case.row, fee=0, back=back), funding_entry()]
        assert case.check().differences == set(), status


def _double(case: Case) -> None:
    case.entries += [case.entries[0]._replace(entry_id="payout again")]


def _unbooked_return(case: Case) -> None:
    case.become(status="returned")


def _gap(case: Case) -> None:
    case.payouts = [case.row, payout(3, status="declined", fee=0)]
    case.entries += entries(case.payouts[1], fee=0, back=True)
    case.derived.payouts[case.payouts[1].key] = ("declined", 5, 4_500)


def _wrong_slot(case: Case) -> None:
    case.payouts = [case.row._replace(slot=case.row.slot ^ 1)]


def _no_row(case: Case) -> None:
    case.tipalti.payments.append(payment(case.row, id="pay_2", ref_code="op-unknown"))


def _other_amount(case: Case) -> None:
    case.tipalti.payments = [payment(case.row, amount=4_501)]


def _fee_not_booked(case: Case) -> None:
    case.tipalti.payments = [payment(case.row, fee=200)]


def _returned_at_tipalti_only(case: Case) -> None:
    case.tipalti.payments = [payment(case.row, "Rejected")]


def _paid_here_only(case: Case) -> None:
    case.tipalti.payments = []


def _paid_after_it_was_declined(case: Case) -> None:
    case.become(status="declined", fee=0)
    case.entries = [*entries(case.row, fee=0, back=True), funding_entry()]
    case.tipalti.payments = [payment(case.row, fee=0)]


def _funding_not_booked(case: Case) -> None:
    case.tipalti.fundings.append(Funding("fund_2", "usd", 10, NOW))


def _funding_of_another_amount(case: Case) -> None:
    case.entries[-1] = funding_entry(4_601)


def _funding_invented(case: Case) -> None:
    case.tipalti.fundings.clear()


def _posting_of_nobody(case: Case) -> None:
    case.entries.append(funding_entry()._replace(key="other", slot=slot("other")))


def _derived_missing(case: Case) -> None:
    case.derived.payouts.clear()


def _derived_other(case: Case) -> None:
    case.derived.payouts[case.row.key] = ("cleared", 5, 4_500)


def _derived_invented(case: Case) -> None:
    case.derived.payouts["payout:bob:usd:1"] = ("paid", 1, 1)


@pytest.mark.parametrize(
    ("plant", "promise"),
    [
        *(
            (_double, 5),
            (_unbooked_return, 5),
            (_gap, 1),
            (_wrong_slot, 1),
            (_no_row, 7),
            (_other_amount, 7),
            (_fee_not_booked, 7),
        ),
        *((_returned_at_tipalti_only, 7), (_paid_here_only, 7), (_paid_after_it_was_declined, 7), (_funding_not_booked, 7)),
        *((_fee_not_booked, 7), (_funding_of_another_amount, 7), (_funding_invented, 7), (_posting_of_nobody, 7)),
        *((_derived_missing, 6), (_derived_other, 6), (_derived_invented, 6)),
    ],
)
def test_what_is_wrong_is_named(plant: Callable[[Case], None], promise: int) -> None:
    case = Case()
    plant(case)
    found = case.check()
    assert promise in numbers(found)
    assert all(difference.what and difference.advice for difference in found.differences)


def test_what_tipalti_has_just_changed_may_still_come() -> None:
    case = Case()
    case.tipalti.payments = [payment(case.row, fee=200, changed=NOW + 990)]
    case.tipalti.fundings.append(Funding("fund_2", "usd", 10, NOW + 990))
    found = case.check()
    assert found.differences == set()
    assert len(found.waiting) == 2


def test_a_feed_that_is_behind_may_still_bring_it() -> None:
    case = Case()
    case.derived.payouts.clear()
    case.derived.positions["s0"] = 0
    found = case.check()
    assert found.differences == set()
    assert found.lagging == {case.row.key}
