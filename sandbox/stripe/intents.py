"""Payment intents: create, update, confirm, capture, cancel, retrieve, list."""

from __future__ import annotations

import re

from sandbox import ids
from sandbox.store import KeyedRows
from sandbox.stripe import charging, currencies, errors, methods, model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import Json, JsonObject, Params, names
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.world import World, need, pair_hash

EXTRA_TEXT = (
    "receipt_email",
    "setup_future_usage",
    "statement_descriptor",
    "statement_descriptor_suffix",
    "transfer_group",
    "on_behalf_of",
)
_SHARED = names(
    """
    amount_details capture_method confirmation_token error_on_requires_action excluded_payment_method_types expand mandate
    mandate_data payment_method payment_method_data payment_method_options payment_method_types radar_options
    receipt_email setup_future_usage shipping hooks
    """
)
CREATE_PARAMS = _SHARED | names(
    """
    amount application_fee_amount automatic_payment_methods confirm confirmation_method currency customer customer_account
    description managed_payments metadata off_session on_behalf_of payment_details payment_method_configuration return_url
    statement_descriptor statement_descriptor_suffix transfer_data transfer_group use_stripe_sdk
    """
)
UPDATE_PARAMS = _SHARED | names(
    """
    amount application_fee_amount currency customer customer_account description metadata payment_details
    payment_method_configuration statement_descriptor statement_descriptor_suffix transfer_data transfer_group
    client_secret key
    """
)
CONFIRM_PARAMS = _SHARED | names(
    """
    client_secret key off_session return_url use_stripe_sdk payment_details expected_payment_method_type
    """
)
CAPTURE_PARAMS = names(
    """
    amount_to_capture application_fee_amount final_capture metadata statement_descriptor statement_descriptor_suffix
    transfer_data expand amount_details payment_details hooks
    """
)
CANCEL_PARAMS = frozenset({"cancellation_reason", "expand", "client_secret", "key"})
CANCELLATION_REASONS = ("duplicate", "fraudulent", "requested_by_customer", "abandoned")
CAPTURE_METHODS = ("automatic", "automatic_async", "manual")
CANCELABLE = ("requires_payment_method", "requires_capture", "requires_confirmation", "requires_action")
OPEN = ("requires_payment_method", "requires_confirmation", "requires_action")
_CURRENCY = re.compile(r"[a-zA-Z]{3}\Z")


class MetadataIndex:
    """Which intents carry a pair of metadata, for search."""

    def __init__(self, world: World) -> None:
        self._rows = KeyedRows(world.store, "intent_metadata", ("pair", "intent"))

    def add(self, row: model.Intent) -> None:
        """Note the pairs of `row`."""
        for key, value in row.metadata.items():
            self._rows.put(pair_hash(key, value), ids.ordinal(row.id))


def show(call: Call, row: model.Intent) -> Object:
    """The intent as the answer to `call`."""
    return Object("payment_intent", row)


def find(world: World, call: Call, params: Params) -> model.Intent:
    """The intent of the path. A publishable key needs the right client secret."""
    row = need(world.intents, call.id, "payment_intent", "intent")
    if call.publishable:
        secret = params.text("client_secret")
        if secret is None:
            raise errors.missing_param("client_secret")
        if secret != row.client_secret:
            raise errors.invalid(
                "The client_secret provided does not match the client_secret associated with the PaymentIntent.",
                code="payment_intent_invalid_parameter",
                param="client_secret",
            )
    return row


def _check_amount(amount: int | None, currency: str, param: str = "amount") -> int:
    if amount is None:
        raise errors.missing_param(param)
    if amount < 1:
        raise errors.invalid("This value must be greater than or equal to 1.", code="parameter_invalid_integer", param=param)
    least = currencies.minimum(currency)
    if amount < least:
        raise errors.invalid(f"Amount must be at least {currencies.shown(least, currency)}", code="amount_too_small", param=param)
    if amount > currencies.maximum(currency):
        most = currencies.shown(currencies.maximum(currency), currency)
        raise errors.invalid(f"Amount must be no more than {most}", code="amount_too_large", param=param)
    return amount


def _check_currency(value: str | None) -> str:
    if value is None:
        raise errors.missing_param("currency")
    currency = value.lower()
    if not _CURRENCY.match(value) or currency not in currencies.ALL:
        raise errors.invalid(
            f"Invalid currency: {currency}. Stripe currently supports these currencies: {', '.join(sorted(currencies.ALL))}",
            param="currency",
        )
    return currency


def _extra(params: Params, before: JsonObject | None) -> JsonObject | None:
    """The members that are only handed back."""
    extra: JsonObject = dict(before or {})
    for name in EXTRA_TEXT:
        if name in params:
            extra[name] = params.text(name)
    if "application_fee_amount" in params:
        extra["application_fee_amount"] = params.integer("application_fee_amount")
    for name in ("shipping", "transfer_data"):
        if name in params:
            value: Json = params.json(name)
            extra[name] = value if value else None
    if params.text("setup_future_usage") not in (None, "on_session", "off_session"):
        raise errors.invalid("Invalid setup_future_usage: must be one of on_session or off_session", param="setup_future_usage")
    return extra or None


