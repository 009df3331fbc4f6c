"""A line for each route: what it takes, answers and refuses."""

from __future__ import annotations

from oncepay.errors import (
    BadSignature,
    InvalidAmount,
    InvalidField,
    InvalidKey,
    KeyReused,
    MissingKey,
    NotFound,
    PredecessorNotOver,
    StripeUnavailable,
    UnknownCurrency,
    WrongState,
)
from oncepay.payment import Status
from oncepay.service import NotReady
from oncepay.tipalti_client import TipaltiOff, TipaltiRefused, TipaltiUnavailable
from router.openapi import examples as ex
from router.openapi.parts import BODY, ETAG, LOCATION, REPLAYED, STORE, Json, Problems, answer, call, parameter, ref, request_body
from router.openapi.schemas import KEY, SELLER_ID, TEXT
from router.prefer import WAIT_DEFAULT_S, WAIT_MAX_S
from shard.store.lists import LIMIT_DEFAULT, LIMIT_MAX

TAGS = {
    "payments": "Submit, show, list.",
    "commands": "What may be done to a payment. Each takes an `Idempotency-Key` of its own, which counts within the payment: the "
    "same key with the same body is a replay, with another body it is refused.",
    "disputes": "What buyers dispute at their banks.",
    "sellers": "Who is paid, and the platform's fee.",
    "webhooks": "What providers tell.",
    "service": "Health, numbers, and this document.",
}

_KEY = parameter(
    "Idempotency-Key",
    "header",
    "From the key service, or up to 200 printable ASCII characters, quoted or raw.",
    {"type": "string", "minLength": 1, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    required=True,
    example=ex.KEY,
)
_COMMAND_KEY = _KEY | {"description": "The command's own key, any within the payment.", "example": ex.COMMAND_KEY}
_PREFER = parameter(
    "Prefer",
    "header",
    f"`wait=<seconds>` (RFC 7240): how long settlement may take before the answer is 202: {WAIT_DEFAULT_S:g} by default, at most "
    f"{WAIT_MAX_S:g}.",
    TEXT,
    example="wait=10",
)
_IF_NONE_MATCH = parameter(
    "If-None-Match", "header", "Entity tags that the client has: 304 when one is current.", TEXT, example='"5"'
)
_PAYMENT = parameter("key", "path", "The payment's key, percent-encoded.", KEY, example=ex.KEY)
_DISPUTE = parameter("dispute", "path", "The dispute's id at Stripe.", {"type": "string", "minLength": 1}, example="du_1QmBx2Lkd")
_SELLER = parameter("id", "path", "The seller's id, as in a cart, percent-encoded.", SELLER_ID, example=ex.SELLER_ID)
_LIMIT = parameter(
    "limit", "query", "Rows of a page.", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT}
)
_CURSOR = parameter("cursor", "query", "What the page before gave.", TEXT)

_SUBMIT_REFUSED: Problems = (
    *(MissingKey, InvalidKey, PredecessorNotOver, KeyReused, InvalidField, InvalidAmount, UnknownCurrency),
    *STORE,
)
_COMMAND_REFUSED: Problems = (MissingKey, InvalidKey, NotFound, WrongState, KeyReused, *STORE)


def _payment(text: str, example: object, headers: Json | None = None) -> Json:
    return answer(text, ref("Payment"), example, headers)


def _link(operation: str, parameter: str, member: str, text: str) -> Json:
    """What may be called with a member of an answer."""
    return {"operationId": operation, "parameters": {parameter: f"$response.body#/{member}"}, "description": text}


_LINKS = {
    name: _link(f"{name}Payment", "path.key", "key", f"{name.capitalize()} this payment.")
    for name in ("show", "confirm", "cancel", "capture", "refund")
}
_SELLER_LINKS = {"show": _link("showSeller", "path.id", "id", "Show this seller.")}


def _settled(made: str, example: object) -> dict[str, Json]:
    """The answers of what is driven on: made or done now, a replay, in flight."""
    answers = {
        "200": _payment(
            "Settled, or waiting for the buyer or the merchant; or a replay: the payment as it is now.", example, REPLAYED
        ),
        "202": _payment("In flight; `Location` tells where to look.", ex.PAYMENT_IN_FLIGHT, {**LOCATION, **REPLAYED}),
    }
    if made:
        answers["201"] = _payment(made, example)
    return {status: found | {"links": _LINKS} for status, found in answers.items()}


