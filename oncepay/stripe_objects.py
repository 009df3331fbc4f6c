"""Stripe's objects, as far as this project reads them. Unknown members are ignored; missing ones have defaults.

An object that may be expanded is either its id or the object.
"""

from __future__ import annotations

from typing import get_args

import msgspec

from oncepay.payment import BalanceTransaction, Charge, DisputeView, Failure, IntentView, RefundStatus, RefundView


class BalanceTransactionObject(msgspec.Struct):
    """A balance transaction: `fee` and `net` in minor units of `currency`, the settlement currency."""

    id: str
    amount: int = 0
    currency: str = ""
    fee: int = 0
    net: int = 0

    def value(self) -> BalanceTransaction:
        """The transaction as the core knows it."""
        return BalanceTransaction(self.id, self.amount, self.fee, self.net, self.currency)


class LedgerTransactionObject(msgspec.Struct):
    """A balance transaction as reconciliation reads it; times in seconds since 1970, `source` the id of what caused it."""

    id: str
    type: str
    currency: str
    amount: int
    net: int
    created: int
    fee: int = 0
    reporting_category: str = ""
    source: str | None = None
    description: str | None = None


class LedgerTransactionList(msgspec.Struct):
    """A page of balance transactions, newest first."""

    data: list[LedgerTransactionObject]
    has_more: bool = False


class BankPayoutObject(msgspec.Struct):
    """A payout from the account at Stripe to the bank, with its balance transactions."""

    id: str
    status: str
    amount: int
    currency: str
    created: int
    balance_transaction: str | None = None
    failure_balance_transaction: str | None = None
    failure_message: str | None = None


class BankPayoutList(msgspec.Struct):
    """A page of payouts to the bank, newest first."""

    data: list[BankPayoutObject]
    has_more: bool = False


class ChargeObject(msgspec.Struct):
    """A charge. `failure_code` is set when it failed."""

    id: str
    status: str = ""
    payment_intent: str | None = None
    balance_transaction: str | BalanceTransactionObject | None = None
    failure_code: str | None = None
    failure_message: str | None = None
    metadata: dict[str, str] | None = None


class ErrorObject(msgspec.Struct):
    """Stripe's error, as it stands in an answer or in `last_payment_error`."""

    type: str = ""
    code: str | None = None
    decline_code: str | None = None
    message: str | None = None
    charge: str | ChargeObject | None = None
    payment_intent: IntentObject | None = None


class RedirectObject(msgspec.Struct):
    """Where the buyer authenticates."""

    url: str | None = None


class NextActionObject(msgspec.Struct):
    """What the buyer has to do next."""

    type: str = ""
    redirect_to_url: RedirectObject | None = None


class IntentObject(msgspec.Struct):
    """A PaymentIntent."""

    id: str
    status: str
    created: int = 0
    amount: int = 0
    amount_received: int = 0
    client_secret: str | None = None
    metadata: dict[str, str] | None = None
    latest_charge: str | ChargeObject | None = None
    last_payment_error: ErrorObject | None = None
    payment_method: str | dict[str, object] | None = None
    next_action: NextActionObject | None = None

    def view(self) -> IntentView:
        """What the platform takes from it."""
        failure = _failure(self.last_payment_error) if self.last_payment_error else None
        charge = _charge(self)
        action = self.next_action.redirect_to_url if self.next_action else None
        return IntentView(
            id=self.id,
            status=self.status,
            amount_received=self.amount_received,
            client_secret=self.client_secret or "",
            key=(self.metadata or {}).get("oncepay_key", ""),
            charge=charge,
            failure=failure,
            payment_method=self.payment_method if isinstance(self.payment_method, str) else "",
            next_action_url=(action.url or "") if action else "",
        )


class ErrorAnswer(msgspec.Struct):
    """The body of an answer that is an error."""

    error: ErrorObject


class IntentList(msgspec.Struct):
    """A page of PaymentIntents, newest first."""

    data: list[IntentObject]
    has_more: bool = False


STATUSES: dict[str, RefundStatus] = {status: status for status in get_args(RefundStatus) if status != "requested"}
"""Of refunds at Stripe; `requested` is a status of our own."""


