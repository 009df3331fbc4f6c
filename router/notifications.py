"""Tipalti's notifications. None is taken at its word: each is a reason to look at its payment, and is answered 2xx only when
what the look showed is committed. Doubled, late and reordered ones come to the same.
"""

from __future__ import annotations

import time

from aiohttp import web
from prometheus_client import Counter

from oncepay.errors import BadSignature, BodyTooLarge, TooBusy
from oncepay.payout_moves import PaymentSeen
from oncepay.service import json_response
from oncepay.tipalti_client import TipaltiClient, TipaltiOff, TipaltiUnavailable, check_signature
from oncepay.tipalti_objects import NotificationObject
from oncepay.web import decode_bytes
from router.webhooks import Secrets
from shard.store.payouts import PayoutStore, StalePayout

BODY_BYTES_MAX = 64 << 10
VERIFYING_MAX = 16
"""Notifications that wait for Tipalti's word at once. Anybody can send some: more are refused; Tipalti sends its own again."""
LOOKS_MAX = 4
"""Looks for one notification, while others move the payout at the same time."""
ABOUT_PAYMENTS = frozenset({"payment_submitted", "deferred", "completed", "error", "payment_cancelled"})
KNOWN = ABOUT_PAYMENTS | {"payments_group_approved", "payments_group_declined", "payee_details_changed"}

NOTIFICATIONS = Counter("oncepay_router_notifications_total", "Notifications of Tipalti's.", ["type", "outcome"])


class TipaltiNotifications:
    """The handler of /v1/webhooks/tipalti."""

    def __init__(self, store: PayoutStore, tipalti: TipaltiClient, secrets: Secrets) -> None:
        self._store = store
        self._tipalti = tipalti
        self._secrets = secrets
        self._verifying = 0

    async def receive(self, request: web.Request) -> web.Response:
        """POST /v1/webhooks/tipalti: see that it is Tipalti's, look, commit what is seen, answer."""
        body = await request.read()
        if not self._tipalti.on:
            raise TipaltiOff
        if len(body) > BODY_BYTES_MAX:
            raise BodyTooLarge(f"a notification has at most {BODY_BYTES_MAX} bytes")
        notification = decode_bytes(body, NotificationObject)
        await self._check(body, request.headers.get("tipalti-signature", ""))
        outcome = await self._handle(notification) if notification.type in ABOUT_PAYMENTS else "ignored"
        NOTIFICATIONS.labels(notification.type if notification.type in KNOWN else "other", outcome).inc()
        return json_response({"received": True, "outcome": outcome})

    async def _check(self, body: bytes, signature: str) -> None:
        """By its signature where the deployment has a secret, else by asking Tipalti whether it sent it."""
        secrets = self._secrets.current()
        good = check_signature(body, signature, secrets, time.time()) if secrets else await self._verified(body)
        if not good:
            NOTIFICATIONS.labels("unknown", "bad_signature").inc()
            raise BadSignature("none of the secrets matches, or it is too old" if secrets else "Tipalti didn't send it")

    async def _verified(self, body: bytes) -> bool:
        if self._verifying >= VERIFYING_MAX:
            raise TooBusy(f"{VERIFYING_MAX} notifications wait to be verified")
        self._verifying += 1
        try:
            return await self._tipalti.verified(body)
        finally:
            self._verifying -= 1

    async def _handle(self, notification: NotificationObject) -> str:
        code = notification.eventData.refCode
        payout = await self._store.by_ref_code(code) if code else None
        if payout is None:
            return "foreign"
        for _ in range(LOOKS_MAX):
            view = (await self._tipalti.payments([code])).get(code)
            if view is None:
                raise TipaltiUnavailable(f"Tipalti tells of {code} and doesn't show it")
            try:
                after = await self._store.apply(payout, PaymentSeen(view), event=notification.type)
            except StalePayout as stale:
                payout = stale.payout
            else:
                return "known" if after is payout else "applied"
        raise TipaltiUnavailable(f"{payout.key} moved each time it was looked at")
