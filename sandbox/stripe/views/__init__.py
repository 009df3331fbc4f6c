"""Objects in Stripe's shape: every member that Stripe answers, built from what the stand-in remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandbox.stripe import model
from sandbox.stripe.forms import JsonObject
from sandbox.stripe.views.account import EVIDENCE, balance_transaction, customer, dispute, payout, webhook_endpoint
from sandbox.stripe.views.payments import PUBLISHABLE_MEMBERS, charge, intent, last_error, payment_method, refund
from sandbox.stripe.world import API_VERSION, World

__all__ = [
    "EVIDENCE",
    "PUBLISHABLE_MEMBERS",
    "RENDER",
    "balance_transaction",
    "by_id",
    "charge",
    "customer",
    "dispute",
    "event",
    "intent",
    "last_error",
    "of_snapshot",
    "payment_method",
    "payout",
    "refund",
    "webhook_endpoint",
]

Render = Callable[[World, Any], JsonObject]

RENDER: dict[str, Render] = {
    "payment_intent": intent,
    "charge": charge,
    "balance_transaction": balance_transaction,
    "refund": refund,
    "dispute": dispute,
    "payment_method": payment_method,
    "customer": customer,
    "payout": payout,
    "webhook_endpoint": webhook_endpoint,
}
"""How each kind of object is shown; takes a row of that kind's table."""


def event(world: World, row: model.Event, pending_webhooks: int) -> JsonObject:
    """An event, its object as it was then."""
    data: JsonObject = {"object": of_snapshot(world, row.kind, row.snapshot)}
    if row.previous is not None:
        data["previous_attributes"] = row.previous
    return {
        "id": row.id,
        "object": "event",
        "api_version": API_VERSION,
        "created": row.created,
        "data": data,
        "livemode": False,
        "pending_webhooks": pending_webhooks,
        "request": {"id": row.request, "idempotency_key": row.idempotency_key},
        "type": row.type,
    }


def of_snapshot(world: World, kind: str, snapshot: bytes) -> JsonObject:
    """The object of `kind` that was packed as `snapshot`."""
    return RENDER[kind](world, world.tables[kind].unpack(snapshot))


def by_id(world: World, identifier: str) -> JsonObject | None:
    """The object of any id that can be expanded, or None."""
    kind = world.kind_of(identifier)
    if kind is None:
        return None
    row = world.tables[kind].get(identifier)
    return RENDER[kind](world, row) if row is not None else None
