"""What one of Stripe's events means for a payment, whichever way it came: by a webhook, or out of the list of events.

Only `succeeded` and `canceled` are taken at their word: they are terminal at Stripe. Every other event is a reason to look.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from oncepay.driver import Driver
from oncepay.logs import get_logger
from oncepay.payment import IntentView, Payment
from oncepay.stripe_objects import DisputeObject, EventObject, IntentObject, ObjectHead, RefundObject

TERMINAL = frozenset({"payment_intent.succeeded", "payment_intent.canceled"})
LOOK = frozenset(
    {
        "payment_intent.payment_failed",
        "payment_intent.processing",
        "payment_intent.requires_action",
        "payment_intent.amount_capturable_updated",
        "charge.failed",
        "charge.captured",
        "charge.updated",
    }
)
"""Events after which the intent is retrieved, when the row still has open work."""
REFUNDS = frozenset({"refund.created", "refund.updated", "refund.failed", "charge.refunded", "charge.refund.updated"})
DISPUTES = frozenset(f"charge.dispute.{what}" for what in ("created", "updated", "closed", "funds_withdrawn", "funds_reinstated"))
HANDLED = TERMINAL | LOOK | REFUNDS | DISPUTES
"""What an endpoint at Stripe has to be subscribed to."""

_log = get_logger("events")
_head = msgspec.json.Decoder(ObjectHead).decode
_refund = msgspec.json.Decoder(RefundObject).decode
_dispute = msgspec.json.Decoder(DisputeObject).decode


class ByIntent(Protocol):
    """What finds a payment by its intent, on whichever shard it is."""

    async def by_intent(self, intent: str) -> Payment | None: ...


def head_of(event: EventObject) -> ObjectHead:
    """The members by which the event's object is matched to a payment. Raises msgspec.DecodeError."""
    return _head(event.data.object)


def intent_of(head: ObjectHead) -> str:
    """The intent that the event is about; empty when it is about none."""
    return head.id if head.object == "payment_intent" else head.payment_intent or ""


async def key_of(head: ObjectHead, store: ByIntent, driver: Driver) -> str:
    """The key of the payment that the event is about; empty when it is none of ours. Raises StripeUnavailable and the store's.

    By the key in the metadata; an event that brings none, by its intent on all shards, else through Stripe.
    """
    key = (head.metadata or {}).get("oncepay_key", "")
    intent = intent_of(head)
    if key or not intent:
        return key
    found = await store.by_intent(intent)
    return found.key if found is not None else await driver.key_at_stripe(intent)


async def take_in(driver: Driver, payment: Payment, event: EventObject, head: ObjectHead) -> str:
    """Commit what the event says of `payment`, whose row is behind the quorum; the outcome's name.

    Events are of the account's API version, and not of the one that calls ask for: what can't be read is a reason to look.
    """
    if payment.intent != intent_of(head):
        return "orphan"
    if event.type in REFUNDS or event.type in DISPUTES:
        await driver.look_after(payment.key, "refunds" if event.type in REFUNDS else "disputes", event.type)
        return "looked"
    if event.type in TERMINAL:
        view = _intent_view(event)
        if view is not None and (view.status == "canceled" or (view.status == "succeeded" and view.charge is not None)):
            # Also when it is over: the event may contradict the row, and then that is said.
            after = await driver.see(payment, view, event.type)
            return "known" if after.version == payment.version else "applied"
    if not payment.open_work:
        return "known"
    if head.object == "charge" and head.id in payment.progress.finished_charges:
        return "known"
    await driver.look(payment.key, event.type)
    return "looked"


def _intent_view(event: EventObject) -> IntentView | None:
    try:
        return msgspec.json.decode(event.data.object, type=IntentObject).view()
    except msgspec.DecodeError as error:
        _log.error("event can't be read", event_id=event.id, type=event.type, error=str(error))
        return None


def is_known(payment: Payment, event: EventObject) -> bool:
    """Whether the row already has what an event of a refund or a dispute says, so that nobody has to look."""
    try:
        return _is_known(payment, event)
    except msgspec.DecodeError as error:
        _log.error("event can't be read", event_id=event.id, type=event.type, error=str(error))
        return False


def _is_known(payment: Payment, event: EventObject) -> bool:
    if event.type in DISPUTES:
        dispute = _dispute(event.data.object)
        known = next((each for each in payment.progress.disputes if each.id == dispute.id), None)
        booked = {item.id for item in dispute.balance_transactions}
        return known is not None and known.status == dispute.status and booked <= set(known.booked)
    if event.type in REFUNDS and head_of(event).object == "refund":
        refund = _refund(event.data.object)
        mine = next((each for each in payment.progress.refunds if each.id == refund.id), None)
        return mine is not None and mine.status == refund.view().status and not mine.open_work
    return False