class RefundObject(msgspec.Struct):
    """A refund."""

    id: str
    amount: int = 0
    status: str | None = None
    created: int = 0
    reason: str | None = None
    failure_reason: str | None = None
    metadata: dict[str, str] | None = None
    payment_intent: str | None = None
    balance_transaction: str | BalanceTransactionObject | None = None
    failure_balance_transaction: str | BalanceTransactionObject | None = None

    def view(self) -> RefundView:
        """What the platform takes from it; transactions only where they were expanded.

        A status that isn't known here is one that Stripe has added: the refund isn't over as far as this code can tell.
        """
        paid, returned = self.balance_transaction, self.failure_balance_transaction
        return RefundView(
            id=self.id,
            status=STATUSES.get(self.status or "", "pending"),
            amount=self.amount,
            key=(self.metadata or {}).get("oncepay_refund", ""),
            reason=self.reason or "",
            failure=self.failure_reason or "",
            transaction=paid.value() if isinstance(paid, BalanceTransactionObject) else None,
            failure_transaction=returned.value() if isinstance(returned, BalanceTransactionObject) else None,
            created_at_ms=self.created * 1000,
        )


class RefundList(msgspec.Struct):
    """A page of refunds, newest first."""

    data: list[RefundObject]
    has_more: bool = False


class EvidenceDetails(msgspec.Struct):
    """Until when evidence may be handed in, in seconds since 1970."""

    due_by: int | None = None


class DisputeObject(msgspec.Struct):
    """A dispute with its balance transactions."""

    id: str
    status: str
    amount: int = 0
    reason: str | None = None
    payment_intent: str | None = None
    balance_transactions: list[BalanceTransactionObject] = []
    evidence_details: EvidenceDetails | None = None
    created: int = 0

    def view(self) -> DisputeView:
        """What the platform takes from it."""
        due = self.evidence_details.due_by if self.evidence_details else None
        transactions = tuple(item.value() for item in self.balance_transactions)
        return DisputeView(self.id, self.status, self.amount, self.reason or "", due or 0, transactions)


class DisputeList(msgspec.Struct):
    """A page of disputes, newest first."""

    data: list[DisputeObject]
    has_more: bool = False


class EventData(msgspec.Struct):
    """What an event is about; decoded by its type later."""

    object: msgspec.Raw


class EventObject(msgspec.Struct):
    """An event, from a webhook or the events list."""

    id: str
    type: str
    created: int
    data: EventData


class EventList(msgspec.Struct):
    """A page of events, newest first."""

    data: list[EventObject]
    has_more: bool = False


class ObjectHead(msgspec.Struct):
    """The members by which any event's object is matched to a payment."""

    id: str = ""
    object: str = ""
    payment_intent: str | None = None
    metadata: dict[str, str] | None = None


def _failure(error: ErrorObject) -> Failure:
    return Failure(code=error.code or error.type or "unknown", message=error.message or "", decline_code=error.decline_code or "")


def failure_of(error: ErrorObject) -> tuple[Failure, str]:
    """The failure that an error answer tells of, and the id of the failed charge ('' when none was made)."""
    charge = error.charge
    if charge is None and error.payment_intent is not None:
        charge = error.payment_intent.latest_charge
    return _failure(error), charge.id if isinstance(charge, ChargeObject) else charge or ""


def _charge(intent: IntentObject) -> Charge | None:
    """The latest charge; when it isn't expanded its status follows from the intent's own."""
    charge = intent.latest_charge
    if charge is None:
        return None
    if isinstance(charge, str):
        error = intent.last_payment_error
        failed = intent.status == "requires_payment_method" or (error is not None and error.charge == charge)
        return Charge(id=charge, status="succeeded" if intent.status == "succeeded" else "failed" if failed else "pending")
    transaction = charge.balance_transaction
    if transaction is None or isinstance(transaction, str):
        return Charge(id=charge.id, status=charge.status)
    return Charge(
        id=charge.id,
        status=charge.status,
        balance_transaction=transaction.id,
        fee=transaction.fee,
        net=transaction.net,
        settled_amount=transaction.amount,
        settled_currency=transaction.currency,
    )
