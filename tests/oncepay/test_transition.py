"""The one function that moves a payment, over every state and event, and over any order of facts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from oncepay.cart import Item, Share
from oncepay.errors import OncepayError, PredecessorNotOver, WrongState
from oncepay.ledger import STRIPE_CLEARING, BalanceLink, Entry, Posting
from oncepay.payment import TERMINAL, Charge, Failure, IntentView, Key, OnDecline, Payment, Progress, Status, Terms
from oncepay.transition import (
    AttemptDeclined,
    AttemptStarted,
    Contradiction,
    Event,
    GiveUp,
    IntentCreated,
    IntentRefused,
    IntentSeen,
    SuccessorNamed,
    move,
)

SHARES = (Share("a", 3000, 300), Share("b", 1000, 100), Share("platform", 500, 0))
FAILURE = Failure("card_declined", "Your card was declined.", "generic_decline")
PAID = Charge("ch_2", "succeeded", "txn_1", 161, 4339, 4500, "usd")


def payment(status: Status = Status.CREATED, on_decline: OnDecline = "retry", **progress: object) -> Payment:
    """A payment in that state, with an intent where the state has one."""
    terms = Terms(
        items=(Item("a", 3000), Item("b", 1000), Item("platform", 500)), shares=SHARES, api_version="v", on_decline=on_decline
    )
    with_intent = status is not Status.CREATED
    return Payment(
        key=Key("k"),
        status=status,
        version=7,
        buyer="x",
        currency="usd",
        amount=4500,
        terms=terms,
        fingerprint=b"f",
        created_at_ms=1,
        updated_at_ms=1,
        expires_at_ms=10**15,
        intent="pi_1" if with_intent else "",
        amount_captured=4500 if status is Status.SUCCEEDED else 0,
        progress=Progress(**{"charge": "ch_2" if status is Status.SUCCEEDED else "", **progress}),  # type: ignore[arg-type]
    )


def seen(status: str, charge: Charge | None = None, **more: object) -> IntentSeen:
    received = 4500 if status == "succeeded" else 0
    return IntentSeen(IntentView("pi_1", status, received, charge=charge, **more))  # type: ignore[arg-type]


EVENTS: list[Event] = [
    IntentCreated("pi_1", "secret"),
    IntentRefused(FAILURE),
    AttemptStarted(1, "pm_a"),
    AttemptStarted(2, "pm_b"),
    AttemptDeclined(1, "ch_1", FAILURE),
    AttemptDeclined(2, "", FAILURE),
    seen("requires_payment_method"),
    seen("requires_payment_method", Charge("ch_1", "failed"), failure=FAILURE),
    seen("requires_payment_method", failure=FAILURE),
    seen("requires_confirmation"),
    seen("requires_action"),
    seen("processing"),
    seen("requires_capture", Charge("ch_2", "succeeded")),
    seen("succeeded", PAID),
    seen("succeeded", Charge("ch_2", "succeeded")),
    seen("canceled"),
    IntentSeen(IntentView("pi_other", "succeeded", 4500, charge=PAID)),
    GiveUp("requested"),
    GiveUp("declined"),
    GiveUp("expired"),
    SuccessorNamed("k2"),
]


@pytest.mark.parametrize(("status", "event"), list(itertools.product(Status, EVENTS)))
def test_every_state_and_event(status: Status, event: Event) -> None:
    """Whatever comes: terminal stays terminal, entries balance, versions grow by one, refusals are of our family."""
    before = payment(status)
    try:
        moved = move(before, event)
    except (WrongState, Contradiction, PredecessorNotOver):
        return
    after = moved.payment
    assert after is before or after.version == before.version + 1
    if before.terminal:
        assert after.status is before.status
    if after is before:
        assert not moved.entries
    for entry in moved.entries:
        assert sum(posting.amount_minor for posting in entry.postings) == 0
    entered_success = before.status is not Status.SUCCEEDED and after.status is Status.SUCCEEDED
    assert entered_success == any(entry.kind == "payment" for entry in moved.entries)


facts = st.sampled_from(
    [
        seen("succeeded", PAID),
        seen("succeeded", Charge("ch_2", "succeeded")),
        seen("processing"),
        seen("requires_payment_method", Charge("ch_1", "failed"), failure=FAILURE),
        AttemptDeclined(1, "ch_1", FAILURE),
        GiveUp("requested"),
        GiveUp("expired"),
        seen("requires_payment_method"),
    ]
)


@given(st.lists(facts, max_size=8))
def test_success_is_the_end_whatever_comes_before_and_after(noise: list[Event]) -> None:
    """Any order and repetition of facts with one success among them ends in the same row and the same entries."""
    start = payment(Status.CONFIRMING, attempt=1, payment_method="pm_a")
    row, entries, links = start, [], []  # type: ignore[var-annotated]
    for event in [*noise, seen("succeeded", PAID), *noise, seen("succeeded", PAID)]:
        try:
            moved = move(row, event)
        except WrongState:
            continue
        row = moved.payment
        entries += moved.entries
        links += moved.links
    assert row.status is Status.SUCCEEDED
    assert row.progress.stripe_fee == 161
    assert sorted(entry.entry_id for entry in entries) == ["payment", "stripe_fee:txn_1"]
    assert set(links) == {BalanceLink("txn_1", "payment"), BalanceLink("txn_1", "stripe_fee:txn_1")}
    net = sum(p.amount_minor for entry in entries for p in entry.postings if p.account == STRIPE_CLEARING)
    assert net == PAID.net


@given(st.permutations([seen("canceled"), GiveUp("requested"), seen("requires_payment_method"), seen("canceled")]))
def test_cancel_is_the_end_in_any_order(events: list[Event]) -> None:
    row = payment(Status.ATTEMPTED)
    for event in events:
        row = move(row, event).payment
    assert row.status is Status.CANCELED


def test_a_late_decline_never_touches_a_later_attempt() -> None:
    row = payment(Status.CONFIRMING, attempt=1, payment_method="pm_a")
    row = move(row, AttemptDeclined(1, "ch_1", FAILURE)).payment
    assert row.status is Status.REQUIRES_PAYMENT_METHOD
    row = move(row, AttemptStarted(2, "pm_b")).payment
    for late in (
        AttemptDeclined(1, "ch_1", FAILURE),
        seen("requires_payment_method", Charge("ch_1", "failed"), failure=FAILURE),
    ):
        assert move(row, late).payment is row, late
    assert row.status is Status.CONFIRMING
    assert row.progress.attempt == 2


def test_a_decline_without_a_charge_of_its_own_ends_the_attempt() -> None:
    """Stripe then shows the charge of the attempt before (off session, `authentication_required` makes none)."""
    row = payment(Status.CONFIRMING, attempt=2, payment_method="pm_b", finished_charges=("ch_1",))
    row = move(row, AttemptDeclined(2, "ch_1", FAILURE)).payment
    assert (row.status, row.progress.finished_charges) == (Status.REQUIRES_PAYMENT_METHOD, ("ch_1",))


@pytest.mark.parametrize("status", [Status.REQUIRES_ACTION, Status.PROCESSING])
@pytest.mark.parametrize("charge", [None, Charge("ch_1", "failed"), Charge("ch_2", "failed")])
@pytest.mark.parametrize("failure", [None, FAILURE])
def test_what_was_under_way_and_needs_a_payment_method_again_is_over(
    status: Status, charge: Charge | None, failure: Failure | None
) -> None:
    """The buyer failed to authenticate after an earlier card was declined: the latest charge is still the earlier one."""
    row = payment(status, attempt=2, payment_method="pm_b", finished_charges=("ch_1",))
    after = move(row, seen("requires_payment_method", charge, failure=failure)).payment
    assert after.status is Status.REQUIRES_PAYMENT_METHOD
    assert after.progress.failure is not None
    assert move(after, AttemptStarted(3, "pm_c")).payment.status is Status.CONFIRMING


@pytest.mark.parametrize("status", [Status.REQUIRES_ACTION, Status.PROCESSING])
def test_a_late_answer_does_not_end_what_the_browser_began_since(status: Status) -> None:
    """Attempt 1 was declined, its answer was slow; meanwhile the browser tried a card, and a look showed that."""
    row = payment(status, attempt=1, payment_method="pm_a")
    assert move(row, AttemptDeclined(1, "ch_1", FAILURE)).payment is row


def test_a_second_attempt_waits_for_the_first_to_be_over() -> None:
    row = payment(Status.CONFIRMING, attempt=1, payment_method="pm_a")
    with pytest.raises(WrongState):
        move(row, AttemptStarted(2, "pm_b"))
    assert move(row, AttemptStarted(1, "pm_a")).payment is row


def test_giving_up_refuses_confirming_from_then_on() -> None:
    row = move(payment(Status.ATTEMPTED), GiveUp("requested")).payment
    assert row.status is Status.CANCELING
    with pytest.raises(WrongState):
        move(row, AttemptStarted(1, "pm_a"))
    assert move(row, seen("processing")).payment is row
    assert move(row, seen("succeeded", PAID)).payment.status is Status.SUCCEEDED


def test_an_intent_that_comes_too_late_is_an_orphan() -> None:
    row = move(payment(Status.CREATED), GiveUp("requested")).payment
    assert row.status is Status.CANCELED
    assert move(row, IntentCreated("pi_1", "s")).payment is row
    assert not row.intent


@pytest.mark.parametrize(
    ("reason", "failure", "status"),
    [
        ("declined", FAILURE, Status.FAILED),
        ("expired", FAILURE, Status.FAILED),
        ("expired", None, Status.CANCELED),
        ("requested", FAILURE, Status.CANCELED),
    ],
)
def test_what_a_given_up_payment_is_called(reason: str, failure: Failure | None, status: Status) -> None:
    row = payment(Status.REQUIRES_PAYMENT_METHOD, failure=failure)
    row = move(row, GiveUp(reason)).payment  # type: ignore[arg-type]
    assert row.status is Status.CANCELING
    assert move(row, seen("canceled")).payment.status is status


def test_stripe_can_not_take_more_than_was_asked() -> None:
    view = IntentView("pi_1", "succeeded", 4501, charge=PAID)
    with pytest.raises(Contradiction):
        move(payment(Status.CONFIRMING, attempt=1), IntentSeen(view))


@pytest.mark.parametrize(
    ("status", "event"),
    [(Status.CANCELED, seen("succeeded", PAID)), (Status.FAILED, seen("succeeded", PAID)), (Status.SUCCEEDED, seen("canceled"))],
)
def test_what_can_not_be_true_is_said_aloud(status: Status, event: Event) -> None:
    with pytest.raises(Contradiction):
        move(payment(status), event)


def test_a_partial_capture_is_spread_over_the_sellers() -> None:
    view = IntentView("pi_1", "succeeded", 1000, charge=replace(PAID, fee=59, net=941, settled_amount=1000))
    moved = move(payment(Status.REQUIRES_CAPTURE, attempt=1), IntentSeen(view))
    assert moved.payment.amount_captured == 1000
    postings = {(p.account, p.seller): p.amount_minor for p in moved.entries[0].postings}
    assert postings[(STRIPE_CLEARING, "")] == 1000
    assert sum(amount for (_, seller), amount in postings.items() if seller == "a") == -667


def test_another_settlement_currency_balances_in_each() -> None:
    charge = replace(PAID, settled_amount=4100, settled_currency="eur", fee=150, net=3950)
    moved = move(payment(Status.CONFIRMING, attempt=1), seen("succeeded", charge))
    by_currency: dict[str, int] = {}
    for entry in moved.entries:
        for posting in entry.postings:
            if posting.account == STRIPE_CLEARING:
                by_currency[entry.currency] = by_currency.get(entry.currency, 0) + posting.amount_minor
    assert by_currency == {"usd": 0, "eur": 3950}


def test_a_successor_is_named_once_and_only_after_the_end() -> None:
    failed = payment(Status.FAILED)
    named = move(failed, SuccessorNamed("k2")).payment
    assert move(named, SuccessorNamed("k2")).payment is named
    for row, key in ((named, "k3"), (payment(Status.SUCCEEDED), "k2"), (payment(Status.CONFIRMING), "k2")):
        with pytest.raises(PredecessorNotOver):
            move(row, SuccessorNamed(key))


def test_an_entry_that_does_not_balance_can_not_be_made() -> None:
    with pytest.raises(ValueError, match="sums to 1 usd"):
        Entry("e", "payment", "usd", "ch", (Posting("a", 5), Posting("b", -4)))


def test_terminal_states_and_errors_are_what_the_design_says() -> None:
    assert frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED}) == TERMINAL
    assert issubclass(WrongState, OncepayError)
