"""Stripe's webhooks. An event is answered 2xx only after its effect is committed, and nothing is remembered of one that
failed, so that the next delivery is handled like the first.

Only `succeeded` and `canceled` are taken at their word: they are terminal at Stripe. Every other event is a reason to look.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import OrderedDict
from pathlib import Path

import msgspec
import stripe
from aiohttp import web
from prometheus_client import Counter

from oncepay.driver import Driver
from oncepay.errors import BadSignature, MalformedBody, Unavailable
from oncepay.incoming import HANDLED, TERMINAL, head_of, intent_of, take_in
from oncepay.logs import get_logger
from oncepay.payment import Payment
from oncepay.service import Request, json_response
from oncepay.stripe_objects import EventObject, ObjectHead
from shard.store.store import Shards

TOLERANCE_S = 300
SECRETS_AGE_S = 5.0
ANSWER_FIRST_S = 0.4
"""How long a fresh event waits for the answer of the call that caused it, when another process makes that call."""
CALL_S = 2.0
"""The same, when this process is in the middle of a call for that payment."""
FRESH_S = 10.0
"""Seconds after which an event is no longer fresh: a redelivery, or one that was long on its way."""
FINISHED_MAX = 2_000
"""Finished payments that are remembered; the oldest is forgotten for a newer one."""

PAID = "payment_intent.succeeded"

_log = get_logger("webhooks")

UNNAMED = Counter("oncepay_router_money_without_row_total", "PaymentIntents that Stripe says have succeeded and no row names.")

EVENTS = Counter("oncepay_router_webhooks_total", "Webhook events of Stripe's.", ["type", "outcome"])

_verify = stripe.WebhookSignature.verify_header  # the package looks each of its names up anew


@functools.cache
def _events(type_: str, outcome: str) -> Counter:
    return EVENTS.labels(type_, outcome)


class Secrets:
    """The endpoint's signing secrets, one a file (several while one is rolled), read again when they are old."""

    def __init__(self, files: tuple[str, ...]) -> None:
        self._files = [Path(name) for name in files]
        self._read_at_s = float("-inf")
        self._secrets: list[str] = []

    def current(self) -> list[str]:
        """The secrets as they are in the files."""
        if time.monotonic() - self._read_at_s > SECRETS_AGE_S:
            self._secrets = [text for file in self._files if file.exists() for text in file.read_text().split()]
            self._read_at_s = time.monotonic()
        return self._secrets


class Finished:
    """Payments that this process has lately brought to their end, as they were committed.

    Their webhooks come a moment later and mostly say what is known. Such a row was behind the quorum when it was put here, and
    a terminal one never becomes another, so it need not be read again; what changes it after all is compared by version.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[str, Payment] = OrderedDict()  # a dict looks for its first member past all that were deleted

    def moved(self, payment: Payment) -> None:
        """A row that was committed."""
        self._rows.pop(payment.key, None)
        if payment.terminal and not payment.open_work:
            self._rows[payment.key] = payment
            if len(self._rows) > FINISHED_MAX:
                self._rows.popitem(last=False)

    def get(self, key: str) -> Payment | None:
        """The row, if it is remembered."""
        return self._rows.get(key)


class StripeWebhooks:
    """The handler of /v1/webhooks/stripe."""

    def __init__(self, store: Shards, driver: Driver, secrets: Secrets, finished: Finished) -> None:
        self._store = store
        self._driver = driver
        self._finished = finished
        self._secrets = secrets

    async def receive(self, request: Request) -> web.Response:
        """POST /v1/webhooks/stripe: check the signature over the raw body, commit the effect, answer."""
        body = await request.read()
        self._check(body, request.headers.get("Stripe-Signature", ""))
        try:
            event = msgspec.json.decode(body, type=EventObject)
        except msgspec.DecodeError as error:
            raise MalformedBody(f"not an event: {error}") from None
        known = event.type in HANDLED
        outcome = await self._handle(event) if known else "ignored"
        _events(event.type if known else "other", outcome).inc()
        return json_response({"received": True, "outcome": outcome})

    def _check(self, body: bytes, header: str) -> None:
        secrets = self._secrets.current()
        if not secrets:
            raise Unavailable("no webhook secret is set, so no event can be checked")
        text = body.decode("utf-8", "replace")
        for secret in secrets if header.isascii() else ():  # others can't be compared
            try:
                _verify(text, header, secret, TOLERANCE_S)
            except stripe.SignatureVerificationError:
                continue
            return
        EVENTS.labels("unknown", "bad_signature").inc()
        raise BadSignature("none of the secrets matches, or the event is older than five minutes")

    async def _handle(self, event: EventObject) -> str:
        """Commit what the event says; the outcome's name."""
        head = head_of(event)
        if event.type in TERMINAL:
            await self._answer_first(head, event.created)
        intent = intent_of(head)
        payment = await self._find(head, intent)
        if event.type == PAID and (payment is None or payment.intent != intent):
            UNNAMED.inc()
            _log.error("money without a row", intent=intent, event_id=event.id, key=payment.key if payment else "")
        if payment is None:
            return "foreign"  # another system's on this account, or made before its row's id was committed
        return await take_in(self._driver, payment, event, head)

    async def _answer_first(self, head: ObjectHead, created_s: int) -> None:
        """Let the answer of the call that caused a fresh event be committed first.

        Stripe's event often overtakes that answer. Applied by itself it would cost a commit of its own, another for the fee,
        which the answer brings along and the event doesn't, and a conflict between the two. Without an answer the event is
        applied just the same, a moment later.
        """
        key = (head.metadata or {}).get("oncepay_key", "")
        if not key or self._finished.get(key) or time.time() - created_s > FRESH_S:
            return
        if self._driver.is_driving(key):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await self._driver.idle(key)
        else:
            await asyncio.sleep(ANSWER_FIRST_S)

    async def _find(self, head: ObjectHead, intent: str) -> Payment | None:
        """By the key in the metadata; an event that brings none, by its intent, on all shards, else through Stripe.

        A range that is being moved is on no shard for a moment: a read by key waits for it, one by intent doesn't see it.
        """
        key = (head.metadata or {}).get("oncepay_key", "")
        if not key and intent:
            found = await self._store.by_intent(intent)
            if found is not None:
                return found
            key = await self._driver.key_at_stripe(intent)
        if not key:
            return None
        return self._finished.get(key) or await self._store.get(key)
