"""The shapes. Bodies come from the types that decode them, with the limits that are checked after decoding."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from oncepay.cart import BUYER_LENGTH_MAX, ITEMS_MAX, QUANTITY_MAX, SELLER_LENGTH_MAX
from oncepay.errors import PROBLEM_BASE
from oncepay.keys import KEY_CHARACTERS
from oncepay.money import MAXIMUM_MINOR
from oncepay.payment import RefundStatus, Status
from router.bodies import (
    BASIS_POINTS_MAX,
    EXPIRES_MAX_S,
    EXPIRES_MIN_S,
    METADATA_KEY_LENGTH_MAX,
    METADATA_KEYS_MAX,
    METADATA_VALUE_LENGTH_MAX,
    PAYEE_LENGTH_MAX,
    CancelBody,
    CaptureBody,
    ConfirmBody,
    PaymentBody,
    RefundBody,
    SellerBody,
)
from router.lists import EVIDENCE_CHARACTERS_MAX, EvidenceBody
from router.openapi.parts import Json, ref

BODIES = (PaymentBody, ConfirmBody, CancelBody, CaptureBody, RefundBody, EvidenceBody, SellerBody)

TEXT: Json = {"type": "string"}
AMOUNT: Json = {"type": "integer", "minimum": 0, "description": "Minor units."}
TIME: Json = {"type": "string", "format": "date-time"}
SELLER_ID: Json = {"type": "string", "minLength": 1, "maxLength": SELLER_LENGTH_MAX, "description": "Printable characters."}
KEY: Json = {"type": "string", "minLength": 1, "maxLength": KEY_CHARACTERS, "pattern": "^[ -~]+$"}
CURRENCY: Json = {"type": "string", "pattern": "^[A-Za-z]{3}$", "description": "ISO 4217, in either case."}
CURRENCY_SHOWN: Json = {"type": "string", "pattern": "^[a-z]{3}$"}
PROVIDER_ID: Json = {"type": "string", "pattern": "^[A-Za-z0-9_]{1,255}$", "description": "An id at Stripe."}
PART_AMOUNT: Json = {"minimum": 1, "maximum": MAXIMUM_MINOR, "description": "Minor units."}

_LIMITS: dict[str, dict[str, Json]] = {
    "PaymentBody": {
        "buyer": {"minLength": 1, "maxLength": BUYER_LENGTH_MAX, "description": "Your id of the buyer: printable characters."},
        "currency": CURRENCY,
        "items": {"minItems": 1, "maxItems": ITEMS_MAX},
        "payment_method": {
            "pattern": "^[A-Za-z0-9_]{0,255}$",
            "description": "The id of a payment method at Stripe. With it the payment is confirmed at once, else by a browser.",
        },
        "capture_method": {"description": "`manual`: authorised now, captured by a call later."},
        "on_decline": {"description": "`fail` (the default with a payment method): a decline ends the payment; `retry`: not."},
        "after": {
            "maxLength": KEY_CHARACTERS,
            "pattern": "^[ -~]*$",
            "description": "The key of a payment that failed or was canceled, or never arrived, which this one tries again.",
        },
        "metadata": {
            "maxProperties": METADATA_KEYS_MAX,
            "propertyNames": {"minLength": 1, "maxLength": METADATA_KEY_LENGTH_MAX},
            "additionalProperties": {"type": "string", "minLength": 1, "maxLength": METADATA_VALUE_LENGTH_MAX},
            "description": "Goes to Stripe with the intent. Names that begin with `oncepay_` are reserved.",
        },
        "expires_in": {
            "minimum": EXPIRES_MIN_S,
            "maximum": EXPIRES_MAX_S,
            "description": "Seconds until an unfinished payment is given up.",
        },
        "customer": {"pattern": "^[A-Za-z0-9_]{0,255}$", "description": "The id of a customer at Stripe."},
        "off_session": {"description": "Whether the buyer is away."},
    },
    "Item": {
        "seller": SELLER_ID | {"description": "The seller's id; `platform` for shipping, tax and service, without a fee."},
        "amount": {"minimum": 0, "maximum": MAXIMUM_MINOR, "description": "The price of one unit, in minor units."},
        "quantity": {"minimum": 1, "maximum": QUANTITY_MAX},
        "description": {"maxLength": 500},
    },
    "PartItem": {"seller": SELLER_ID, "amount": PART_AMOUNT},
    "ConfirmBody": {"payment_method": PROVIDER_ID},
    "CaptureBody": {
        "amount": {"description": "Minor units; all that was authorised when neither this nor `items` is given."},
        "items": {"description": "The part of some sellers; `amount`, when given too, has to be their sum."},
    },
    "RefundBody": {
        "amount": {"description": "Minor units, spread over what is left of each seller's share; all that is left by default."},
        "items": {"description": "The part of some sellers; `amount`, when given too, has to be their sum."},
    },
    "EvidenceBody": {
        "evidence": {
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "additionalProperties": {"type": "string", "maxLength": EVIDENCE_CHARACTERS_MAX},
            "description": "Stripe's names of evidence, and their texts.",
        },
        "submit": {"description": "Hand it in for good."},
    },
    "SellerBody": {
        "payee": {
            "minLength": 1,
            "maxLength": PAYEE_LENGTH_MAX,
            "description": "The payee's id at Tipalti: printable characters.",
        },
        "currency": CURRENCY | {"description": "What the seller is paid in: ISO 4217, in either case."},
        "fee": {"description": "Null or absent: the deployment's fee."},
    },
    "Fee": {
        "basis_points": {"minimum": 0, "maximum": BASIS_POINTS_MAX, "description": "Of the seller's total in a payment."},
        "fixed_minor": {
            "minimum": 0,
            "maximum": MAXIMUM_MINOR,
            "description": "Once a payment, in minor units of the payment's currency.",
        },
    },
}


def _bodies() -> dict[str, Json]:
    _, components = msgspec.json.schema_components(BODIES, ref_template="#/components/schemas/{name}")
    for name, members in _LIMITS.items():
        for member, more in members.items():
            found: Json = components[name]["properties"][member]  # a KeyError here: a limit of a member that is gone
            found.update(more)
    return components


def _object(text: str, required: dict[str, Json], optional: dict[str, Json] | None = None) -> Json:
    return {
        "type": "object",
        "description": text,
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list(schema: Json, **more: object) -> Json:
    return {"type": "array", "items": schema, **more}


def _nullable(schema: Json) -> Json:
    return schema | {"type": [schema["type"], "null"]}


_PAYMENT = _object(
    "A payment as it is now.",
    {
        "key": KEY,
        "status": {"type": "string", "enum": [status.value for status in Status]},
        "buyer": TEXT,
        "currency": CURRENCY_SHOWN,
        "amount": AMOUNT,
        "amount_captured": AMOUNT,
        "amount_refunded": AMOUNT,
        "items": _list(ref("Item")),
        "platform_fee": AMOUNT | {"description": "The platform's part when all is captured, in minor units."},
        "payment_intent": _nullable(TEXT),
        "capture_method": {"type": "string", "enum": ["automatic", "manual"]},
        "on_decline": {"type": "string", "enum": ["fail", "retry"]},
        "created_at": TIME,
        "updated_at": TIME,
        "expires_at": TIME | {"description": "When it is given up, should it not be over by then."},
        "version": {"type": "integer", "minimum": 1, "description": "Grows by one with each change."},
    },
    {
        "client_secret": TEXT | {"description": "With it a browser confirms; there until the payment is over."},
        "next_action": _object("Where the buyer has to go.", {"type": TEXT, "url": {"type": "string", "format": "uri"}}),
        "failure": _object("Why the last attempt didn't pay.", {"code": TEXT}, {"message": TEXT, "decline_code": TEXT}),
        "metadata": {"type": "object", "additionalProperties": TEXT},
        "after": KEY | {"description": "The payment that this one tries again."},
        "successor": KEY | {"description": "The payment that tries this one again."},
        "refunds": _list(ref("Refund")),
        "disputes": _list(ref("Dispute")),
        "entries": _list(ref("Entry"), description="Its ledger entries, where a single payment is asked for."),
    },
)
_REFUND = _object(
    "A refund.",
    {
        "key": TEXT | {"description": "The caller's, or `stripe:<id>` for one that was made at Stripe."},
        "status": {"type": "string", "enum": list(get_args(RefundStatus))},
        "amount": AMOUNT,
        "items": _list(_object("A seller's part.", {"seller": TEXT, "amount": AMOUNT})),
        "refund": _nullable(TEXT) | {"description": "Its id at Stripe."},
        "created_at": TIME,
    },
    {"reason": TEXT, "failure": TEXT},
)
_DISPUTE = _object(
    "A dispute of a payment.",
    {
        "id": TEXT,
        "payment": KEY,
        "status": TEXT | {"description": "As Stripe calls it."},
        "amount": AMOUNT,
        "currency": CURRENCY_SHOWN,
        "reason": TEXT,
        "evidence_due": _nullable(TIME),
    },
)
_ENTRY = _object(
    "A ledger entry. Its postings sum to zero: debits are positive, credits negative.",
    {
        "id": TEXT,
        "kind": TEXT,
        "currency": CURRENCY_SHOWN,
        "source": TEXT | {"description": "What caused it: an id at a provider."},
        "postings": _list(_object("A posting.", {"account": TEXT, "amount": {"type": "integer"}}), minItems=2),
    },
)
_SELLER = _object(
    "A seller.",
    {
        "id": SELLER_ID,
        "payee": TEXT,
        "currency": CURRENCY_SHOWN,
        "fee": {"anyOf": [{"type": "null"}, ref("Fee")], "description": "Null: the deployment's fee."},
        "created_at": TIME,
        "updated_at": TIME,
        "version": {"type": "integer", "minimum": 1},
    },
)
_CURSOR = _nullable(TEXT) | {"description": "Leads on to the next page; null at the end."}
_PROBLEM = _object(
    "What went wrong (RFC 9457).",
    {
        "type": {"type": "string", "format": "uri", "description": f"Stable: `{PROBLEM_BASE}` and the problem's name."},
        "title": TEXT,
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
    },
    {
        "detail": TEXT | {"description": "For people."},
        "field": TEXT | {"description": "The member, parameter or header that is wrong, as `items[0].amount`."},
        "checks": {"type": "object", "additionalProperties": TEXT, "description": "Of `/readyz`: what fails, and why."},
    },
)

SCHEMAS: dict[str, Any] = {
    **_bodies(),
    "Payment": _PAYMENT,
    "Refund": _REFUND,
    "Dispute": _DISPUTE,
    "Entry": _ENTRY,
    "Seller": _SELLER,
    "PaymentPage": _object("Payments, newest first.", {"payments": _list(ref("Payment")), "cursor": _CURSOR}),
    "DisputePage": _object(
        "Disputes, those of the newest payment first.", {"disputes": _list(ref("Dispute")), "cursor": _CURSOR}
    ),
    "Received": _object(
        "What became of an event.",
        {
            "received": {"type": "boolean"},
            "outcome": {"type": "string", "enum": ["applied", "looked", "known", "ignored", "foreign", "orphan"]},
        },
    ),
    "Alive": _object("The process runs.", {"ok": {"type": "boolean"}, "service": TEXT, "name": TEXT}),
    "Ready": _object(
        "The process takes requests.", {"ok": {"type": "boolean"}, "checks": {"type": "object", "additionalProperties": TEXT}}
    ),
    "Problem": _PROBLEM,
}