def _check_customer(world: World, params: Params) -> str | None:
    customer = params.text("customer")
    if customer is not None and need(world.customers, customer, "customer", "customer").deleted:
        raise errors.no_such("customer", customer, "customer")
    return customer


def _off_session(params: Params) -> bool:
    """Whether the buyer isn't there to authenticate, so that a card which asks for it is declined."""
    value = params.text("off_session")
    return value not in (None, "false", "False", "0") or bool(params.boolean("error_on_requires_action"))


def create(world: World, call: Call) -> Result:
    """POST /v1/payment_intents."""
    params = call.params
    params.allow(CREATE_PARAMS)
    currency = _check_currency(params.text("currency"))
    amount = _check_amount(params.integer("amount"), currency)
    types = params.texts("payment_method_types")
    automatic = params.inner("automatic_payment_methods")
    if types and automatic and automatic.boolean("enabled"):
        raise errors.invalid("You may only specify one of these parameters: automatic_payment_methods, payment_method_types.")
    confirm_now = bool(params.boolean("confirm"))
    for name in ("off_session", "return_url", "error_on_requires_action", "mandate_data"):
        if name in params and not confirm_now:
            raise errors.invalid(f"You may only specify `{name}` when `confirm` is true.", param=name)
    customer = _check_customer(world, params)
    metadata = params.merge_metadata({})
    extra = _extra(params, None)
    capture_method = params.choice("capture_method", CAPTURE_METHODS) or "automatic_async"
    confirmation_method = params.choice("confirmation_method", ("automatic", "manual")) or "automatic"
    description = params.text("description")
    off_session, return_url = _off_session(params), params.text("return_url")
    method = methods.resolve(world, params)
    if confirm_now and method is None:
        raise errors.invalid(_NO_METHOD, code="payment_intent_unexpected_state")
    identifier = world.intents.new_id()
    row = model.Intent(
        id=identifier,
        created=world.now_s(),
        amount=amount,
        currency=currency,
        client_secret=f"{identifier}_secret_{ids.text(24)}",
        capture_method=capture_method,
        confirmation_method=confirmation_method,
        metadata=metadata,
        customer=customer,
        description=description,
        payment_method=method.id if method else None,
        payment_method_types=types or ["card"],
        automatic_payment_methods=not types and (automatic is None or automatic.boolean("enabled") is not False),
        extra=extra,
    )
    if method is not None:
        row.status = "requires_confirmation"
    world.intents.save(row)
    if row.metadata:
        world.metadata.add(row)
    world.events.emit("payment_intent.created", "payment_intent", row)
    if confirm_now and method is not None:
        _attempt(world, row, method, off_session=off_session, return_url=return_url)
    return show(call, row)


_NO_METHOD = (
    "You cannot confirm this PaymentIntent because it's missing a payment method. You can either update the PaymentIntent "
    "with a payment method and then confirm it again, or confirm it again directly with a payment method or ConfirmationToken."
)


def _attempt(world: World, row: model.Intent, method: model.PaymentMethod, *, off_session: bool, return_url: str | None) -> None:
    """Try the card; a refusal becomes a 402 that is stored."""
    failure = charging.attempt(world, row, method, off_session=off_session, return_url=return_url)
    if failure is not None:
        raise declined(world, row, failure)
    if row.customer and row.status in ("succeeded", "requires_capture") and row.extra and row.extra.get("setup_future_usage"):
        method.customer = row.customer
        world.payment_methods.save(method)


def declined(world: World, row: model.Intent, failure: model.LastError) -> errors.StripeError:
    """The 402 for a card that refused."""
    view = views.last_error(world, failure)
    more: dict[str, object] = {"payment_intent": views.intent(world, row)}
    for name in ("charge", "decline_code", "payment_method"):
        if name in view:
            more[name] = view[name]
    if "decline_code" in more:
        more["advice_code"] = "do_not_try_again" if failure.decline_code in ("lost_card", "stolen_card") else "try_again_later"
        more["network_decline_code"] = "01"
    param = view.get("param")
    return errors.StripeError(
        402,
        failure.type,
        failure.message,
        code=failure.code,
        param=param if isinstance(param, str) else None,
        stored=True,
        more=more,
    )


def _unexpected(world: World, row: model.Intent, message: str) -> errors.StripeError:
    return errors.unexpected_state(message, views.intent(world, row))


