"""What the stand-in remembers of each object: what varies. `views` fills in the rest of Stripe's shape.

The structs are kept as arrays: new members go to the end, with a default. Times are whole seconds since 1970, amounts
minor units of the object's currency.
"""

from __future__ import annotations

from typing import Any

import msgspec


class LastError(msgspec.Struct, array_like=True):
    """Why an intent's last attempt failed."""

    code: str
    decline_code: str | None
    message: str
    type: str = "card_error"
    charge: str | None = None
    payment_method: str | None = None
    blocked: bool = False


class Intent(msgspec.Struct, array_like=True):
    """A payment intent."""

    id: str
    created: int
    amount: int
    currency: str
    client_secret: str
    status: str = "requires_payment_method"
    capture_method: str = "automatic_async"
    confirmation_method: str = "automatic"
    metadata: dict[str, str] = {}
    customer: str | None = None
    description: str | None = None
    payment_method: str | None = None
    payment_method_types: list[str] = []
    automatic_payment_methods: bool = False
    latest_charge: str | None = None
    amount_received: int = 0
    amount_capturable: int = 0
    canceled_at: int | None = None
    cancellation_reason: str | None = None
    last_error: LastError | None = None
    return_url: str | None = None
    action_url: str | None = None
    extra: dict[str, Any] | None = None
    """Members that are only handed back (shipping, receipt_email …), by their names in Stripe's shape."""


class Charge(msgspec.Struct, array_like=True):
    """A charge: one attempt of an intent that reached the card."""

    id: str
    created: int
    amount: int
    currency: str
    payment_intent: str
    payment_method: str
    card: str
    status: str = "succeeded"
    captured: bool = False
    amount_captured: int = 0
    amount_refunded: int = 0
    metadata: dict[str, str] = {}
    customer: str | None = None
    description: str | None = None
    balance_transaction: str | None = None
    failure: LastError | None = None
    dispute: str | None = None
    refunds: list[str] = []
    authenticated: bool = False
    extra: dict[str, Any] | None = None


class BalanceTransaction(msgspec.Struct, array_like=True):
    """A line of the account's balance. `net` is `amount - fee`."""

    id: str
    created: int
    amount: int
    currency: str
    type: str
    reporting_category: str
    available_on: int
    fee: int = 0
    fee_description: str = "Stripe processing fees"
    source: str | None = None
    description: str | None = None

    @property
    def net(self) -> int:
        """What the balance changes by."""
        return self.amount - self.fee


class Refund(msgspec.Struct, array_like=True):
    """A refund of a charge, or of a part of it."""

    id: str
    created: int
    amount: int
    currency: str
    charge: str
    payment_intent: str
    payment_method: str | None
    status: str = "succeeded"
    metadata: dict[str, str] = {}
    reason: str | None = None
    balance_transaction: str | None = None
    failure_reason: str | None = None
    failure_balance_transaction: str | None = None


class Dispute(msgspec.Struct, array_like=True):
    """A dispute, or an inquiry when its status begins with `warning`."""

    id: str
    created: int
    amount: int
    currency: str
    charge: str
    payment_intent: str
    card: str
    reason: str
    status: str
    due_by: int
    metadata: dict[str, str] = {}
    balance_transactions: list[str] = []
    evidence: dict[str, str] = {}
    submission_count: int = 0


class PaymentMethod(msgspec.Struct, array_like=True):
    """A payment method: one of the test cards, maybe attached to a customer."""

    id: str
    created: int
    card: str
    customer: str | None = None
    metadata: dict[str, str] = {}
    billing_details: dict[str, Any] | None = None
    exp_month: int = 8
    exp_year: int = 2034


class Customer(msgspec.Struct, array_like=True):
    """A customer."""

    id: str
    created: int
    metadata: dict[str, str] = {}
    invoice_prefix: str = ""
    extra: dict[str, Any] | None = None
    deleted: bool = False


class Payout(msgspec.Struct, array_like=True):
    """A payout of the account's balance to its bank."""

    id: str
    created: int
    amount: int
    currency: str
    arrival_date: int
    destination: str
    status: str = "pending"
    metadata: dict[str, str] = {}
    description: str | None = None
    method: str = "standard"
    statement_descriptor: str | None = None
    balance_transaction: str | None = None
    failure_code: str | None = None
    failure_message: str | None = None
    failure_balance_transaction: str | None = None
    original_payout: str | None = None
    reversed_by: str | None = None


class Event(msgspec.Struct, array_like=True):
    """Something that happened. `snapshot` is the object as it was, packed as its table packs it."""

    id: str
    created: int
    type: str
    kind: str
    snapshot: bytes
    previous: dict[str, Any] | None = None
    request: str | None = None
    idempotency_key: str | None = None


class WebhookEndpoint(msgspec.Struct, array_like=True):
    """Where events are sent. `secrets` holds the newest signing secret first; others still sign until `rolled_until`."""

    id: str
    created: int
    url: str
    enabled_events: list[str]
    secrets: list[str]
    status: str = "enabled"
    description: str | None = None
    metadata: dict[str, str] = {}
    api_version: str | None = None
    rolled_until: int = 0