def _command(
    name: str, summary: str, about: str, body: Json, *, made: str = "", example: object = ex.PAYMENT, refused: Problems = ()
) -> Json:
    return call(
        name,
        summary,
        _settled(made, example),
        about=about,
        tag="commands",
        scope="refund" if name == "refundPayment" else "pay",
        parameters=[_PAYMENT, _COMMAND_KEY, _PREFER],
        body=body,
        problems=(*_COMMAND_REFUSED, *refused),
    )


_SUBMIT = call(
    "submitPayment",
    "Submit a payment",
    _settled("Made by this call, and settled, or waiting for the buyer or the merchant: look at `status`.", ex.PAYMENT),
    about="One key, at most one charge. The same key with the same buyer, currency, items and capture method answers with the "
    "payment as it is now, and charges nothing.",
    tag="payments",
    scope="pay",
    parameters=[_KEY, _PREFER],
    body=request_body(ref("PaymentBody"), {"pay": ex.PAY, "authorise": ex.PAY_LATER, "try again": ex.PAY_AGAIN}),
    problems=_SUBMIT_REFUSED,
)
_SHOW = call(
    "showPayment",
    "Show a payment with its ledger entries",
    {
        "200": _payment("The payment.", ex.PAYMENT_WITH_ENTRIES, ETAG),
        "304": answer("The client has this version.", None, headers=ETAG),
    },
    about="What is shown is on a majority of its shard's nodes.",
    tag="payments",
    scope="read",
    parameters=[_PAYMENT, _IF_NONE_MATCH],
    problems=(NotFound, *STORE),
)
_LIST = call(
    "listPayments",
    "List payments, newest first",
    {"200": answer("A page.", ref("PaymentPage"), ex.PAYMENTS)},
    about="A page that filters may hold fewer than `limit`; as long as there is a `cursor`, there may be more.",
    tag="payments",
    scope="read",
    parameters=[
        parameter("buyer", "query", "Of this buyer only.", TEXT),
        parameter("seller", "query", "With items of this seller only.", TEXT),
        parameter("status", "query", "In this state only.", {"type": "string", "enum": [status.value for status in Status]}),
        _CURSOR,
        _LIMIT,
    ],
    problems=(InvalidField, *STORE),
)
_CONFIRM = _command(
    "confirmPayment",
    "Try another payment method",
    "On the same payment, after a decline, or when it was submitted without one.",
    request_body(ref("ConfirmBody"), {"card": {"payment_method": "pm_card_mastercard"}}),
    refused=(InvalidField,),
)
_CANCEL = _command(
    "cancelPayment",
    "Give a payment up",
    "If it turns out that it was paid, that is the outcome.",
    request_body(ref("CancelBody"), {"cancel": {}}, required=False),
    example=ex.PAYMENT_CANCELED,
)
_CAPTURE = _command(
    "capturePayment",
    "Capture what was authorised, or a part of it",
    "The rest is released. There is one capture a payment.",
    request_body(ref("CaptureBody"), {"all": {}, "amount": {"amount": 1000}, "items": ex.PART}, required=False),
    refused=(InvalidAmount, InvalidField),
)
_REFUND = _command(
    "refundPayment",
    "Refund a payment, or a part of it",
    "Refunds that aren't failed or canceled count against what is left.",
    request_body(
        ref("RefundBody"),
        {"all": {}, "amount": {"amount": 500, "reason": "requested_by_customer"}, "items": ex.PART},
        required=False,
    ),
    made="The refund is on its way, or done: see `refunds`.",
    example=ex.PAYMENT_REFUNDED,
    refused=(InvalidAmount, InvalidField),
)
_DISPUTES = call(
    "listDisputes",
    "List disputes",
    {"200": answer("A page.", ref("DisputePage"), ex.DISPUTES)},
    tag="disputes",
    scope="read",
    parameters=[_CURSOR, _LIMIT],
    problems=(InvalidField, *STORE),
)
_EVIDENCE = call(
    "putEvidence",
    "Put evidence to a dispute",
    {"200": answer("The dispute.", ref("Dispute"), ex.DISPUTE)},
    tag="disputes",
    scope="operate",
    parameters=[_PAYMENT, _DISPUTE],
    body=request_body(ref("EvidenceBody"), {"tracking": ex.EVIDENCE}),
    problems=(NotFound, WrongState, InvalidField, StripeUnavailable, *STORE),
)
_PUT_SELLER = call(
    "putSeller",
    "Put a seller",
    {
        "200": answer("Replaced, or the same as before.", ref("Seller"), ex.SELLER_SHOWN, ETAG),
        "201": answer("Made by this call.", ref("Seller"), ex.SELLER_SHOWN, ETAG) | {"links": _SELLER_LINKS},
    },
    about="Replaces the whole record; the same again changes nothing. A change of the fee takes effect within 5 s, for payments "
    "that are made after. The seller `platform` is reserved.",
    tag="sellers",
    scope="operate",
    parameters=[_SELLER],
    body=request_body(ref("SellerBody"), {"own fee": ex.SELLER, "the deployment's fee": {"payee": "p-9", "currency": "eur"}}),
    problems=(InvalidField, UnknownCurrency, *STORE),
)
_SHOW_SELLER = call(
    "showSeller",
    "Show a seller",
    {
        "200": answer("The seller.", ref("Seller"), ex.SELLER_SHOWN, ETAG),
        "304": answer("The client has this version.", None, headers=ETAG),
    },
    tag="sellers",
    scope="read",
    parameters=[_SELLER, _IF_NONE_MATCH],
    problems=(NotFound, *STORE),
)
_STRIPE = call(
    "receiveStripeEvent",
    "Take an event of Stripe's",
    {"200": answer("Its effect is committed.", ref("Received"), {"received": True, "outcome": "applied"})},
    about="Signed with the endpoint's secret over the raw body.",
    tag="webhooks",
    scope=None,
    parameters=[parameter("Stripe-Signature", "header", "Stripe's signature.", TEXT, example="t=1789555800,v1=5257a869e7")],
    body=request_body({"type": "object"}, {}),
    problems=(BadSignature, *BODY, StripeUnavailable, *STORE),
)


