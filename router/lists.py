"""Lists: payments and disputes over all shards, newest first; evidence for a dispute."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from oncepay.driver import Driver
from oncepay.errors import InvalidField, NotFound
from oncepay.payment import Dispute, Payment, Status
from oncepay.service import json_response
from oncepay.stripe_client import StripeGateway
from oncepay.web import decode
from router.prefer import key_in_path
from router.views import dispute_view, payment_view
from shard.store.lists import LIMIT_DEFAULT, LIMIT_MAX, Cursor, list_disputed, list_payments, parse_cursor
from shard.store.store import Shards

EVIDENCE_CHARACTERS_MAX = 20_000
LIMIT_DIGITS_MAX = 9


class EvidenceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evidence for a dispute, by Stripe's names of its members; `submit` hands it in for good."""

    evidence: dict[str, str]
    submit: bool = True


class Lists:
    """The handlers of GET /v1/payments and of /v1/disputes."""

    def __init__(self, store: Shards, stripe: StripeGateway, driver: Driver) -> None:
        self._store = store
        self._stripe = stripe
        self._driver = driver

    async def payments(self, request: web.Request) -> web.Response:
        """GET /v1/payments?buyer=&seller=&status=&cursor=&limit=."""
        query = _query(request, {"buyer", "seller", "status", "cursor", "limit"})
        status = query.get("status")
        if status is not None and status not in set(Status):
            raise InvalidField(f"there is no status {status!r}; there are {', '.join(Status)}", field="status")
        page = await list_payments(
            self._store,
            buyer=query.get("buyer"),
            seller=query.get("seller"),
            status=status,
            limit=_limit(query),
            cursor=_cursor(query),
        )
        views = [payment_view(payment) for payment in page.payments]
        return json_response({"payments": views, "cursor": page.cursor.text() if page.cursor else None})

    async def disputes(self, request: web.Request) -> web.Response:
        """GET /v1/disputes?cursor=&limit=: of the newest payment first."""
        query = _query(request, {"cursor", "limit"})
        page = await list_disputed(self._store, limit=_limit(query), cursor=_cursor(query))
        views = [dispute_view(payment, dispute) for payment in page.payments for dispute in payment.progress.disputes]
        return json_response({"disputes": views, "cursor": page.cursor.text() if page.cursor else None})

    async def evidence(self, request: web.Request) -> web.Response:
        """POST /v1/payments/{key}/disputes/{id}/evidence: put evidence to a dispute."""
        body = await decode(request, EvidenceBody)
        for name, text in body.evidence.items():
            if len(text) > EVIDENCE_CHARACTERS_MAX or not name.isidentifier():
                raise InvalidField(f"evidence has at most {EVIDENCE_CHARACTERS_MAX} characters", field=f"evidence.{name[:40]}")
        key, name = key_in_path(request), request.match_info["dispute"]
        payment = await self._store.get(key)
        if payment is None or _dispute(payment, name) is None:
            raise NotFound(f"there is no dispute {name} of a payment {key}")
        await self._stripe.dispute_evidence(name, body.evidence, submit=body.submit)
        after = await self._driver.look_after(key, "disputes", "evidence put")
        dispute = _dispute(after or payment, name)
        assert dispute is not None
        return json_response(dispute_view(after or payment, dispute))


def _dispute(payment: Payment, name: str) -> Dispute | None:
    return next((dispute for dispute in payment.progress.disputes if dispute.id == name), None)


def _query(request: web.Request, known: set[str]) -> dict[str, Any]:
    query = dict(request.query)
    for name in query:
        if name not in known:
            raise InvalidField(f"there is no parameter {name[:40]!r}; there are {', '.join(sorted(known))}", field=name[:40])
        if "\0" in query[name]:
            raise InvalidField("a parameter can't hold a NUL", field=name)
    return query


def _limit(query: dict[str, Any]) -> int:
    text = query.get("limit", str(LIMIT_DEFAULT))
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= LIMIT_DIGITS_MAX else 0
    if not 1 <= value <= LIMIT_MAX:
        raise InvalidField(f"a limit is 1 to {LIMIT_MAX}", field="limit")
    return value


def _cursor(query: dict[str, Any]) -> Cursor | None:
    return parse_cursor(query["cursor"]) if query.get("cursor") else None
