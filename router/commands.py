"""Commands on a payment: confirm with another card, capture, cancel, refund. Each has an idempotency key of its own, scoped
to the payment; a replay answers with the payment as it is now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from oncepay.cart import Share, shares_of_part
from oncepay.driver import Driver
from oncepay.errors import InvalidAmount, InvalidField, KeyReused, NotFound, OncepayError, WrongState
from oncepay.events import AlreadyCommanded, AttemptStarted, CaptureRequested, Commanded, Event, GiveUp, RefundRequested
from oncepay.keys import origin, parse_key
from oncepay.payment import Payment, Status
from oncepay.refunds import by_items, spread
from oncepay.service import json_response
from oncepay.settings import Settings
from oncepay.web import Request, decode_bytes
from router.bodies import (
    CancelBody,
    CaptureBody,
    ConfirmBody,
    PartItem,
    RefundBody,
    check_payment_method,
    now_ms,
)
from router.inflight import InFlight, is_awaited
from router.macs import Macs
from router.prefer import key_in_path, location, wait_s
from router.views import payment_view
from shard.store.store import Shards

KEY_HEADER = "Idempotency-Key"
TRIES_MAX = 20
"""How often a command is made anew because the payment changed under it."""

T = TypeVar("T", bound=msgspec.Struct)

_encode = msgspec.json.Encoder(order="sorted").encode


class Commands:
    """The handlers of /v1/payments/{key}/confirm, /capture, /cancel and /refunds."""

    def __init__(self, settings: Settings, store: Shards, driver: Driver, in_flight: InFlight, macs: Macs) -> None:
        self._settings = settings
        self._store = store
        self._driver = driver
        self._in_flight = in_flight
        self._macs = macs

    async def confirm(self, request: Request) -> web.Response:
        """POST …/confirm: another payment method on the same payment."""
        body = await _body(request, ConfirmBody)
        check_payment_method(body.payment_method)

        def started(payment: Payment) -> Event:
            return AttemptStarted(payment.progress.attempt + 1, body.payment_method)

        return await self._run(request, "confirm", body, started)

    async def cancel(self, request: Request) -> web.Response:
        """POST …/cancel: give the payment up; if it turns out to have been paid, that is the outcome."""
        body = await _body(request, CancelBody)
        return await self._run(request, "cancel", body, lambda payment: GiveUp("requested"))

    async def capture(self, request: Request) -> web.Response:
        """POST …/capture: take what was authorised, or a part of it; what is left is released."""
        body = await _body(request, CaptureBody)

        def asked(payment: Payment) -> Event:
            if payment.status is not Status.REQUIRES_CAPTURE:
                raise WrongState(f"a payment that is {payment.status} can't be captured")
            shares = _capture_shares(payment, body)
            return CaptureRequested(sum(share.gross for share in shares), shares)

        return await self._run(request, "capture", body, asked)

    async def refund(self, request: Request) -> web.Response:
        """POST …/refunds: give back all that is left, an amount, or the amounts of some sellers' items."""
        body = await _body(request, RefundBody)

        def asked(payment: Payment) -> Event:
            if payment.status is not Status.SUCCEEDED:
                raise WrongState(f"a payment that is {payment.status} can't be refunded")
            shares = _refund_shares(payment, body, fee_back=self._settings.fee.refunded)
            return RefundRequested(self._key(request), shares, body.reason or "", now_ms())

        return await self._run(request, "refund", body, asked, status=201)

    def _key(self, request: Request) -> str:
        try:
            key = parse_key(request.headers.get(KEY_HEADER))
            origin(key, self._macs.secrets())  # raises for reserved names
        except OncepayError as error:
            error.field = KEY_HEADER
            raise
        return key

    async def _run(
        self, request: Request, kind: str, body: msgspec.Struct, make: Callable[[Payment], Event], status: int = 200
    ) -> web.Response:
        """Commit the command and its event in one, drive what follows, and answer once that is over or the wait is."""
        key = self._key(request)
        said = hashlib.sha256(_encode([kind, body])).hexdigest()[:32]
        payment = await self._row(request)
        replayed = False
        for tried in range(TRIES_MAX):
            known = payment.command(key)
            if known is not None:
                if known.fingerprint != said:
                    raise KeyReused(f"{key} was used on {payment.key} for another command", field=KEY_HEADER)
                replayed = True
                break
            try:
                payment = await self._store.apply(payment, Commanded(key, said), make(payment), event=f"{kind} requested")
                break
            except AlreadyCommanded as again:
                payment = again.payment
            except (WrongState, InvalidAmount, InvalidField):
                fresh = await self._row(request)
                if fresh.version == payment.version or tried == TRIES_MAX - 1:
                    raise
                payment = fresh
        self._in_flight.drive(self._driver, payment)
        return await self._answer(request, payment, status, replayed=replayed, refunds=kind == "refund")

    async def _row(self, request: Request) -> Payment:
        key = key_in_path(request)
        payment = await self._store.get(key)
        if payment is None:
            raise NotFound(f"there is no payment {key}")
        return payment

    async def _answer(self, request: Request, payment: Payment, status: int, *, replayed: bool, refunds: bool) -> web.Response:
        payment = await self._in_flight.wait(payment, wait_s(request), refunds=refunds)
        headers = {"Idempotent-Replayed": "true"} if replayed else {}
        if is_awaited(payment, refunds=refunds):
            return json_response(payment_view(payment), 202, {**headers, "Location": location(payment.key)})
        return json_response(payment_view(payment), 200 if replayed else status, headers)


async def _body(request: Request, body_type: type[T]) -> T:
    """The body; an empty one is an empty object."""
    return decode_bytes(await request.read() or b"{}", body_type)


def _amounts(items: tuple[PartItem, ...]) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for number, item in enumerate(items):
        if item.amount <= 0:
            raise InvalidAmount("the amount of a part is more than 0", field=f"items[{number}].amount")
        amounts[item.seller] = amounts.get(item.seller, 0) + item.amount
    return amounts


def _capture_shares(payment: Payment, body: CaptureBody) -> tuple[Share, ...]:
    """Each seller's share of what is to be captured."""
    if body.items:
        shares = by_items(payment.terms.shares, _amounts(body.items), fee_back=True)
        if body.amount is not None and body.amount != sum(share.gross for share in shares):
            raise InvalidAmount("the amount is not the sum of the items", field="amount")
        return shares
    amount = payment.amount if body.amount is None else body.amount
    if not 0 < amount <= payment.amount:
        raise InvalidAmount(f"at most {payment.amount} can be captured, and more than 0", field="amount")
    return tuple(share for share in shares_of_part(payment.terms.shares, amount) if share.gross)


def _refund_shares(payment: Payment, body: RefundBody, *, fee_back: bool) -> tuple[Share, ...]:
    """What each seller and the platform give back."""
    left = payment.left_shares
    if body.items:
        shares = by_items(left, _amounts(body.items), fee_back=fee_back)
        if body.amount is not None and body.amount != sum(share.gross for share in shares):
            raise InvalidAmount("the amount is not the sum of the items", field="amount")
        return shares
    whole = sum(share.gross for share in left)
    return spread(left, whole if body.amount is None else body.amount, fee_back=fee_back)
