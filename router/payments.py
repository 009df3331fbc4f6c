"""The payments API: submit and show."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import Counter

from oncepay.driver import Driver
from oncepay.errors import InvalidKey, KeyReused, NotFound, OncepayError, PredecessorNotOver
from oncepay.events import SuccessorNamed
from oncepay.keys import Origin, origin, parse_key
from oncepay.payment import Key, Payment
from oncepay.service import json_response
from oncepay.settings import Settings
from oncepay.web import decode
from router.bodies import PaymentBody, changed_field, fingerprint_of, new_payment
from router.inflight import InFlight
from router.macs import Macs
from router.prefer import location, wait_s
from router.views import payment_view
from shard.store.store import Shards

KEY_HEADER = "Idempotency-Key"

ACCEPTED = Counter("oncepay_router_payments_total", "Calls that submit a payment.", ["outcome"])


class PaymentCalls:
    """The handlers of /v1/payments."""

    def __init__(self, settings: Settings, store: Shards, driver: Driver, in_flight: InFlight, macs: Macs) -> None:
        self._settings = settings
        self._store = store
        self._driver = driver
        self._in_flight = in_flight
        self._macs = macs

    async def submit(self, request: web.Request) -> web.Response:
        """POST /v1/payments: one key, at most one charge."""
        key, source = self._key_of(request)
        body = await decode(request, PaymentBody)
        payment = new_payment(key, body, self._settings)
        self._in_flight.check_room()
        if source == "unproven":
            found = await self._store.get(key)
            if found is None:
                raise InvalidKey("this key was not issued here", field=KEY_HEADER)
            return await self._replay(request, found, body)
        if body.after:
            await self._name_successor(body.after, key)
        row, created = await self._store.accept(payment)
        if not created:
            return await self._replay(request, row, body)
        ACCEPTED.labels("accepted").inc()
        self._in_flight.drive(self._driver, row)
        return await self._answer(request, row, created=True)

    def _key_of(self, request: web.Request) -> tuple[Key, Origin]:
        """The key in the header, and where it comes from."""
        try:
            key = Key(parse_key(request.headers.get(KEY_HEADER)))
            source = origin(key, self._macs.secrets())
            if source == "client" and not self._settings.client_keys:
                raise InvalidKey("this deployment takes keys of its key service only")
        except OncepayError as error:
            error.field = KEY_HEADER
            raise
        return key, source

    async def _replay(self, request: web.Request, row: Payment, body: PaymentBody) -> web.Response:
        if row.fingerprint != fingerprint_of(body):
            ACCEPTED.labels("key_reused").inc()
            field = changed_field(row, body)
            raise KeyReused(f"{row.key} names a payment of {row.amount} {row.currency} with another {field}", field=field)
        ACCEPTED.labels("replayed").inc()
        return await self._answer(request, row, created=False)

    async def _answer(self, request: web.Request, row: Payment, *, created: bool) -> web.Response:
        row = await self._in_flight.wait(row, wait_s(request))
        headers = {} if created else {"Idempotent-Replayed": "true"}
        if not row.settled:
            headers["Location"] = location(row.key)
            return json_response(payment_view(row), 202, headers)
        return json_response(payment_view(row), 201 if created else 200, headers)

    async def _name_successor(self, after: str, key: Key) -> None:
        """Committed before the new row: a payment that failed has one successor at most."""
        before = await self._store.get(after)
        if before is None:
            raise PredecessorNotOver(f"there is no payment {after}", field="after")
        await self._store.apply(before, SuccessorNamed(key), event="successor named")

    async def show(self, request: web.Request) -> web.Response:
        """GET /v1/payments/{key}: the payment with its entries, behind the barrier."""
        found = await self._store.get_with_entries(request.match_info["key"])
        if found is None:
            raise NotFound(f"there is no payment {request.match_info['key']}")
        payment, entries = found
        return json_response(payment_view(payment, entries), headers={"ETag": f'"{payment.version}"'})
