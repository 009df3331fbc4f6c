"""The one function that changes a payout: (row, event) → (row, entries). Pure; the store commits both in one transaction.

Money moves twice at most: away from the seller when the row is made (`payout_entry`), and back once, when it is known that
Tipalti won't pay it or that the bank has returned it. What is over never changes, so repeated and late words do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from oncepay.errors import Forbidden, WrongState
from oncepay.events import Contradiction
from oncepay.ledger import Entry, payout_by_hand_entry, payout_fee_entry, payout_returned_entry
from oncepay.payout import BEFORE_TIPALTI, GIVEN_BACK, PaymentView, Payout, PayoutStatus

SETTLE_MS = 15 * 60_000
"""A refusal is believed only so long after the last submission that got no answer: one may still be on its way."""


class Approved(msgspec.Struct, frozen=True, tag=True):
    """A second operator agrees."""

    by: str


class Declined(msgspec.Struct, frozen=True, tag=True):
    """An operator stops it before Tipalti is told."""

    by: str
    reason: str = ""


class SubmissionStarted(msgspec.Struct, frozen=True, tag=True):
    """Tipalti is about to be told. Committed first."""

    now_ms: int


class SubmissionRefused(msgspec.Struct, frozen=True, tag=True):
    """Tipalti's answer to submission number `number` was a clear no: there is no payment of it."""

    number: int
    code: str
    message: str
    now_ms: int


class PaymentSeen(msgspec.Struct, frozen=True, tag=True):
    """The payment as Tipalti showed it."""

    view: PaymentView


class BookedByHand(msgspec.Struct, frozen=True, tag=True):
    """It was paid outside of Tipalti: `reference` is the bank's."""

    by: str
    reference: str


PayoutEvent = Approved | Declined | SubmissionStarted | SubmissionRefused | PaymentSeen | BookedByHand


class PayoutMoved(NamedTuple):
    """What an event makes of a payout. `payout` is the very same object when nothing changed."""

    payout: Payout
    entries: tuple[Entry, ...] = ()


def move(payout: Payout, event: PayoutEvent) -> PayoutMoved:
    """Apply one event. Raises WrongState, Forbidden, or Contradiction when Tipalti says what can't be."""
    return _HANDLERS[type(event)](payout, event)


def is_final(event: PayoutEvent) -> bool:
    """Whether an event holds for the row in whatever version: a state that Tipalti never changes again."""
    return (
        isinstance(event, PaymentSeen)
        and (known := event.view.known) is not None
        and (known is PayoutStatus.CLEARED or known in GIVEN_BACK)
    )


def _over(payout: Payout, status: PayoutStatus, **progress: Any) -> PayoutMoved:
    """The payout ends; what goes back to the seller is booked back."""
    after = replace(payout, status=status, progress=replace(payout.progress, **progress))
    entry = payout_returned_entry(payout.seller, payout.currency, payout.amount, payout.ref_code)
    return PayoutMoved(after, (entry,) if status in GIVEN_BACK else ())


def _approved(payout: Payout, event: Approved) -> PayoutMoved:
    if payout.status is not PayoutStatus.AWAITING_APPROVAL:
        if payout.progress.approved_by == event.by:
            return PayoutMoved(payout)
        raise WrongState(f"a payout that is {payout.status} waits for no approval")
    if event.by == payout.created_by:
        raise Forbidden(f"{event.by} started this run: another operator has to approve its payouts")
    progress = replace(payout.progress, approved_by=event.by)
    return PayoutMoved(replace(payout, status=PayoutStatus.CREATED, progress=progress))


def _declined(payout: Payout, event: Declined) -> PayoutMoved:
    if payout.status is PayoutStatus.DECLINED:
        return PayoutMoved(payout)
    if payout.status not in BEFORE_TIPALTI:
        raise WrongState(f"a payout that is {payout.status} can't be stopped here: Tipalti may have it")
    return _over(payout, PayoutStatus.DECLINED, declined_by=event.by, reason=event.reason)


def _submission_started(payout: Payout, event: SubmissionStarted) -> PayoutMoved:
    if payout.status not in (PayoutStatus.CREATED, PayoutStatus.SUBMITTING):
        raise WrongState(f"a payout that is {payout.status} is not submitted")
    progress = payout.progress
    unanswered = progress.refused != progress.sends
    after = replace(
        progress,
        sends=progress.sends + 1,
        sent_at_ms=event.now_ms,
        unknown_at_ms=progress.sent_at_ms if unanswered else progress.unknown_at_ms,
    )
    return PayoutMoved(replace(payout, status=PayoutStatus.SUBMITTING, progress=after))


