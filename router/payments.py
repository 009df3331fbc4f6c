"""The payments API: submit and show."""

from __future__ import annotations

from aiohttp import web
from msgspec.structs import replace
from prometheus_client import Counter

from oncepay.driver import Driver
from oncepay.errors import EtcdUnavailable, InvalidField, InvalidKey, KeyReused, NotFound, OncepayError, PredecessorNotOver
from oncepay.events import SuccessorNamed
from oncepay.keys import Origin, origin, parse_key
from oncepay.payment import Key, Payment, Progress, Status
from oncepay.service import api_key, json_response
from oncepay.settings import Settings
from oncepay.web import Request, decode
from router.bodies import PaymentBody, changed_field, check_payment, fingerprint_of, new_payment, now_ms
from router.etags import shown
from router.fees import Fees
from router.inflight import InFlight
from router.macs import Macs
from router.prefer import key_in_path, location, wait_s
from router.slots import SlotLimits
from router.views import payment_view
from shard.store.store import Shards

KEY_HEADER = "Idempotency-Key"
LEFT_BEHIND_MS = 3_000
"""A payment that stood still for so long is driven on by whoever is asked for it."""

ACCEPTED = Counter("oncepay_router_payments_total", "Calls that submit a payment.", ["outcome"])
_accepted = ACCEPTED.labels("accepted")


class PaymentCalls:
    """The handlers of /v1/payments."""

    def __init__(self, settings: Settings, store: Shards, fees: Fees, driver: Driver, in_flight: InFlight, macs: Macs) -> None:
        self._settings = settings
        self._store = store
        self._fees = fees
        self._slot_limits = SlotLimits(settings.slot_rate_limit_per_s)
        self._driver = driver
        self._in_flight = in_flight
        self._macs = macs

    async def submit(self, request: Request) -> web.Response:
        """POST /v1/payments: one key, at most one charge."""
        key, source = self._key_of(request)
        self._slot_limits.take(api_key(request), key)
        body = await decode(request, PaymentBody)
        amount = check_payment(body)
        self._in_flight.check_room()
        if source == "unproven":
            found = await self._store.get(key)
            if found is None and not self._macs.known:
                raise EtcdUnavailable("whether this key was issued here can't be told yet")
            if found is None:
                raise InvalidKey("this key was not issued here", field=KEY_HEADER)
            return await self._replay(request, found, body)
        if body.after:
            found = await self._store.get(key)  # a replay names nobody, least of all one with other fields
            if found is not None:
                return await self._replay(request, found, body)
        try:
            fees = await self._fees.of(body.items)
        except InvalidField:
            found = await self._store.get(key)  # what was accepted once is replayed, whoever is known now
            if found is None:
                raise
            return await self._replay(request, found, body)
        payment = new_payment(key, body, amount, fees, self._settings)
        if body.after:
            await self._name_successor(body.after, payment)
        row, created = await self._store.accept(payment)
        if not created:
            return await self._replay(request, row, body)
        _accepted.inc()
        self._in_flight.drive(self._driver, row)
        return await self._answer(request, row, created=True)

    def _key_of(self, request: Request) -> tuple[Key, Origin]:
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

    async def _replay(self, request: Request, row: Payment, body: PaymentBody) -> web.Response:
        if row.fingerprint != fingerprint_of(body):
            ACCEPTED.labels("key_reused").inc()
            field = changed_field(row, body)
            raise KeyReused(f"{row.key} names a payment of {row.amount} {row.currency} that differs in {field}", field=field)
        ACCEPTED.labels("replayed").inc()
        if not row.settled and now_ms() - row.updated_at_ms > LEFT_BEHIND_MS:
            self._in_flight.drive(self._driver, row)  # whoever drove it may have died; every step may be repeated
        return await self._answer(request, row, created=False)

    async def _answer(self, request: Request, row: Payment, *, created: bool) -> web.Response:
        if seconds := wait_s(request):
            row = await self._in_flight.wait(row, seconds)
        headers = {} if created else {"Idempotent-Replayed": "true"}
        if not row.settled:
            headers["Location"] = location(row.key)
            return json_response(payment_view(row), 202, headers)
        return json_response(payment_view(row), 201 if created else 200, headers)

    async def _name_successor(self, after: str, payment: Payment) -> None:
        """Committed before the new row: a payment that failed has one successor at most.

        A key that no payment has yet becomes a tombstone: the request that was to bring it may still be on its way.
        """
        if after == payment.key:
            raise PredecessorNotOver("a payment can't come after itself", field="after")
        try:
            before = await self._store.get(after)
            if before is None:
                before, made = await self._store.accept(self._tombstone(Key(after), payment), "tombstone")
                if made:
                    return
        except InvalidKey as error:
            error.field = "after"
            raise
        await self._store.apply(before, SuccessorNamed(payment.key), event="successor named")

    def _tombstone(self, key: Key, payment: Payment) -> Payment:
        source = origin(key, self._macs.secrets())
        if source == "unproven" or (source == "client" and not self._settings.client_keys):
            raise PredecessorNotOver(f"there is no payment {key}", field="after")  # and there can't be one
        terms = replace(payment.terms, after="", payment_method="")
        progress = Progress(give_up="requested", successor=payment.key)
        return replace(payment, key=key, status=Status.CANCELED, terms=terms, progress=progress)

    async def show(self, request: Request) -> web.Response:
        """GET /v1/payments/{key}: the payment with its entries, behind the barrier."""
        key = key_in_path(request)
        found = await self._store.get_with_entries(key)
        if found is None:
            raise NotFound(f"there is no payment {key}")
        payment, entries = found
        return shown(request, payment.version, lambda: payment_view(payment, entries))