def confirm(world: World, call: Call) -> Result:
    """POST /v1/payment_intents/{id}/confirm."""
    params = call.params
    params.allow(CONFIRM_PARAMS)
    row = find(world, call, params)
    extra = _extra(params, row.extra)
    capture_method = params.choice("capture_method", CAPTURE_METHODS) or row.capture_method
    off_session = _off_session(params)
    return_url = params.text("return_url") or row.return_url
    if row.status == "succeeded":
        raise _unexpected(
            world, row, "You cannot confirm this PaymentIntent because it has already succeeded after being previously confirmed."
        )
    if row.status not in OPEN:
        raise _unexpected(
            world,
            row,
            f"You cannot confirm this PaymentIntent because it has a status of {row.status}. Only a PaymentIntent with one of "
            "the following statuses may be confirmed: requires_confirmation, requires_action.",
        )
    method = methods.resolve(world, params)
    if method is None and row.payment_method is not None:
        method = world.payment_methods.get(row.payment_method)
    if method is None:
        raise _unexpected(world, row, _NO_METHOD)
    row.extra, row.capture_method = extra, capture_method
    _attempt(world, row, method, off_session=off_session, return_url=return_url)
    return show(call, row)


def update(world: World, call: Call) -> Result:
    """POST /v1/payment_intents/{id}."""
    params = call.params
    params.allow(UPDATE_PARAMS)
    row = find(world, call, params)
    currency = _check_currency(params.text("currency")) if "currency" in params else row.currency
    amount = row.amount
    if "amount" in params or currency != row.currency:
        amount = _check_amount(params.integer("amount") if "amount" in params else row.amount, currency)
    changes = {"amount", "currency", "payment_method", "payment_method_data", "customer", "capture_method"} & set(params.values)
    metadata = params.merge_metadata(row.metadata)
    extra = _extra(params, row.extra)
    customer = _check_customer(world, params) if "customer" in params else row.customer
    capture_method = params.choice("capture_method", CAPTURE_METHODS) or row.capture_method
    if changes and row.status not in OPEN:
        name = sorted(changes)[0]
        raise _unexpected(
            world,
            row,
            f"This PaymentIntent's {name} could not be updated because it has a status of {row.status}. You may only update the "
            f"{name} of a PaymentIntent with one of the following statuses: {', '.join(OPEN)}.",
        )
    types, description = params.texts("payment_method_types"), params.text("description")
    method = methods.resolve(world, params)
    row.amount, row.currency, row.customer, row.capture_method = amount, currency, customer, capture_method
    row.metadata, row.extra = metadata, extra
    if "description" in params:
        row.description = description
    if types:
        row.payment_method_types = types
    if method is not None:
        row.payment_method = method.id
        if row.status == "requires_payment_method":
            row.status = "requires_confirmation"
    world.intents.save(row)
    world.metadata.add(row)
    return show(call, row)


def capture(world: World, call: Call) -> Result:
    """POST /v1/payment_intents/{id}/capture."""
    params = call.params
    params.allow(CAPTURE_PARAMS)
    row = find(world, call, params)
    asked = params.integer("amount_to_capture")
    metadata = params.merge_metadata(row.metadata)
    if row.status != "requires_capture":
        raise _unexpected(
            world,
            row,
            f"This PaymentIntent could not be captured because it has a status of {row.status}. Only a PaymentIntent with one of "
            "the following statuses may be captured: requires_capture.",
        )
    amount = row.amount_capturable if asked is None else asked
    if amount > row.amount_capturable:
        raise errors.invalid(
            f"The amount to capture ({currencies.shown(amount, row.currency)}) is greater than the amount that can be captured "
            f"({currencies.shown(row.amount_capturable, row.currency)}).",
            code="amount_too_large",
            param="amount_to_capture",
        )
    if amount < 1:
        raise errors.invalid(
            "This value must be greater than or equal to 1.", code="parameter_invalid_integer", param="amount_to_capture"
        )
    row.metadata = metadata
    world.metadata.add(row)
    charging.capture(world, row, amount)
    return show(call, row)


def cancel(world: World, call: Call) -> Result:
    """POST /v1/payment_intents/{id}/cancel; refused while `processing`."""
    params = call.params
    params.allow(CANCEL_PARAMS)
    row = find(world, call, params)
    reason = params.choice("cancellation_reason", CANCELLATION_REASONS)
    if row.status not in CANCELABLE:
        raise _unexpected(
            world,
            row,
            f"You cannot cancel this PaymentIntent because it has a status of {row.status}. Only a PaymentIntent with one of the "
            f"following statuses may be canceled: {', '.join(CANCELABLE)}.",
        )
    charging.cancel(world, row, reason)
    return show(call, row)


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/payment_intents/{id}, also with a publishable key and the client secret."""
    call.params.allow(frozenset({"expand", "client_secret", "key"}))
    return show(call, find(world, call, call.params))


def index(world: World, call: Call) -> Result:
    """GET /v1/payment_intents."""
    params = call.params
    params.allow(COMMON | {"customer"})
    customer = params.text("customer")
    return of_table(
        world.intents,
        params,
        "payment_intent",
        "/v1/payment_intents",
        lambda row: views.intent(world, row),
        [("customer", customer)] if customer else [],
    )
