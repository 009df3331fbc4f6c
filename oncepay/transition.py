"""The one function that moves a payment: `(payment, event) -> (payment, entries, links)`. No I/O.

An answer of Stripe's to us, a webhook and a poll are the same kind of event. Facts that are terminal at Stripe
(succeeded, canceled, a charge that failed, by the charge's id) commute and repeat harmlessly; everything else is
committed by comparing the row's version, on a fresh look at Stripe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from oncepay import refunds
from oncepay.cart import shares_of_part
from oncepay.errors import InvalidAmount, KeyReused, PredecessorNotOver, TooBusy, WrongState
from oncepay.events import (
    AlreadyCommanded,
    AttemptDeclined,
    AttemptStarted,
    CaptureRefused,
    CaptureRequested,
    Commanded,
    Contradiction,
    DisputeSeen,
    Event,
    GiveUp,
    IntentCreated,
    IntentRefused,
    IntentSeen,
    Moved,
    RefundRefused,
    RefundRequested,
    RefundSeen,
    SuccessorNamed,
)
from oncepay.ledger import PAYMENT, BalanceLink, Entry, exchange_entries, payment_entry, stripe_fee_entry
from oncepay.payment import COMMANDS_MAX, TERMINAL, Capture, Charge, Command, Failure, IntentView, Payment, Status

CONFIRMABLE = frozenset({Status.ATTEMPTED, Status.REQUIRES_PAYMENT_METHOD})
WITH_BUYER_OR_BANK = frozenset({Status.PROCESSING, Status.REQUIRES_ACTION})
"""An attempt is under way at Stripe; nothing but its end brings the intent back to `requires_payment_method`."""


def move(payment: Payment, event: Event) -> Moved:
    """Apply `event`. The caller commits the result only where the row still has `payment.version`.

    Raises WrongState when a command (an attempt, giving up) isn't allowed in this state, and Contradiction when a fact
    can't be true. A fact that is known already, or that came too late to matter, returns the payment unchanged.
    """
    moved = _HANDLERS[type(event)](payment, event)
    if moved.payment is payment:
        return moved
    if payment.terminal and moved.payment.status is not payment.status:
        raise Contradiction(f"{payment.status} can't become {moved.payment.status}")
    after = replace(moved.payment, version=payment.version + 1)
    if after.terminal and after.progress.client_secret:  # no browser can do anything with it any more
        after = replace(after, progress=replace(after.progress, client_secret=""))
    return moved._replace(payment=after)


def _intent_created(payment: Payment, event: IntentCreated) -> Moved:
    """Only a row that is still `created` takes an intent; any other intent is an orphan, for the caller to cancel."""
    if payment.status is not Status.CREATED:
        return Moved(payment)
    progress = replace(payment.progress, client_secret=event.client_secret)
    return Moved(replace(payment, status=Status.ATTEMPTED, intent=event.intent, progress=progress))


def _intent_refused(payment: Payment, event: IntentRefused) -> Moved:
    """Over, with nothing at Stripe that could ever be confirmed: no row names an intent."""
    if payment.status is not Status.CREATED:
        return Moved(payment)
    return Moved(replace(payment, status=Status.FAILED, progress=replace(payment.progress, failure=event.failure)))


def _attempt_started(payment: Payment, event: AttemptStarted) -> Moved:
    progress = payment.progress
    if (
        payment.status is Status.CONFIRMING
        and progress.attempt == event.number
        and progress.payment_method == event.payment_method
    ):
        return Moved(payment)
    if payment.status not in CONFIRMABLE or event.number != progress.attempt + 1:
        raise WrongState(f"a payment that is {payment.status} (attempt {progress.attempt}) can't start attempt {event.number}")
    progress = replace(progress, attempt=event.number, payment_method=event.payment_method)
    return Moved(replace(payment, status=Status.CONFIRMING, progress=progress))


def _attempt_declined(payment: Payment, event: AttemptDeclined) -> Moved:
    """The answer to this very attempt. A row that is past `confirming` has seen more of Stripe than the answer knows."""
    if event.number != payment.progress.attempt or payment.status is not Status.CONFIRMING:
        return Moved(payment)
    return _declined(payment, event.charge, event.failure)


def _declined(payment: Payment, charge: str, failure: Failure) -> Moved:
    """An attempt is over. When it made no charge, `charge` may be that of an earlier one: Stripe shows its latest."""
    progress = payment.progress
    finished = progress.finished_charges
    if charge and charge not in finished:
        finished = (*finished, charge)
    progress = replace(progress, finished_charges=finished, failure=failure, next_action_url="")
    return Moved(replace(payment, status=Status.REQUIRES_PAYMENT_METHOD, progress=progress))


def _give_up(payment: Payment, event: GiveUp) -> Moved:
    if payment.status in {Status.CANCELING, Status.CANCELED, Status.FAILED}:
        return Moved(payment)
    if payment.terminal:
        raise WrongState(f"a payment that has {payment.status} can't be given up")
    progress = replace(payment.progress, give_up=event.reason)
    if not payment.intent:
        return Moved(replace(payment, status=_given_up_status(event.reason, progress.failure), progress=progress))
    return Moved(replace(payment, status=Status.CANCELING, progress=progress))


def _successor_named(payment: Payment, event: SuccessorNamed) -> Moved:
    named = payment.progress.successor
    if named == event.key:
        return Moved(payment)
    if named:
        raise PredecessorNotOver(f"{payment.key} already has a successor", field="after")
    if payment.status not in {Status.FAILED, Status.CANCELED}:
        raise PredecessorNotOver(f"{payment.key} is {payment.status}", field="after")
    return Moved(replace(payment, progress=replace(payment.progress, successor=event.key)))


def _commanded(payment: Payment, event: Commanded) -> Moved:
    """A key is taken once: again with the same words it is a replay, with other words it is refused."""
    known = next((command for command in payment.progress.commands if command.key == event.key), None)
    if known is not None:
        if known.fingerprint != event.fingerprint:
            raise KeyReused(f"{event.key} was used on {payment.key} for another command")
        raise AlreadyCommanded(payment)
    if len(payment.progress.commands) >= COMMANDS_MAX:
        raise TooBusy(f"{payment.key} has taken {COMMANDS_MAX} commands, and takes no more")
    commands = (*payment.progress.commands, Command(event.key, event.fingerprint))
    return Moved(replace(payment, progress=replace(payment.progress, commands=commands)))


def _capture_requested(payment: Payment, event: CaptureRequested) -> Moved:
    """One capture a payment: a second one would need multi-capture, which is not supported."""
    if payment.status is not Status.REQUIRES_CAPTURE or payment.progress.capture is not None:
        raise WrongState(f"a payment that is {payment.status} can't be captured" if payment.status is not Status.REQUIRES_CAPTURE
                         else "the payment is being captured already")  # fmt: skip
    if not 0 < event.amount <= payment.amount:
        raise InvalidAmount(f"of {payment.amount} at most that can be captured, not {event.amount}", field="amount")
    number = payment.progress.captures + 1
    progress = replace(payment.progress, capture=Capture(number, event.amount, event.shares), captures=number)
    return Moved(replace(payment, progress=progress))


def _capture_refused(payment: Payment, event: CaptureRefused) -> Moved:
    capture = payment.progress.capture
    if capture is None or capture.number != event.number or payment.terminal:
        return Moved(payment)
    return Moved(replace(payment, progress=replace(payment.progress, capture=None)))


def _given_up_status(reason: str, failure: Failure | None) -> Status:
    """`failed` after a decline, `canceled` when somebody asked for it or nothing was ever tried."""
    return Status.FAILED if failure is not None and reason != "requested" else Status.CANCELED


def _intent_seen(payment: Payment, event: IntentSeen) -> Moved:
    view = event.view
    if view.id != payment.intent:
        return Moved(payment)
    if view.status == "succeeded":
        return _succeeded(payment, view)
    if payment.terminal:
        if view.status == "canceled" and payment.status is Status.SUCCEEDED:
            raise Contradiction(f"{view.id} is canceled at Stripe and succeeded here")
        return Moved(payment)
    if view.status == "canceled":
        status = _given_up_status(payment.progress.give_up, payment.progress.failure)
        return Moved(replace(payment, status=status, progress=replace(payment.progress, next_action_url="")))
    if payment.status is Status.CANCELING:
        return Moved(payment)
    return _in_progress(payment, view)


def _in_progress(payment: Payment, view: IntentView) -> Moved:
    """A view that is not terminal, of a payment that is not being given up."""
    if view.status == "requires_payment_method":
        failed = view.charge.id if view.charge is not None and view.charge.status == "failed" else ""
        news = bool(failed) and failed not in payment.progress.finished_charges
        if not news and payment.status not in WITH_BUYER_OR_BANK:
            return Moved(payment)
        return _declined(payment, failed, view.failure or Failure(code="card_declined"))
    status = {
        "processing": Status.PROCESSING,
        "requires_action": Status.REQUIRES_ACTION,
        "requires_capture": Status.REQUIRES_CAPTURE,
    }.get(view.status)
    if status is None or (status is payment.status and view.next_action_url == payment.progress.next_action_url):
        return Moved(payment)
    return Moved(replace(payment, status=status, progress=replace(payment.progress, next_action_url=view.next_action_url)))


def _succeeded(payment: Payment, view: IntentView) -> Moved:
    if payment.terminal and payment.status is not Status.SUCCEEDED:
        raise Contradiction(f"{view.id} succeeded at Stripe and is {payment.status} here")
    if view.charge is None:
        raise Contradiction(f"{view.id} succeeded without a charge")
    charge, moved = view.charge, Moved(payment)
    if payment.status is not Status.SUCCEEDED:
        captured = view.amount_received or payment.amount
        if captured > payment.amount:
            raise Contradiction(f"{view.id} took {captured} of {payment.amount}")
        asked = payment.progress.capture
        shares = asked.shares if asked and asked.amount == captured else shares_of_part(payment.terms.shares, captured)
        entry = payment_entry(payment.currency, charge.id, shares)
        progress = replace(payment.progress, charge=charge.id, failure=None, next_action_url="")
        moved = Moved(replace(payment, status=Status.SUCCEEDED, amount_captured=captured, progress=progress), (entry,))
    elif charge.id != payment.progress.charge:
        raise Contradiction(f"{view.id} succeeded with {charge.id} and with {payment.progress.charge}")
    return _with_fee(moved, charge)


def _with_fee(moved: Moved, charge: Charge) -> Moved:
    """Book Stripe's fee (and the exchange, where Stripe settles in another currency) once the transaction is known."""
    payment = moved.payment
    if not charge.balance_transaction or charge.fee < 0 or payment.progress.stripe_fee >= 0:
        return moved
    transaction, settled = charge.balance_transaction, charge.settled_currency or payment.currency
    entries: list[Entry] = []
    links = [BalanceLink(transaction, PAYMENT)]
    if settled != payment.currency:
        entries += exchange_entries(transaction, payment.currency, payment.amount_captured, settled, charge.settled_amount)
    if charge.fee:
        entries.append(stripe_fee_entry(settled, transaction, charge.fee))
    links += [BalanceLink(transaction, entry.entry_id) for entry in entries]
    progress = replace(payment.progress, stripe_fee=charge.fee)
    return Moved(replace(payment, progress=progress), moved.entries + tuple(entries), moved.links + tuple(links))


_HANDLERS: dict[type, Callable[[Payment, Any], Moved]] = {
    IntentCreated: _intent_created,
    IntentRefused: _intent_refused,
    AttemptStarted: _attempt_started,
    AttemptDeclined: _attempt_declined,
    IntentSeen: _intent_seen,
    GiveUp: _give_up,
    SuccessorNamed: _successor_named,
    Commanded: _commanded,
    CaptureRequested: _capture_requested,
    CaptureRefused: _capture_refused,
    RefundRequested: refunds.requested,
    RefundSeen: refunds.seen,
    RefundRefused: refunds.refused,
    DisputeSeen: refunds.dispute_seen,
}

__all__ = [
    "TERMINAL",
    "AlreadyCommanded",
    "AttemptDeclined",
    "AttemptStarted",
    "CaptureRefused",
    "CaptureRequested",
    "Commanded",
    "Contradiction",
    "DisputeSeen",
    "Event",
    "GiveUp",
    "IntentCreated",
    "IntentRefused",
    "IntentSeen",
    "Moved",
    "RefundRefused",
    "RefundRequested",
    "RefundSeen",
    "SuccessorNamed",
    "move",
]
