"""Which handler answers which call."""

from __future__ import annotations

import msgspec

from sandbox.stripe import customers, disputes, feed, intents, ledger, methods, payouts, refunds, search
from sandbox.stripe.call import Handler


class Route(msgspec.Struct, frozen=True):
    """A handler and the name that its calls are counted and limited under. `browser`: a publishable key will do."""

    name: str
    handler: Handler
    browser: bool = False


_API: list[tuple[str, str, Handler]] = [
    ("POST", "payment_intents", intents.create),
    ("GET", "payment_intents", intents.index),
    ("GET", "payment_intents/search", search.intents),
    ("GET", "payment_intents/{id}", intents.retrieve),
    ("POST", "payment_intents/{id}", intents.update),
    ("POST", "payment_intents/{id}/confirm", intents.confirm),
    ("POST", "payment_intents/{id}/capture", intents.capture),
    ("POST", "payment_intents/{id}/cancel", intents.cancel),
    ("GET", "charges", ledger.list_charges),
    ("GET", "charges/{id}", ledger.retrieve_charge),
    ("POST", "charges/{id}", ledger.update_charge),
    ("GET", "charges/{id}/refunds", refunds.index),
    ("GET", "balance", ledger.balance),
    ("GET", "balance_transactions", ledger.list_transactions),
    ("GET", "balance_transactions/{id}", ledger.retrieve_transaction),
    ("POST", "refunds", refunds.create),
    ("GET", "refunds", refunds.index),
    ("GET", "refunds/{id}", refunds.retrieve),
    ("POST", "refunds/{id}", refunds.update),
    ("POST", "refunds/{id}/cancel", refunds.cancel),
    ("GET", "disputes", disputes.index),
    ("GET", "disputes/{id}", disputes.retrieve),
    ("POST", "disputes/{id}", disputes.update),
    ("POST", "disputes/{id}/close", disputes.close),
    ("POST", "payment_methods", methods.create),
    ("GET", "payment_methods", methods.index),
    ("GET", "payment_methods/{id}", methods.retrieve),
    ("POST", "payment_methods/{id}", methods.update),
    ("POST", "payment_methods/{id}/attach", methods.attach),
    ("POST", "payment_methods/{id}/detach", methods.detach),
    ("POST", "customers", customers.create),
    ("GET", "customers", customers.index),
    ("GET", "customers/{id}", customers.retrieve),
    ("POST", "customers/{id}", customers.update),
    ("DELETE", "customers/{id}", customers.delete),
    ("GET", "customers/{id}/payment_methods", methods.index),
    ("POST", "payouts", payouts.create),
    ("GET", "payouts", payouts.index),
    ("GET", "payouts/{id}", payouts.retrieve),
    ("POST", "payouts/{id}", payouts.update),
    ("POST", "payouts/{id}/cancel", payouts.cancel),
    ("POST", "payouts/{id}/reverse", payouts.reverse),
    ("GET", "events", feed.list_events),
    ("GET", "events/{id}", feed.retrieve_event),
    ("POST", "webhook_endpoints", feed.create_endpoint),
    ("GET", "webhook_endpoints", feed.list_endpoints),
    ("GET", "webhook_endpoints/{id}", feed.retrieve_endpoint),
    ("POST", "webhook_endpoints/{id}", feed.update_endpoint),
    ("DELETE", "webhook_endpoints/{id}", feed.delete_endpoint),
]

_BROWSER = {
    "GET /v1/payment_intents/{id}",
    "POST /v1/payment_intents/{id}/confirm",
    "POST /v1/payment_methods",
}

PREFIX = "/v1/"


def _table() -> dict[tuple[str, str], Route]:
    table = {}
    for method, path, handler in _API:
        name = f"{method} {PREFIX}{path}"
        table[(method, path)] = Route(name, handler, name in _BROWSER)
    return table


ROUTES = _table()


def find(method: str, path: str) -> tuple[Route | None, str]:
    """The route for a path under `/v1/`, and the id in it (or ``''``)."""
    parts = path[len(PREFIX) :].rstrip("/").split("/")
    count = len(parts)
    if count == 1:
        return ROUTES.get((method, parts[0])), ""
    if count == 2:
        exact = ROUTES.get((method, f"{parts[0]}/{parts[1]}"))
        return (exact, "") if exact else (ROUTES.get((method, parts[0] + "/{id}")), parts[1])
    if count == 3:
        return ROUTES.get((method, f"{parts[0]}/{{id}}/{parts[2]}")), parts[1]
    return None, ""
