"""Webhook endpoints: which events they get, and how what is sent to them is signed."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

import msgspec

from sandbox.delivery import Deliveries, Outgoing
from sandbox.store import Table
from sandbox.stripe import model
from sandbox.stripe.forms import JsonObject
from sandbox.stripe.world import World

USER_AGENT = "Stripe/1.0 (+https://stripe.com/docs/webhooks)"

_encode = msgspec.json.Encoder().encode


def signature(secrets: list[str], timestamp: int, body: bytes) -> str:
    """The Stripe-Signature header: one v1 for each secret that signs now."""
    signed = str(timestamp).encode() + b"." + body
    parts = [f"t={timestamp}"]
    parts += ["v1=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets]
    return ",".join(parts)


class Webhooks:
    """The account's webhooks. `show` renders an event."""

    def __init__(self, world: World, events: Table[model.Event], show: Callable[[model.Event], JsonObject]) -> None:
        self._world = world
        self._events = events
        self._show = show
        self._matches: dict[str, list[str]] = {}
        self.deliveries = Deliveries(
            store=world.store,
            clock=world.clock,
            counts=world.counts,
            faults=world.faults,
            user_agent=USER_AGENT,
            render=self._render,
        )

    def endpoints_changed(self) -> None:
        """An endpoint was made, changed or deleted."""
        self._matches.clear()

    def wanted(self, type_: str) -> list[str]:
        """The ids of the endpoints that get events of that type."""
        found = self._matches.get(type_)
        if found is None:
            rows = self._world.endpoints.page(1_000)
            found = [
                row.id for row in rows if row.status == "enabled" and ("*" in row.enabled_events or type_ in row.enabled_events)
            ]
            self._matches[type_] = found
        return found

    def enqueue(self, event: model.Event, *, lossless: bool = False) -> None:
        """Send `event` to every endpoint that wants it."""
        self.deliveries.enqueue(event.id, self.wanted(event.type), lossless=lossless)

    def _render(self, event_id: str, endpoint_id: str) -> Outgoing | None:
        event = self._events.get(event_id)
        endpoint = self._world.endpoints.get(endpoint_id)
        if event is None or endpoint is None or endpoint.status != "enabled":
            return None
        body = _encode(self._show(event))
        # Signed with the wall clock: receivers compare it with theirs, which nobody advances.
        return Outgoing(endpoint.url, body, {"Stripe-Signature": signature(self._signing(endpoint), int(time.time()), body)})

    def _signing(self, endpoint: model.WebhookEndpoint) -> list[str]:
        return endpoint.secrets if self._world.clock.now() < endpoint.rolled_until else endpoint.secrets[:1]
