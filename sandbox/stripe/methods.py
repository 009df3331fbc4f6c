"""Payment methods: the test cards by token or number, and customers that they are attached to."""

from __future__ import annotations

from sandbox.stripe import cards, errors, model
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import Json, Params
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.views import payment_method
from sandbox.stripe.world import World, need

DATA_PARAMS = frozenset({"type", "card", "billing_details", "metadata", "allow_redisplay", "radar_options"})
CREATE_PARAMS = DATA_PARAMS | {"expand", "key", "payment_user_agent", "guid", "muid", "sid", "customer"}


def resolve(world: World, params: Params) -> model.PaymentMethod | None:
    """The payment method that a call brings (`payment_method` or `payment_method_data`), made when it is a token; else None."""
    data = params.inner("payment_method_data")
    if data is not None:
        return world.payment_methods.save(_from_data(world, data))
    token = params.text("payment_method")
    if token is None:
        return None
    return of_token(world, token)


def of_token(world: World, token: str) -> model.PaymentMethod:
    """The stored payment method `token`, or a new one when it names a test card. 404 when neither."""
    card = cards.by_token(token)
    if card is not None:
        row = model.PaymentMethod(world.payment_methods.new_id(), world.now_s(), card.name)
        return world.payment_methods.save(row)
    found = world.payment_methods.get(token)
    if found is None:
        raise errors.no_such("PaymentMethod", token, "payment_method")
    return found


def _from_data(world: World, data: Params) -> model.PaymentMethod:
    data.allow(DATA_PARAMS)
    kind = data.text("type")
    if kind is None:
        raise errors.missing_param(data.name("type"))
    if kind != "card":
        raise errors.invalid(f"The sandbox has cards only, not {kind}.", param=data.name("type"))
    fields = data.inner("card")
    if fields is None:
        raise errors.missing_param(data.name("card"))
    token, number = fields.text("token"), fields.text("number")
    card = cards.by_token(token) if token else cards.by_number(number or "")
    if card is None:
        raise errors.StripeError(402, "card_error", "Your card number is incorrect.", code="incorrect_number", param="number")
    billing = data.json("billing_details")
    return model.PaymentMethod(
        world.payment_methods.new_id(),
        world.now_s(),
        card.name,
        metadata=data.merge_metadata({}),
        billing_details=billing if isinstance(billing, dict) else None,
        exp_month=fields.integer("exp_month") or 8,
        exp_year=fields.integer("exp_year") or 2034,
    )


def create(world: World, call: Call) -> Result:
    """POST /v1/payment_methods, also with a publishable key."""
    params = call.params
    params.allow(CREATE_PARAMS)
    known = {name: value for name, value in params.values.items() if name in DATA_PARAMS}
    return Object("payment_method", world.payment_methods.save(_from_data(world, Params(known))))


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/payment_methods/{id}; a test token makes one, as at Stripe."""
    call.params.allow(frozenset({"expand"}))
    return Object("payment_method", of_token(world, call.id))


def update(world: World, call: Call) -> Result:
    """POST /v1/payment_methods/{id}: metadata and billing details."""
    params = call.params
    params.allow(frozenset({"metadata", "billing_details", "expand", "allow_redisplay", "card"}))
    row = need(world.payment_methods, call.id, "PaymentMethod", "payment_method")
    row.metadata = params.merge_metadata(row.metadata)
    billing: Json = params.json("billing_details")
    if isinstance(billing, dict):
        row.billing_details = {**(row.billing_details or {}), **billing}
    world.payment_methods.save(row)
    world.events.emit("payment_method.updated", "payment_method", row)
    return Object("payment_method", row)


def attach(world: World, call: Call) -> Result:
    """POST /v1/payment_methods/{id}/attach."""
    params = call.params
    params.allow(frozenset({"customer", "expand"}))
    customer = params.text("customer")
    if customer is None:
        raise errors.missing_param("customer")
    owner = need(world.customers, customer, "customer", "customer")
    row = of_token(world, call.id)
    if owner.deleted:
        raise errors.no_such("customer", customer, "customer")
    if row.customer is not None and row.customer != owner.id:
        raise errors.invalid("The payment method you provided has already been attached to a customer.", stored=True)
    row.customer = owner.id
    world.payment_methods.save(row)
    world.events.emit("payment_method.attached", "payment_method", row)
    return Object("payment_method", row)


def detach(world: World, call: Call) -> Result:
    """POST /v1/payment_methods/{id}/detach."""
    call.params.allow(frozenset({"expand"}))
    row = need(world.payment_methods, call.id, "PaymentMethod", "payment_method")
    if row.customer is None:
        raise errors.invalid(
            "The payment method you provided is not attached to a customer so detachment is impossible.", stored=True
        )
    before = row.customer
    row.customer = None
    world.payment_methods.save(row)
    world.events.emit("payment_method.detached", "payment_method", row, {"customer": before})
    return Object("payment_method", row)


def index(world: World, call: Call) -> Result:
    """GET /v1/payment_methods?customer= and GET /v1/customers/{id}/payment_methods."""
    params = call.params
    params.allow(COMMON | {"customer", "type"})
    customer = call.id or params.text("customer")
    if call.id:
        need(world.customers, call.id, "customer", "customer")
    url = f"/v1/customers/{call.id}/payment_methods" if call.id else "/v1/payment_methods"
    if not customer or params.choice("type", ("card", "us_bank_account", "sepa_debit", "link")) not in (None, "card"):
        return {"object": "list", "data": [], "has_more": False, "url": url}
    return of_table(
        world.payment_methods,
        params,
        "payment_method",
        url,
        lambda row: payment_method(world, row),
        [("customer", customer)],
    )
