"""Real values: a payment, its commands and a seller, made by the code that makes them for clients."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from oncepay.cart import Fee, Item, Share, shares_of
from oncepay.payment import Dispute, Key, Payment, Progress, Refund, Status, Terms
from oncepay.settings import Settings
from router.bodies import PaymentBody, fingerprint_of
from router.sellers import seller_view
from router.views import dispute_view, payment_view
from shard.store.batch import EntryView
from shard.store.sellers import Seller

KEY = "order-10042"
COMMAND_KEY = "order-10042-refund-1"
SELLER_ID = "records-4"
CURSOR = "WzE3ODk1NTU3OTk5OTksIm9yZGVyLTEwMDQyIl0"

_AT_MS = 1_789_555_800_000
_ITEMS = (Item(SELLER_ID, 1499, 2, "LP"), Item("platform", 399))

PAY: dict[str, Any] = {
    "buyer": "b-77",
    "currency": "usd",
    "items": [{"seller": SELLER_ID, "amount": 1499, "quantity": 2, "description": "LP"}, {"seller": "platform", "amount": 399}],
    "payment_method": "pm_card_visa",
}
PAY_LATER = {name: PAY[name] for name in ("buyer", "currency", "items")} | {
    "capture_method": "manual",
    "metadata": {"order": "10042"},
    "expires_in": 3600,
}
PAY_AGAIN = {**PAY, "after": "order-10041"}
PART = {"items": [{"seller": SELLER_ID, "amount": 1499}]}
SELLER = {"payee": "payee-records-4", "currency": "usd", "fee": {"basis_points": 800, "fixed_minor": 30}}
EVIDENCE = {"evidence": {"shipping_tracking_number": "1Z999AA10123456784"}, "submit": True}


def _plain(view: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(view))


_BODY = msgspec.convert(PAY, PaymentBody)
_SUCCEEDED = Payment(
    key=Key(KEY),
    status=Status.SUCCEEDED,
    version=5,
    buyer="b-77",
    currency="usd",
    amount=3397,
    terms=Terms(
        items=_ITEMS,
        shares=shares_of(_ITEMS, {}, Fee(1000)),
        api_version=Settings().stripe.api_version,
        on_decline="fail",
        payment_method="pm_card_visa",
    ),
    fingerprint=fingerprint_of(_BODY),
    created_at_ms=_AT_MS,
    updated_at_ms=_AT_MS + 640,
    expires_at_ms=_AT_MS + 86_400_000,
    intent="pi_3QmBx2LkdIwHu7ix0Fq1a2b3",
    amount_captured=3397,
)
_ENTRY = EntryView(
    entry_id="payment",
    kind="payment",
    currency="usd",
    source="ch_3QmBx2LkdIwHu7ix0Yz9",
    accounts=["stripe:clearing", "seller:records-4:payable", "platform:fees", "platform:fees"],
    amounts=[3397, -2698, -300, -399],
    sellers=["", SELLER_ID, SELLER_ID, "platform"],
)
_IN_FLIGHT = replace(
    _SUCCEEDED,
    status=Status.ATTEMPTED,
    version=2,
    amount_captured=0,
    progress=Progress(client_secret="pi_3QmBx2LkdIwHu7ix0Fq1a2b3_secret_x"),  # noqa: S106 (an example)
)
_REFUNDED = replace(
    _SUCCEEDED,
    version=7,
    amount_refunded=1499,
    progress=Progress(
        refunds=(
            Refund(
                COMMAND_KEY, 1499, (Share(SELLER_ID, 1499, 150),), _AT_MS + 90_000_000, "succeeded", "re_3QmBx2Lkd", "duplicate"
            ),
        )
    ),
)
_DISPUTE = Dispute("du_1QmBx2Lkd", "needs_response", 3397, "fraudulent", _AT_MS // 1000 + 1_209_600)

PAYMENT = _plain(payment_view(_SUCCEEDED))
PAYMENT_WITH_ENTRIES = _plain(payment_view(_SUCCEEDED, [_ENTRY]))
PAYMENT_IN_FLIGHT = _plain(payment_view(_IN_FLIGHT))
PAYMENT_CANCELED = _plain(payment_view(replace(_SUCCEEDED, status=Status.CANCELED, amount_captured=0)))
PAYMENT_REFUNDED = _plain(payment_view(_REFUNDED))
PAYMENTS = {"payments": [PAYMENT], "cursor": CURSOR}
DISPUTE = _plain(dispute_view(_SUCCEEDED, _DISPUTE))
DISPUTES = {"disputes": [DISPUTE], "cursor": None}
SELLER_SHOWN = _plain(seller_view(Seller(SELLER_ID, "payee-records-4", "usd", Fee(800, 30), 1, _AT_MS, _AT_MS)))
