"""Telling the stand-ins where to send their events: Stripe's in the way that the real Stripe is told, Tipalti's by its control
API, since the real Tipalti is told in its web pages."""

from __future__ import annotations

import http.client
import json
import urllib.parse

from deploy.local.errors import ClusterError
from deploy.local.layout import Layout, write_secret

EVENTS = (
    "payment_intent.succeeded",
    "payment_intent.canceled",
    "payment_intent.payment_failed",
    "payment_intent.processing",
    "payment_intent.requires_action",
    "payment_intent.amount_capturable_updated",
    "charge.captured",
    "charge.updated",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "charge.refunded",
    "charge.refund.updated",
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
)
"""What the router handles. An endpoint for all events would only cost both sides."""
TIMEOUT_S = 5.0
PAGE = 100


class WebhookNotRegistered(ClusterError):
    """The stand-in didn't take the webhook endpoint."""


def _call(port: int, key: str, method: str, path: str, form: dict[str, str] | None = None) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/x-www-form-urlencoded"}
    try:
        connection.request(method, path, urllib.parse.urlencode(form or {}), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WebhookNotRegistered(f"{method} {path}: {error}") from error
    finally:
        connection.close()
    if response.status != 200 or not isinstance(answer, dict):
        raise WebhookNotRegistered(f"{method} {path}: status {response.status}, {answer}")
    return answer


def register(layout: Layout, port: int, key: str, url: str) -> None:
    """Make an endpoint for `url` unless there is one, and keep its signing secret. Raises WebhookNotRegistered.

    A secret is told only once: an endpoint whose secret isn't kept here is made anew.
    """
    listed = _call(port, key, "GET", f"/v1/webhook_endpoints?limit={PAGE}").get("data")
    existing = [each for each in (listed if isinstance(listed, list) else []) if each.get("url") == url]
    if existing and layout.stripe_webhook_secret.exists():
        return
    for endpoint in existing:
        _call(port, key, "DELETE", f"/v1/webhook_endpoints/{endpoint['id']}")
    form = {"url": url} | {f"enabled_events[{i}]": name for i, name in enumerate(EVENTS)}
    made = _call(port, key, "POST", "/v1/webhook_endpoints", form)
    secret = made.get("secret")
    if not isinstance(secret, str) or not secret:
        raise WebhookNotRegistered("the stand-in told no signing secret")
    write_secret(layout.stripe_webhook_secret, secret.encode() + b"\n")


def register_notifications(port: int, url: str, secret: str) -> None:
    """Have the stand-in for Tipalti send its notifications to `url`, signed with `secret`. Raises WebhookNotRegistered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        body = json.dumps({"url": url, "secret": secret})
        connection.request("POST", "/_control/notifications", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise WebhookNotRegistered(f"POST /_control/notifications: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise WebhookNotRegistered(f"POST /_control/notifications: status {response.status}, {answer!r}")
