"""The payout's transition function: properties over all histories, and the cases that are easy to get wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.errors import Forbidden, InvalidKey, OncepayError, WrongState
from oncepay.events import Contradiction
from oncepay.keys import payout_key
from oncepay.ledger import TIPALTI_CLEARING, Entry, payable, payout_entry
from oncepay.payout import (
    AT_TIPALTI,
    GIVEN_BACK,
    OVER,
    PaymentView,
    Payout,
    PayoutStatus,
    new_payout,
    parse_key,
    ref_code,
)
from oncepay.payout_moves import (
    SETTLE_MS,
    Approved,
    BookedByHand,
    Declined,
    PaymentSeen,
    PayoutEvent,
    SubmissionRefused,
    SubmissionStarted,
    is_final,
    move,
)

AMOUNT, FEE = 4_200, 100
SELLER = "records-4"
ACCOUNT = payable(SELLER)
FINAL = [word for word, status in AT_TIPALTI.items() if status in OVER]
PASSING = [word for word in AT_TIPALTI if word not in FINAL]


def payout(*, needs_approval: bool = False, sequence: int = 1) -> Payout:
    return new_payout(
        SELLER, "usd", sequence, amount=AMOUNT, payee="p-4", run="r1", created_by="ann", positions={"s0": "0/10"},
        needs_approval=needs_approval, now_ms=1_000,
    )  # fmt: skip


def seen(word: str, *, fee: int = 0, of: Payout | None = None, payment: str = "pay_1") -> PaymentSeen:
    row = of or payout()
    return PaymentSeen(PaymentView(payment, row.ref_code, word, row.amount, row.currency, fee, "usd"))


def first(row: Payout) -> Entry:
    return payout_entry(row.seller, row.currency, row.amount, row.ref_code)


class History:
    """A row and its entries, moved by events; events that are refused change nothing."""

    def __init__(self, row: Payout) -> None:
        self.row = row
        self.entries = [first(row)]

    def add(self, events: Sequence[PayoutEvent]) -> History:
        for event in events:
            try:
                moved = move(self.row, event)
            except OncepayError:
                continue
            self.row = moved.payout
            self.entries += moved.entries
        return self

    @property
    def sums(self) -> Counter[str]:
        sums: Counter[str] = Counter()
        for entry in self.entries:
            for posting in entry.postings:
                sums[posting.account] += posting.amount_minor
        return sums


views = st.builds(
    lambda word, fee: seen(word.title() if len(word) % 2 else word, fee=fee), st.sampled_from(sorted(AT_TIPALTI)),
    st.sampled_from([0, FEE, 2 * FEE]),
)  # fmt: skip
events = st.one_of(
    views,
    st.builds(Approved, st.sampled_from(["ann", "bob"])),
    st.builds(Declined, st.just("bob"), st.just("wrong")),
    st.builds(SubmissionStarted, st.integers(1_000, 10_000_000)),
    st.builds(SubmissionRefused, st.integers(1, 4), st.just("UnknownPayee"), st.just("no"), st.integers(1_000, 10_000_000)),
    st.builds(BookedByHand, st.just("bob"), st.just("wire-1")),
)
histories = st.lists(events, max_size=14)


@given(st.booleans(), histories)
def test_the_money_is_the_sellers_or_tipaltis_never_both(needs_approval: bool, history: list[PayoutEvent]) -> None:
    after = History(payout(needs_approval=needs_approval)).add(history)
    row, sums = after.row, after.sums
    given_back = row.status in GIVEN_BACK
    assert sums[ACCOUNT] == (0 if given_back else AMOUNT)
    by_hand = AMOUNT if row.progress.reference else 0
    assert sums[TIPALTI_CLEARING] == (0 if given_back else -AMOUNT) - row.progress.fee + by_hand
    assert sum(sums.values()) == 0
    names = [entry.entry_id for entry in after.entries]
    assert len(names) == len(set(names)), "each entry is booked once"


@given(histories, histories)
def test_what_is_over_stays(before: list[PayoutEvent], after: list[PayoutEvent]) -> None:
    history = History(payout()).add(before)
    status, moved_back = history.row.status, history.sums[ACCOUNT]
    if status in OVER:
        history.add(after)
        assert (history.row.status, history.sums[ACCOUNT]) == (status, moved_back)


@given(st.sampled_from(FINAL), st.permutations([*PASSING, *PASSING]), st.integers(0, 8), st.integers(1, 3))
def test_final_facts_come_to_the_same_in_any_order_and_number(final: str, words: list[str], at: int, times: int) -> None:
    sent = [SubmissionStarted(2_000)]
    late = History(payout()).add([*sent, *map(seen, words[:at]), *[seen(final)] * times, *map(seen, words[at:]), seen(final)])
    expected = AT_TIPALTI[final]
    if expected is PayoutStatus.REJECTED and "paid" in words[:at]:
        expected = PayoutStatus.RETURNED
    assert late.row.status is expected
    assert late.sums[ACCOUNT] == (AMOUNT if expected is PayoutStatus.CLEARED else 0)


@given(histories)
def test_nothing_is_stopped_here_once_tipalti_may_have_it(history: list[PayoutEvent]) -> None:
    row = History(payout()).add([SubmissionStarted(2_000), *history]).row
    assert row.status not in (PayoutStatus.DECLINED, PayoutStatus.CREATED, PayoutStatus.AWAITING_APPROVAL)
    assert not row.progress.reference


def test_a_refusal_counts_only_when_no_submission_is_unanswered() -> None:
    def refused(number: int, now_ms: int) -> SubmissionRefused:
        return SubmissionRefused(number, "UnknownPayee", "no", now_ms)

    only = History(payout()).add([SubmissionStarted(2_000), refused(1, 2_100)])
    assert only.row.status is PayoutStatus.REFUSED
    lost = History(payout()).add([SubmissionStarted(2_000), SubmissionStarted(5_000), refused(2, 5_100)])
    assert lost.row.status is PayoutStatus.SUBMITTING
    lost.add([refused(2, 2_000 + SETTLE_MS)])
    assert lost.row.status is PayoutStatus.SUBMITTING, "the same answer counts once"
    lost.add([SubmissionStarted(900_000), refused(3, 2_000 + SETTLE_MS - 1)])
    assert lost.row.status is PayoutStatus.SUBMITTING
    settled = lost.add([SubmissionStarted(902_000), refused(4, 2_000 + SETTLE_MS)]).row
    assert settled.status.value == "refused"
    found = History(payout()).add([SubmissionStarted(2_000), SubmissionStarted(5_000), refused(2, 5_100), seen("Scheduled")])
    assert found.row.status is PayoutStatus.SCHEDULED
    late = History(payout()).add([SubmissionStarted(2_000), SubmissionStarted(5_000), refused(1, 5_100)])
    assert (late.row.status, late.row.progress.refusals) == (PayoutStatus.SUBMITTING, 0), "it answers an earlier submission"


def test_a_second_operator_agrees() -> None:
    waits = payout(needs_approval=True)
    assert waits.status is PayoutStatus.AWAITING_APPROVAL
    with pytest.raises(WrongState):
        move(waits, SubmissionStarted(2_000))
    with pytest.raises(WrongState):
        move(waits, BookedByHand("bob", "wire-1"))
    with pytest.raises(Forbidden):
        move(waits, Approved("ann"))
    agreed = move(waits, Approved("bob")).payout
    assert (agreed.status, agreed.progress.approved_by) == (PayoutStatus.CREATED, "bob")
    assert move(agreed, Approved("bob")).payout is agreed
    with pytest.raises(WrongState):
        move(agreed, Approved("carol"))
    assert move(waits, Declined("ann")).payout.status is PayoutStatus.DECLINED


def test_what_cant_be_true_is_said() -> None:
    sent = move(payout(), SubmissionStarted(2_000)).payout
    other_amount = PaymentSeen(PaymentView("pay_1", sent.ref_code, "Paid", AMOUNT + 1, "usd"))
    other_currency = PaymentSeen(PaymentView("pay_1", sent.ref_code, "Paid", AMOUNT, "eur"))
    other_code = PaymentSeen(PaymentView("pay_1", "op-1", "Paid", AMOUNT, "usd"))
    for event in (other_amount, other_currency, other_code, seen("Teleported")):
        with pytest.raises(Contradiction):
            move(sent, event)
    paid = move(sent, seen("Paid")).payout
    with pytest.raises(Contradiction):
        move(paid, seen("Paid", payment="pay_2"))
    cleared = move(paid, seen("Cleared")).payout
    with pytest.raises(Contradiction):
        move(cleared, seen("Rejected"))
    declined = move(payout(), Declined("bob")).payout
    with pytest.raises(Contradiction):
        move(declined, seen("Submitted"))


def test_fees_grow_and_are_booked_by_what_they_grew() -> None:
    history = History(payout()).add([SubmissionStarted(2_000), seen("Paid", fee=100), seen("Paid", fee=100)])
    assert [entry.entry_id for entry in history.entries] == ["payout", "payout_fee:100"]
    history.add([seen("Rejected", fee=200), seen("Rejected", fee=200), seen("Rejected", fee=100)])
    assert [entry.entry_id for entry in history.entries] == ["payout", "payout_fee:100", "payout_returned", "payout_fee:200"]
    assert (history.row.status, history.row.progress.fee) == (PayoutStatus.RETURNED, 200)
    assert history.sums[TIPALTI_CLEARING] == -200


def test_only_what_never_changes_at_tipalti_holds_for_any_version() -> None:
    assert {word for word in AT_TIPALTI if is_final(seen(word))} == set(FINAL)
    assert not is_final(SubmissionStarted(1))


@given(st.text(min_size=1, max_size=64), st.sampled_from(["usd", "eur"]), st.integers(1, 10**9))
def test_keys_name_one_payout_each(seller: str, currency: str, sequence: int) -> None:
    key = payout_key(seller, currency, sequence)
    assert parse_key(key) == (seller, currency, sequence)
    assert len(ref_code(key)) <= 64
    assert ref_code(key) != ref_code(payout_key(seller, currency, sequence + 1))


def test_what_is_no_payouts_key() -> None:
    for text in (
        "order-1",
        "payout:a:usd",
        "payout:a:usd:x",
        "payout:a:usd:01",
        "payout:a:usd:-1",
        "payment:a:usd:1",
        "payout:",
        "payout:a:usd:" + "9" * 5_000,
    ):
        with pytest.raises(InvalidKey):
            parse_key(text)
