"""A payment: its row, its states, and the facts that move it.

The row is everything that the platform knows of one payment. `oncepay.transition` holds the one function that changes
it; this module holds the words.
"""

from __future__ import annotations

import enum
from typing import Literal, NewType

import msgspec

from oncepay.cart import Item, Share, shares_of_part

Key = NewType("Key", str)
"""A payment's idempotency key, unquoted. Its first 16 bits of SHA-256 are the slot."""

CaptureMethod = Literal["automatic", "manual"]
OnDecline = Literal["fail", "retry"]
GiveUpReason = Literal["requested", "declined", "expired"]


class Status(enum.StrEnum):
    """Where a payment is in its life."""

    CREATED = "created"
    """The row is on the quorum; Stripe knows nothing."""
    ATTEMPTED = "attempted"
    """A PaymentIntent exists and its id is in the row; nothing was confirmed by us."""
    CONFIRMING = "confirming"
    """Attempt n is in the row; confirm was or will be called for it."""
    PROCESSING = "processing"
    """Stripe works on it; slow methods take days."""
    REQUIRES_PAYMENT_METHOD = "requires_payment_method"
    """The last attempt was declined; another payment method may be tried."""
    REQUIRES_ACTION = "requires_action"
    """The buyer has to authenticate."""
    REQUIRES_CAPTURE = "requires_capture"
    """Authorised; the merchant has to capture."""
    CANCELING = "canceling"
    """Being given up: confirm and capture are refused from here on."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})
"""These never change, here or at Stripe."""

WAITING = frozenset({Status.REQUIRES_PAYMENT_METHOD, Status.REQUIRES_ACTION, Status.REQUIRES_CAPTURE})
"""In these the buyer or the merchant has the next move."""


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why the last attempt didn't pay: Stripe's `code`, `decline_code` and a message that the buyer may see."""

    code: str
    message: str = ""
    decline_code: str = ""


