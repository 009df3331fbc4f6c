"""Events: what happened, in order, kept for 30 days of the clock, and handed to the webhooks."""

from __future__ import annotations

from typing import Any

from sandbox.store import Table
from sandbox.stripe import model, views
from sandbox.stripe.forms import Json, JsonObject
from sandbox.stripe.webhooks import Webhooks
from sandbox.stripe.world import World

RETENTION_S = 30 * 86_400
TWIN_SHARE = 0.25
"""Of doubled webhooks, those that come as two events with different ids."""

TYPES = (
    "payment_intent.created",
    "payment_intent.succeeded",
    "payment_intent.payment_failed",
    "payment_intent.canceled",
    "payment_intent.processing",
    "payment_intent.requires_action",
    "payment_intent.amount_capturable_updated",
    "charge.succeeded",
    "charge.failed",
    "charge.pending",
    "charge.captured",
    "charge.expired",
    "charge.refunded",
    "charge.updated",
    "charge.refund.updated",
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "customer.created",
    "customer.updated",
    "customer.deleted",
    "payment_method.attached",
    "payment_method.detached",
    "payment_method.updated",
    "payout.created",
    "payout.updated",
    "payout.paid",
    "payout.failed",
    "payout.canceled",
)
"""Every type that the stand-in emits; a type's place is its number in the state file, so new ones go to the end."""

NUMBER = {name: number for number, name in enumerate(TYPES)}


class Events:
    """The account's events. `cause` is the API call that is being executed, if one is."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.table = Table(world.store, "events", "evt_", model.Event, {"type": lambda row: NUMBER[row.type]})
        self.webhooks = Webhooks(world, self.table, self.show)
        self.request: str | None = None
        self.idempotency_key: str | None = None

    def emit(self, type_: str, kind: str, row: Any, previous: dict[str, Json] | None = None) -> None:
        """`type_` happened to `row`, an object of `kind`; `previous` holds the former values of what changed."""
        world = self._world
        event = model.Event(
            id=self.table.new_id(),
            created=world.now_s(),
            type=type_,
            kind=kind,
            snapshot=world.tables[kind].pack(row),
            previous=previous,
            request=self.request,
            idempotency_key=self.idempotency_key,
        )
        self.table.save(event)
        if not self.webhooks.wanted(type_):
            return
        if world.faults.hits("webhook_doubled", "event"):
            world.counts.webhooks["doubled"] += 1
            twin = event
            if world.faults.fraction("webhook_twin", "event") < TWIN_SHARE:
                twin = model.Event(**{**_members(event), "id": self.table.new_id()})
                self.table.save(twin)
            self.webhooks.enqueue(twin, lossless=True)
        self.webhooks.enqueue(event)

    def show(self, event: model.Event) -> JsonObject:
        """An event in Stripe's shape."""
        return views.event(self._world, event, self.webhooks.deliveries.pending[event.id])


def _members(event: model.Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}
