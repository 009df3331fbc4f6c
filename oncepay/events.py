"""What can happen to a payment, as values. Facts come from Stripe, commands from callers.

`oncepay.transition.move` is the one function that applies them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from oncepay.cart import Share
from oncepay.errors import OncepayError
from oncepay.ledger import BalanceLink, Entry
from oncepay.payment import DisputeView, Failure, GiveUpReason, IntentView, Payment, RefundView


class Contradiction(OncepayError):
    """Stripe says something that can't be true of this payment."""

    slug = "contradiction"


class IntentCreated(msgspec.Struct, frozen=True, tag=True):
    """Stripe made a PaymentIntent for this payment; nothing is confirmed."""

    intent: str
    client_secret: str


class IntentRefused(msgspec.Struct, frozen=True, tag=True):
    """Stripe refused to make a PaymentIntent of these terms, and would again."""

    failure: Failure


class AttemptStarted(msgspec.Struct, frozen=True, tag=True):
    """Attempt `number` is about to be confirmed with `payment_method`. It is committed before confirm is called."""

    number: int
    payment_method: str


class AttemptDeclined(msgspec.Struct, frozen=True, tag=True):
    """Confirm number `number` was answered with a decline. `charge` is empty when Stripe made no charge."""

    number: int
    charge: str
    failure: Failure


class IntentSeen(msgspec.Struct, frozen=True, tag=True):
    """The PaymentIntent as Stripe showed it."""

    view: IntentView


class GiveUp(msgspec.Struct, frozen=True, tag=True):
    """The payment is given up: by request, after a decline, or because it is past its time."""

    reason: GiveUpReason


class SuccessorNamed(msgspec.Struct, frozen=True, tag=True):
    """The payment is over, and `key` tries again in its place."""

    key: str


class Commanded(msgspec.Struct, frozen=True, tag=True):
    """A caller's command under an idempotency key of its own; committed together with what it causes."""

    key: str
    fingerprint: str


class CaptureRequested(msgspec.Struct, frozen=True, tag=True):
    """Capture `amount` minor units of an authorised payment; `shares` is each seller's part of it."""

    amount: int
    shares: tuple[Share, ...]


class CaptureRefused(msgspec.Struct, frozen=True, tag=True):
    """Stripe refused capture number `number`, and nothing was captured."""

    number: int


class RefundRequested(msgspec.Struct, frozen=True, tag=True):
    """Give back `shares` (their gross sums to the refund) under the refund's key. Committed before Stripe hears of it."""

    key: str
    shares: tuple[Share, ...]
    reason: str
    now_ms: int


class RefundSeen(msgspec.Struct, frozen=True, tag=True):
    """A refund as Stripe showed it; one that nobody here asked for is adopted, with the platform's fee if `fee_back`."""

    view: RefundView
    fee_back: bool


class RefundRefused(msgspec.Struct, frozen=True, tag=True):
    """Stripe refused to make the refund with this key."""

    key: str
    failure: str


class DisputeSeen(msgspec.Struct, frozen=True, tag=True):
    """A dispute of the payment's charge as Stripe showed it."""

    view: DisputeView


Event = (
    IntentCreated
    | IntentRefused
    | AttemptStarted
    | AttemptDeclined
    | IntentSeen
    | GiveUp
    | SuccessorNamed
    | Commanded
    | CaptureRequested
    | CaptureRefused
    | RefundRequested
    | RefundSeen
    | RefundRefused
    | DisputeSeen
)


class AlreadyCommanded(Exception):
    """The payment took this very command before. Carries the payment."""

    def __init__(self, payment: Payment) -> None:
        super().__init__(payment.key)
        self.payment = payment


class Moved(NamedTuple):
    """What an event makes of a payment. `payment` is the very same object when nothing changed."""

    payment: Payment
    entries: tuple[Entry, ...] = ()
    links: tuple[BalanceLink, ...] = ()