class Terms(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was agreed when the payment was made, and the exact parameters that Stripe will get. It never changes.

    `shares` freezes each seller's gross and fee. `api_version` is the version of Stripe's API under which the
    parameters were written.
    """

    items: tuple[Item, ...]
    shares: tuple[Share, ...]
    api_version: str
    capture_method: CaptureMethod = "automatic"
    on_decline: OnDecline = "retry"
    metadata: dict[str, str] = {}
    after: str = ""
    payment_method: str = ""
    customer: str = ""
    off_session: bool = False

    @property
    def platform_fee(self) -> int:
        """The platform's fee in minor units, when all is captured."""
        return sum(share.fee for share in self.shares)


RefundStatus = Literal["requested", "pending", "requires_action", "succeeded", "failed", "canceled"]
REFUND_RANK: dict[str, int] = {
    "requested": 0, "pending": 1, "requires_action": 1, "succeeded": 2, "canceled": 3, "failed": 3,
}  # fmt: skip
"""A refund only moves up: a late word of an earlier state changes nothing, and succeeded may still turn into failed."""
REFUND_OVER = frozenset({"failed", "canceled"})
"""Refunds in these don't count against what is left of a payment."""

DISPUTE_OVER = frozenset({"won", "lost", "warning_closed", "prevented"})

COMMANDS_MAX = 100
"""Commands (confirm, capture, cancel, refund) that one payment takes in its life."""


class BalanceTransaction(msgspec.Struct, frozen=True, omit_defaults=True):
    """A balance transaction at Stripe: minor units of `currency`, the settlement currency; what left us is negative."""

    id: str
    amount: int
    fee: int
    net: int
    currency: str


class Refund(msgspec.Struct, frozen=True, omit_defaults=True):
    """One refund of a payment, by its `key`: the caller's, or `stripe:<id>` for one that was made at Stripe.

    `shares` is what each seller (gross) and the platform (fee of it) give back. `booked` are the balance transactions that
    have their entries.
    """

    key: str
    amount: int
    shares: tuple[Share, ...]
    created_at_ms: int
    status: RefundStatus = "requested"
    id: str = ""
    reason: str = ""
    failure: str = ""
    booked: tuple[str, ...] = ()

    @property
    def open_work(self) -> bool:
        """Whether Stripe still has to say something: how it ends, or its balance transaction."""
        return self.status in {"requested", "pending", "requires_action"} or (self.status == "succeeded" and not self.booked)


class Dispute(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dispute of the payment's charge. `amount` in minor units; `booked` are the transactions that have entries."""

    id: str
    status: str
    amount: int
    reason: str = ""
    evidence_due_s: int = 0
    booked: tuple[str, ...] = ()


class Capture(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be captured: minor units, and each seller's share of it. `number` counts the tries."""

    number: int
    amount: int
    shares: tuple[Share, ...]


class Command(msgspec.Struct, frozen=True, array_like=True):
    """A command that the payment took: its idempotency key, and the hash of what it said."""

    key: str
    fingerprint: str


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has happened so far, beside the status.

    `attempt` counts confirms (0: none yet). `finished_charges` are the charges of attempts that are known to be over, so
    that a late word about one of them never touches a later attempt. `stripe_fee` is -1 until Stripe's fee is booked.
    """

    client_secret: str = ""
    attempt: int = 0
    payment_method: str = ""
    charge: str = ""
    finished_charges: tuple[str, ...] = ()
    failure: Failure | None = None
    give_up: GiveUpReason | Literal[""] = ""
    stripe_fee: int = -1
    successor: str = ""
    next_action_url: str = ""
    capture: Capture | None = None
    captures: int = 0
    refunds: tuple[Refund, ...] = ()
    disputes: tuple[Dispute, ...] = ()
    commands: tuple[Command, ...] = ()


class Payment(msgspec.Struct, frozen=True):
    """One payment's row. Amounts in minor units of `currency`; times in milliseconds since 1970 (UTC).

    `version` grows by one with each committed change and is compared when the next is committed. `fingerprint` is the
    hash of the business fields that a second use of the key has to match.
    """

    key: Key
    status: Status
    version: int
    buyer: str
    currency: str
    amount: int
    terms: Terms
    fingerprint: bytes
    created_at_ms: int
    updated_at_ms: int
    expires_at_ms: int
    intent: str = ""
    amount_captured: int = 0
    amount_refunded: int = 0
    progress: Progress = Progress()

    @property
    def terminal(self) -> bool:
        """Whether the status can never change again."""
        return self.status in TERMINAL

    @property
    def settled(self) -> bool:
        """Whether a caller's wait is over: terminal, or the buyer or the merchant has the next move."""
        if self.status is Status.REQUIRES_PAYMENT_METHOD and self.terms.on_decline == "fail":
            return False  # it is about to be given up
        if self.status is Status.ATTEMPTED and not self.terms.payment_method:
            return True  # the browser confirms with the client secret
        if self.status is Status.REQUIRES_CAPTURE and self.progress.capture is not None:
            return False  # it is about to be captured
        return self.status in TERMINAL or self.status in WAITING

    @property
    def open_work(self) -> bool:
        """Whether the worker still has to look at this payment: it, a refund or a dispute of it may move, or is not booked."""
        progress = self.progress
        if self.status not in TERMINAL or (self.status is Status.SUCCEEDED and progress.stripe_fee < 0):
            return True
        return any(refund.open_work for refund in progress.refunds) or any(
            d.status not in DISPUTE_OVER for d in progress.disputes
        )

    @property
    def refunds_asked(self) -> bool:
        """Whether a refund was asked for of which Stripe hasn't said anything."""
        return any(refund.status == "requested" for refund in self.progress.refunds)

    def command(self, key: str) -> Command | None:
        """The command that this payment took under `key`."""
        return next((command for command in self.progress.commands if command.key == key), None)

    @property
    def captured_shares(self) -> tuple[Share, ...]:
        """What each seller and the platform got of what was captured."""
        if not self.amount_captured:
            return ()
        capture = self.progress.capture
        if capture is not None and capture.amount == self.amount_captured:
            return capture.shares
        return shares_of_part(self.terms.shares, self.amount_captured)

    @property
    def left_shares(self) -> tuple[Share, ...]:
        """What of the captured shares no refund (that isn't failed or canceled) has taken."""
        taken: dict[str, tuple[int, int]] = {}
        for refund in self.progress.refunds:
            if refund.status not in REFUND_OVER:
                for share in refund.shares:
                    gross, fee = taken.get(share.seller, (0, 0))
                    taken[share.seller] = (gross + share.gross, fee + share.fee)
        left = []
        for share in self.captured_shares:
            gross, fee = taken.get(share.seller, (0, 0))
            left.append(Share(share.seller, share.gross - gross, share.fee - fee))
        return tuple(left)


class Charge(msgspec.Struct, frozen=True):
    """A charge as Stripe shows it. The balance transaction's members are empty until Stripe has posted it."""

    id: str
    status: str
    balance_transaction: str = ""
    fee: int = -1
    net: int = 0
    settled_amount: int = 0
    settled_currency: str = ""


class IntentView(msgspec.Struct, frozen=True):
    """A PaymentIntent as Stripe showed it at one moment, in an answer, a webhook or a poll."""

    id: str
    status: str
    amount_received: int = 0
    client_secret: str = ""
    key: str = ""
    charge: Charge | None = None
    failure: Failure | None = None
    payment_method: str = ""
    next_action_url: str = ""


class RefundView(msgspec.Struct, frozen=True):
    """A refund as Stripe showed it. `key` is ours out of its metadata, empty for one that was made at Stripe."""

    id: str
    status: RefundStatus
    amount: int
    key: str = ""
    reason: str = ""
    failure: str = ""
    transaction: BalanceTransaction | None = None
    failure_transaction: BalanceTransaction | None = None
    created_at_ms: int = 0


class DisputeView(msgspec.Struct, frozen=True):
    """A dispute as Stripe showed it, with the balance transactions that it has caused so far."""

    id: str
    status: str
    amount: int
    reason: str = ""
    evidence_due_s: int = 0
    transactions: tuple[BalanceTransaction, ...] = ()
