"""Customers."""

from __future__ import annotations

from sandbox import ids
from sandbox.stripe import model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import JsonObject, Params, names
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.world import World, need

TEXTS = ("description", "email", "name", "phone")
PARAMS = names(
    """
    address description email expand invoice_prefix invoice_settings metadata name payment_method phone preferred_locales
    shipping tax_exempt
    """
)


def _extra(params: Params, before: JsonObject | None) -> JsonObject | None:
    extra: JsonObject = dict(before or {})
    for name in TEXTS:
        if name in params:
            extra[name] = params.text(name)
    for name in ("address", "shipping"):
        if name in params:
            extra[name] = params.json(name) or None
    exempt = params.choice("tax_exempt", ("none", "exempt", "reverse"))
    if exempt:
        extra["tax_exempt"] = exempt
    return extra or None


def create(world: World, call: Call) -> Result:
    """POST /v1/customers."""
    params = call.params
    params.allow(PARAMS)
    row = model.Customer(
        id=world.customers.new_id(),
        created=world.now_s(),
        metadata=params.merge_metadata({}),
        invoice_prefix=params.text("invoice_prefix") or ids.text(8).upper(),
        extra=_extra(params, None),
    )
    world.customers.save(row)
    world.events.emit("customer.created", "customer", row)
    return Object("customer", row)


def update(world: World, call: Call) -> Result:
    """POST /v1/customers/{id}."""
    params = call.params
    params.allow(PARAMS)
    row = need(world.customers, call.id, "customer", "id")
    row.metadata, row.extra = params.merge_metadata(row.metadata), _extra(params, row.extra)
    world.customers.save(row)
    world.events.emit("customer.updated", "customer", row)
    return Object("customer", row)


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/customers/{id}; a deleted one is still shown as deleted."""
    call.params.allow(frozenset({"expand"}))
    return Object("customer", need(world.customers, call.id, "customer", "id"))


def delete(world: World, call: Call) -> Result:
    """DELETE /v1/customers/{id}."""
    row = need(world.customers, call.id, "customer", "id")
    world.events.emit("customer.deleted", "customer", row)
    row.deleted = True
    world.customers.save(row)
    return {"id": row.id, "object": "customer", "deleted": True}


def index(world: World, call: Call) -> Result:
    """GET /v1/customers."""
    params = call.params
    params.allow(COMMON | {"email"})
    email = params.text("email")
    return of_table(
        world.customers,
        params,
        "customer",
        "/v1/customers",
        lambda row: views.customer(world, row),
        [("deleted", 0), *([("email", email)] if email else [])],
    )