_TIPALTI = call(
    "receiveTipaltiNotification",
    "Take a notification of Tipalti's",
    {"200": answer("What a look at the payment showed is committed.", ref("Received"), {"received": True, "outcome": "applied"})},
    about="Signed with the account's secret over the raw body; without a secret it is sent back to Tipalti to be verified, "
    "a few at once. At most 64 KiB.",
    tag="webhooks",
    scope=None,
    parameters=[parameter("tipalti-signature", "header", "Tipalti's signature.", TEXT, example="1789555800,5257a869e7")],
    body=request_body({"type": "object"}, {}),
    problems=(BadSignature, *BODY, TipaltiOff, TipaltiRefused, TipaltiUnavailable, *STORE),
)


def _service(name: str, summary: str, found: Json, problems: Problems = ()) -> Json:
    return call(name, summary, {"200": found}, tag="service", scope=None, problems=problems)


PATHS: dict[str, Json] = {
    "/v1/payments": {"post": _SUBMIT, "get": _LIST},
    "/v1/payments/{key}": {"get": _SHOW},
    "/v1/payments/{key}/confirm": {"post": _CONFIRM},
    "/v1/payments/{key}/cancel": {"post": _CANCEL},
    "/v1/payments/{key}/capture": {"post": _CAPTURE},
    "/v1/payments/{key}/refunds": {"post": _REFUND},
    "/v1/disputes": {"get": _DISPUTES},
    "/v1/payments/{key}/disputes/{dispute}/evidence": {"post": _EVIDENCE},
    "/v1/sellers/{id}": {"put": _PUT_SELLER, "get": _SHOW_SELLER},
    "/v1/webhooks/stripe": {"post": _STRIPE},
    "/v1/webhooks/tipalti": {"post": _TIPALTI},
    "/livez": {
        "get": _service(
            "alive",
            "Whether the process runs",
            answer("It does.", ref("Alive"), {"ok": True, "service": "router", "name": "router-1"}),
        )
    },
    "/readyz": {
        "get": _service(
            "ready",
            "Whether the process takes requests",
            answer("It does.", ref("Ready"), {"ok": True, "checks": {"store": "ok"}}),
            (NotReady,),
        )
    },
    "/metrics": {"get": _service("metrics", "Numbers for Prometheus", answer("In its text format.", TEXT, media="text/plain"))},
    "/openapi.json": {"get": _service("document", "This document", answer("OpenAPI 3.1.", {"type": "object"}))},
    "/docs": {"get": _service("docs", "This document as a page", answer("HTML.", TEXT, media="text/html"))},
}