def _submission_refused(payout: Payout, event: SubmissionRefused) -> PayoutMoved:
    progress = payout.progress
    if payout.status is not PayoutStatus.SUBMITTING or event.number != progress.sends or progress.refused == event.number:
        return PayoutMoved(payout)
    refusals, reason = progress.refusals + 1, f"{event.code}: {event.message}"
    all_answered = refusals >= progress.sends
    if all_answered or event.now_ms - progress.unknown_at_ms >= SETTLE_MS:
        return _over(payout, PayoutStatus.REFUSED, refusals=refusals, refused=event.number, reason=reason)
    after = replace(progress, refusals=refusals, refused=event.number, reason=reason)
    return PayoutMoved(replace(payout, progress=after))


def _payment_seen(payout: Payout, event: PaymentSeen) -> PayoutMoved:
    view, known = event.view, event.view.known
    if view.ref_code != payout.ref_code:
        raise Contradiction(f"payment {view.payment} has the reference {view.ref_code}, {payout.key} has {payout.ref_code}")
    if (view.amount, view.currency) != (payout.amount, payout.currency):
        told = f"{view.amount} {view.currency} at Tipalti, {payout.amount} {payout.currency} here"
        raise Contradiction(f"{payout.key} ({view.payment}) is {told}")
    if payout.progress.payment not in ("", view.payment):
        raise Contradiction(f"{payout.key} is {payout.progress.payment} and {view.payment} at Tipalti")
    if known is None:
        raise Contradiction(f"Tipalti calls {view.payment} {view.status!r}, a state that is not known here")
    if payout.over and not _agrees(payout, known):
        raise Contradiction(f"{view.payment} is {view.status!r} at Tipalti, and {payout.key} is {payout.status} here")
    moved = PayoutMoved(payout) if payout.over else _at(payout, view, known)
    return _with_fee(moved, view)


def _agrees(payout: Payout, known: PayoutStatus) -> bool:
    """Whether a payout that is over may be shown as `known`: the end itself, or, late, a state on the way there."""
    if payout.status in (PayoutStatus.REFUSED, PayoutStatus.DECLINED) or payout.progress.reference:
        return False
    ends = PayoutStatus.REJECTED if payout.status is PayoutStatus.RETURNED else payout.status
    return known is ends or not (known is PayoutStatus.CLEARED or known in GIVEN_BACK)


def _at(payout: Payout, view: PaymentView, known: PayoutStatus) -> PayoutMoved:
    was_paid = payout.progress.was_paid or known in (PayoutStatus.PAID, PayoutStatus.CLEARED)
    facts: dict[str, Any] = {"payment": view.payment, "was_paid": was_paid, "reason": view.reason}
    if known is PayoutStatus.REJECTED and payout.progress.was_paid:
        return _over(payout, PayoutStatus.RETURNED, **facts)
    if known in GIVEN_BACK or known is PayoutStatus.CLEARED:
        return _over(payout, known, **facts)
    after = replace(payout, status=known, progress=replace(payout.progress, **facts))
    return PayoutMoved(payout if after == payout else after)


def _with_fee(moved: PayoutMoved, view: PaymentView) -> PayoutMoved:
    """Book what Tipalti's fee has grown by: it takes one for a payment, and more when the bank returns it."""
    payout = moved.payout
    grown = view.fee - payout.progress.fee
    if grown <= 0:
        return moved
    currency = view.fee_currency or payout.currency
    if payout.progress.fee_currency not in ("", currency):
        raise Contradiction(f"Tipalti's fee for {payout.key} is in {currency} now, {payout.progress.fee_currency} before")
    entry = payout_fee_entry(currency, view.payment, view.fee, grown)
    progress = replace(payout.progress, fee=view.fee, fee_currency=currency)
    return PayoutMoved(replace(payout, progress=progress), (*moved.entries, entry))


def _booked_by_hand(payout: Payout, event: BookedByHand) -> PayoutMoved:
    if payout.status is PayoutStatus.CLEARED and payout.progress.reference == event.reference:
        return PayoutMoved(payout)
    if payout.status is not PayoutStatus.CREATED:
        raise WrongState(f"a payout that is {payout.status} can't be paid by hand: only one that Tipalti was never told of")
    progress = replace(payout.progress, reference=event.reference, approved_by=payout.progress.approved_by or event.by)
    entry = payout_by_hand_entry(payout.currency, payout.amount, event.reference)
    return PayoutMoved(replace(payout, status=PayoutStatus.CLEARED, progress=progress), (entry,))


_HANDLERS: dict[type, Callable[[Payout, Any], PayoutMoved]] = {
    Approved: _approved,
    Declined: _declined,
    SubmissionStarted: _submission_started,
    SubmissionRefused: _submission_refused,
    PaymentSeen: _payment_seen,
    BookedByHand: _booked_by_hand,
}
