"""Sellers over the API: put and show."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from oncepay.cart import PLATFORM_SELLER, SELLER_LENGTH_MAX, Fee
from oncepay.errors import InvalidField, NotFound
from oncepay.money import MAXIMUM_MINOR, exponent
from oncepay.service import json_response
from oncepay.web import decode
from router.bodies import BASIS_POINTS_MAX, PAYEE_LENGTH_MAX, SellerBody
from router.etags import etag, shown
from router.fees import Fees
from router.views import rfc3339
from shard.store.sellers import Seller, get_seller, put_seller
from shard.store.store import Shards


class Sellers:
    """The handlers of /v1/sellers."""

    def __init__(self, store: Shards, fees: Fees, actor: str) -> None:
        self._store = store
        self._fees = fees
        self._actor = actor

    async def put(self, request: web.Request) -> web.Response:
        """PUT /v1/sellers/{id}: the seller as a whole. 201 when it is new; the same again changes nothing."""
        name = _id(request)
        body = await decode(request, SellerBody)
        _check(body)
        seller = Seller(name, body.payee, body.currency.lower(), body.fee)
        written, outcome = await put_seller(self._store, self._actor, seller)
        self._fees.learned(written)
        return json_response(seller_view(written), 201 if outcome == "created" else 200, {"ETag": etag(written.version)})

    async def show(self, request: web.Request) -> web.Response:
        """GET /v1/sellers/{id}, behind the barrier."""
        name = request.match_info["id"]
        seller = await get_seller(self._store, name) if _can_be(name) and name != PLATFORM_SELLER else None
        if seller is None:
            raise NotFound(f"there is no seller {name[:SELLER_LENGTH_MAX]!r}")
        return shown(request, seller.version, lambda: seller_view(seller))


def seller_view(seller: Seller) -> dict[str, Any]:
    """The JSON object of a seller; `fee` is null when the deployment's holds."""
    return {
        "id": seller.id,
        "payee": seller.payee,
        "currency": seller.currency,
        "fee": seller.fee,
        "created_at": rfc3339(seller.created_at_ms),
        "updated_at": rfc3339(seller.updated_at_ms),
        "version": seller.version,
    }


def _can_be(name: str) -> bool:
    """Whether a cart could name the seller."""
    return 1 <= len(name) <= SELLER_LENGTH_MAX and name.isprintable()


def _id(request: web.Request) -> str:
    name = request.match_info["id"]
    if not _can_be(name):
        raise InvalidField(f"a seller's id has 1 to {SELLER_LENGTH_MAX} printable characters", field="id")
    if name == PLATFORM_SELLER:
        raise InvalidField(f"the seller {PLATFORM_SELLER} is the platform itself, and pays no fee", field="id")
    return name


def _check(body: SellerBody) -> None:
    if not 1 <= len(body.payee) <= PAYEE_LENGTH_MAX or not body.payee.isprintable():
        raise InvalidField(f"a payee's id has 1 to {PAYEE_LENGTH_MAX} printable characters", field="payee")
    exponent(body.currency.lower())
    fee = body.fee or Fee(0)
    if not 0 <= fee.basis_points <= BASIS_POINTS_MAX:
        raise InvalidField(f"a fee has 0 to {BASIS_POINTS_MAX} basis points", field="fee.basis_points")
    if not 0 <= fee.fixed_minor <= MAXIMUM_MINOR:
        raise InvalidField(f"the fixed part of a fee is 0 to {MAXIMUM_MINOR} minor units", field="fee.fixed_minor")
