"""The events list and webhook endpoints, over the API."""

from __future__ import annotations

from sandbox import ids
from sandbox.stripe import errors, listing, model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.events import NUMBER, RETENTION_S, TYPES
from sandbox.stripe.forms import JsonObject, Params
from sandbox.stripe.listing import COMMON
from sandbox.stripe.world import World

ROLL_S = 24 * 3_600
ENDPOINT_PARAMS = frozenset({"url", "enabled_events", "description", "metadata", "api_version", "connect", "disabled", "expand"})
ENDPOINTS_MAX = 16
"""Stripe's own bound on endpoints of an account."""
SECRET_LENGTH = 32


def retrieve_event(world: World, call: Call) -> Result:
    """GET /v1/events/{id}."""
    call.params.allow(frozenset({"expand"}))
    row = world.events.table.get(call.id)
    if row is None or row.created < world.now_s() - RETENTION_S:
        raise errors.no_such("event", call.id, "id")
    return world.events.show(row)


def _matching(pattern: str) -> list[int]:
    """The numbers of the event types that `pattern` (`charge.*`, or a plain type) means."""
    if pattern == "*":
        return list(range(len(TYPES)))
    if pattern.endswith(".*"):
        return [number for number, name in enumerate(TYPES) if name.startswith(pattern[:-1])]
    return [NUMBER[pattern]] if pattern in NUMBER else []


def list_events(world: World, call: Call) -> Result:
    """GET /v1/events by `type` (with `*`), `types[]`, `created` and cursors; 30 days back."""
    params = call.params
    params.allow(COMMON | {"type", "types", "delivery_success"})
    table = world.events.table
    window = listing.Window(table, params, "event")
    window.low = max(window.low, table.first_since(world.now_s() - RETENTION_S) - 1)
    patterns = params.texts("types")
    single = params.text("type")
    if patterns is not None and single is not None:
        raise errors.invalid("You may only specify one of these parameters: type, types.")
    if patterns is not None and len(patterns) > 20:
        raise errors.invalid("types can have up to 20 names.", param="types")
    if single is not None:
        patterns = [single]
    low, high = window.low, window.high
    if patterns is None:
        rows = table.page(window.limit + 1, low=low, high=high, ascending=window.ascending)
    else:
        rows = []
        for number in sorted({number for pattern in patterns for number in _matching(pattern)}):
            rows += table.page(window.limit + 1, low=low, high=high, ascending=window.ascending, filters=[("type", number)])
        rows.sort(key=lambda row: ids.ordinal(row.id), reverse=not window.ascending)
        rows = rows[: window.limit + 1]
    delivered = params.boolean("delivery_success")
    if delivered is not None:
        rows = [row for row in rows if (row.id not in world.events.webhooks.deliveries.pending) == delivered]
    return listing.answer(rows, window, "/v1/events", world.events.show)


def _enabled_events(params: Params) -> list[str] | None:
    names = params.texts("enabled_events")
    if names is None:
        return None
    if not names:
        raise errors.missing_param("enabled_events")
    for name in names:
        if name != "*" and ("." not in name or len(name) > 100):
            raise errors.invalid(f"Invalid event type: {name}", param="enabled_events")
    return names


def _url(params: Params) -> str | None:
    url = params.text("url")
    if url is not None and not url.startswith(("http://", "https://")):
        raise errors.invalid("Invalid URL: URL must be an http or https URL.", code="url_invalid", param="url")
    return url


def _find(world: World, call: Call) -> model.WebhookEndpoint:
    row = world.endpoints.get(call.id)
    if row is None:
        raise errors.no_such("webhook endpoint", call.id, "webhook_endpoint")
    return row


def create_endpoint(world: World, call: Call) -> Result:
    """POST /v1/webhook_endpoints; only this answer shows the signing secret."""
    params = call.params
    params.allow(ENDPOINT_PARAMS)
    url, names = _url(params), _enabled_events(params)
    if url is None:
        raise errors.missing_param("url")
    if names is None:
        raise errors.missing_param("enabled_events")
    if len(world.endpoints.page(ENDPOINTS_MAX)) >= ENDPOINTS_MAX:
        raise errors.invalid(f"You have reached the maximum of {ENDPOINTS_MAX} test webhook endpoints.")
    secret = "whsec_" + ids.text(SECRET_LENGTH)
    row = model.WebhookEndpoint(
        id=world.endpoints.new_id(),
        created=world.now_s(),
        url=url,
        enabled_events=names,
        secrets=[secret],
        description=params.text("description"),
        metadata=params.merge_metadata({}),
        api_version=params.text("api_version"),
    )
    world.endpoints.save(row)
    world.events.webhooks.endpoints_changed()
    return Object("webhook_endpoint", row, {"secret": secret})


def update_endpoint(world: World, call: Call) -> Result:
    """POST /v1/webhook_endpoints/{id}."""
    params = call.params
    params.allow(ENDPOINT_PARAMS)
    row = _find(world, call)
    url, names, disabled = _url(params), _enabled_events(params), params.boolean("disabled")
    metadata, description = params.merge_metadata(row.metadata), params.text("description")
    row.url, row.enabled_events, row.metadata = url or row.url, names or row.enabled_events, metadata
    if "description" in params:
        row.description = description
    if disabled is not None:
        row.status = "disabled" if disabled else "enabled"
    world.endpoints.save(row)
    world.events.webhooks.endpoints_changed()
    return Object("webhook_endpoint", row)


def delete_endpoint(world: World, call: Call) -> Result:
    """DELETE /v1/webhook_endpoints/{id}."""
    row = _find(world, call)
    world.endpoints.delete(row)
    world.events.webhooks.endpoints_changed()
    return {"id": row.id, "object": "webhook_endpoint", "deleted": True}


def retrieve_endpoint(world: World, call: Call) -> Result:
    """GET /v1/webhook_endpoints/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("webhook_endpoint", _find(world, call))


def list_endpoints(world: World, call: Call) -> Result:
    """GET /v1/webhook_endpoints."""
    call.params.allow(COMMON)
    return listing.of_table(
        world.endpoints,
        call.params,
        "webhook endpoint",
        "/v1/webhook_endpoints",
        lambda row: views.webhook_endpoint(world, row),
    )


def roll_secret(world: World, endpoint_id: str, expires_in_s: float) -> JsonObject:
    """Give the endpoint a new secret; the old one signs too for `expires_in_s` seconds. (In the Dashboard, at Stripe.)"""
    row = world.endpoints.get(endpoint_id)
    if row is None:
        raise ValueError(f"no webhook endpoint {endpoint_id}")
    row.secrets = ["whsec_" + ids.text(SECRET_LENGTH), row.secrets[0]]
    row.rolled_until = int(world.clock.now() + expires_in_s)
    world.endpoints.save(row)
    return {"id": row.id, "secret": row.secrets[0], "expires_in_s": expires_in_s}
