"""What clients send: the shapes of bodies, their checks, and the fingerprint that a second use of a key has to match."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from oncepay.cart import BUYER_LENGTH_MAX, Fee, Item, check_cart, shares_of
from oncepay.errors import InvalidAmount, InvalidField, InvalidKey
from oncepay.keys import check_characters
from oncepay.payment import CaptureMethod, Key, OnDecline, Payment, Status, Terms
from oncepay.settings import Settings

EXPIRES_DEFAULT_S = 24 * 3600
EXPIRES_MIN_S = 60
EXPIRES_MAX_S = 30 * 24 * 3600
METADATA_KEYS_MAX = 40
METADATA_KEY_LENGTH_MAX = 40
METADATA_VALUE_LENGTH_MAX = 500
RESERVED_METADATA = "oncepay_"
PAYEE_LENGTH_MAX = 64
BASIS_POINTS_MAX = 10_000

_PROVIDER_ID = re.compile(r"[A-Za-z0-9_]{1,255}")
_encode = msgspec.json.Encoder(order="sorted").encode


class PaymentBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/payments. Amounts in minor units; `expires_in` in seconds."""

    buyer: str
    currency: str
    items: tuple[Item, ...]
    payment_method: str = ""
    capture_method: CaptureMethod = "automatic"
    on_decline: OnDecline | None = None
    after: str = ""
    metadata: dict[str, str] = {}
    expires_in: int = EXPIRES_DEFAULT_S
    customer: str = ""
    off_session: bool = False


class ConfirmBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/payments/{key}/confirm."""

    payment_method: str


class CancelBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/payments/{key}/cancel: nothing."""


class PartItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A seller's part of a capture or a refund, in minor units."""

    seller: str
    amount: int


class CaptureBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/payments/{key}/capture: everything, an amount, or the amounts of sellers."""

    amount: int | None = None
    items: tuple[PartItem, ...] = ()


class RefundBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/payments/{key}/refunds: all that is left, an amount, or the amounts of sellers."""

    amount: int | None = None
    items: tuple[PartItem, ...] = ()
    reason: Literal["duplicate", "fraudulent", "requested_by_customer"] | None = None


class SellerBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PUT /v1/sellers/{id}: its payee at Tipalti, the currency it is paid in, its fee (null: the deployment's)."""

    payee: str
    currency: str
    fee: Fee | None = None


def now_ms() -> int:
    """This process' clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def fingerprint_of(body: PaymentBody) -> bytes:
    """16 bytes over the business fields, after parsing and defaults: tokens and metadata don't count."""
    items = [(item.seller, item.amount, item.quantity, item.description) for item in body.items]
    text = _encode([body.buyer, body.currency.lower(), items, body.capture_method])
    return hashlib.sha256(text).digest()[:16]


def changed_field(row: Payment, body: PaymentBody) -> str:
    """The first business field in which a body differs from the row that has its key."""
    if row.buyer != body.buyer:
        return "buyer"
    if row.currency != body.currency.lower():
        return "currency"
    return "items" if row.terms.items != body.items else "capture_method"


def check_payment(body: PaymentBody) -> int:
    """The cart's total. Raises InvalidField, InvalidAmount or UnknownCurrency with the field's name."""
    _check_text(body)
    try:
        return check_cart(body.currency.lower(), body.items)
    except InvalidAmount as error:
        if error.field == "items" and len(body.items) == 1:
            error.field = "items[0].amount"
        raise


def new_payment(key: Key, body: PaymentBody, amount: int, fees: Mapping[str, Fee], settings: Settings) -> Payment:
    """The row that a checked body asks for. The sellers' own `fees` are frozen into it, and the deployment's for the others."""
    currency = body.currency.lower()
    default_fee = Fee(settings.fee.basis_points, settings.fee.fixed_minor)
    now_ms = time.time_ns() // 1_000_000
    return Payment(
        key=key,
        status=Status.CREATED,
        version=1,
        buyer=body.buyer,
        currency=currency,
        amount=amount,
        terms=Terms(
            items=body.items,
            shares=shares_of(body.items, fees, default_fee),
            api_version=settings.stripe.api_version,
            capture_method=body.capture_method,
            on_decline=body.on_decline or ("fail" if body.payment_method else "retry"),
            metadata=body.metadata,
            after=body.after,
            payment_method=body.payment_method,
            customer=body.customer,
            off_session=body.off_session,
        ),
        fingerprint=fingerprint_of(body),
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        expires_at_ms=now_ms + body.expires_in * 1000,
    )


def check_payment_method(value: str, field: str = "payment_method") -> None:
    """Raises InvalidField unless `value` can be the id of a payment method (or a customer) at Stripe."""
    if not _PROVIDER_ID.fullmatch(value):
        raise InvalidField("an id at Stripe has 1 to 255 letters, digits and underscores", field=field)


def _check_after(value: str) -> None:
    try:
        check_characters(value)
    except InvalidKey as error:
        error.field = "after"
        raise


def _check_text(body: PaymentBody) -> None:
    if not 1 <= len(body.buyer) <= BUYER_LENGTH_MAX or not body.buyer.isprintable():
        raise InvalidField(f"a buyer's id has 1 to {BUYER_LENGTH_MAX} printable characters", field="buyer")
    if body.payment_method:
        check_payment_method(body.payment_method)
    if body.customer:
        check_payment_method(body.customer, "customer")
    if body.after:
        _check_after(body.after)
    if not EXPIRES_MIN_S <= body.expires_in <= EXPIRES_MAX_S:
        raise InvalidField(f"a payment lives {EXPIRES_MIN_S} to {EXPIRES_MAX_S} seconds", field="expires_in")
    for i, item in enumerate(body.items):
        if "\0" in item.description:
            raise InvalidField("a description can't hold a NUL", field=f"items[{i}].description")
    if len(body.metadata) > METADATA_KEYS_MAX:
        raise InvalidField(f"metadata has at most {METADATA_KEYS_MAX} keys", field="metadata")
    for name, value in body.metadata.items():
        path = f"metadata.{name[:METADATA_KEY_LENGTH_MAX]}"
        if not 1 <= len(name) <= METADATA_KEY_LENGTH_MAX or not name.isprintable() or "[" in name or "]" in name:
            raise InvalidField(f"a metadata key has 1 to {METADATA_KEY_LENGTH_MAX} printable characters, no brackets", field=path)
        if name.startswith(RESERVED_METADATA):
            raise InvalidField(f"metadata keys that begin with {RESERVED_METADATA} are reserved", field=path)
        if not 1 <= len(value) <= METADATA_VALUE_LENGTH_MAX or "\0" in value:
            raise InvalidField(f"a metadata value has 1 to {METADATA_VALUE_LENGTH_MAX} characters", field=path)
