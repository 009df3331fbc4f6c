"""What happens at Stripe around and after a payment's success: captures, refunds, disputes.

A refund's key is in Stripe's metadata, so a refund whose outcome is unknown is found by listing the intent's refunds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from oncepay.errors import InvalidAmount
from oncepay.events import CaptureRefused, DisputeSeen, Event, IntentSeen, RefundRefused, RefundSeen
from oncepay.logs import get_logger
from oncepay.payment import DISPUTE_OVER, Payment, Refund, RefundView
from oncepay.stripe_client import Declined, StripeGateway, StripeRefused, StripeStored

OVER_AND_OVER = 5
"""Keys that one refund may use up on errors that Stripe has stored."""
KEY_SURE_S = 3600
"""Stripe forgets idempotency keys after a day: a refund that may be older than this is looked for before it is made."""

_log = get_logger("driver")


class Apply(Protocol):
    """Commits events to a row, and tells who waits for it."""

    def __call__(self, payment: Payment, *events: Event, event: str) -> Awaitable[Payment]: ...


class Aftercare:
    """The steps of captures, refunds and disputes. `step_key(key, step)` makes Stripe's idempotency keys.

    `fee_back` says whether a refund that was made at Stripe gives the platform's fee back.
    """

    def __init__(self, stripe: StripeGateway, apply: Apply, step_key: Callable[[str, str], str], *, fee_back: bool) -> None:
        self._stripe = stripe
        self._apply = apply
        self._step_key = step_key
        self._fee_back = fee_back

    async def capture(self, payment: Payment) -> Payment:
        """Capture what the row says, and commit the outcome. Raises StripeUnavailable: the worker looks later."""
        asked = payment.progress.capture
        assert asked is not None
        key = self._step_key(payment.key, f"capture:{asked.number}")
        try:
            view = await self._stripe.capture(payment.intent, asked.amount, key, payment.terms.api_version)
        except (Declined, StripeRefused, StripeStored):
            view = await self._stripe.retrieve(payment.intent)
            if view.status == "requires_capture":  # refused, or stored as an error without an effect: it is over
                return await self._apply(payment, CaptureRefused(asked.number), event="capture refused")
        return await self._apply(payment, IntentSeen(view), event="captured")

    async def refund(self, payment: Payment) -> Payment:
        """Make the refunds that the row asks for and Stripe doesn't have yet, looking first where one may be there."""
        for refund in [each for each in payment.progress.refunds if each.status == "requested"]:
            payment = await self._refund(payment, refund)
        return payment

    async def _refund(self, payment: Payment, refund: Refund) -> Payment:
        if time.time() - refund.created_at_ms / 1000 > KEY_SURE_S:
            payment = await self.look_refunds(payment, "look for an old refund", strict=False)
            if not any(each.key == refund.key and each.status == "requested" for each in payment.progress.refunds):
                return payment
        named = hashlib.sha256(refund.key.encode()).hexdigest()[:32]
        parameters: dict[str, object] = {
            "payment_intent": payment.intent,
            "amount": refund.amount,
            "metadata": {"oncepay_key": payment.key, "oncepay_refund": refund.key},
        }
        if refund.reason:
            parameters["reason"] = refund.reason
        for number in range(OVER_AND_OVER):
            key = self._step_key(payment.key, f"refund:{named}" + (f":{number}" if number else ""))
            try:
                view = await self._stripe.refund(parameters, key, payment.terms.api_version)
            except StripeRefused as refused:
                return await self._refused(payment, refund, refused.code)
            except Declined as declined:
                return await self._refused(payment, refund, declined.failure.code)
            except StripeStored:
                looked = await self.look_refunds(payment, "look after a stored error", strict=False)
                if looked is not payment:
                    return looked
                continue  # nothing was made, and this key will repeat its error for ever
            return await self._apply(payment, RefundSeen(view, self._fee_back), event="refund answered")
        return await self._apply(payment, RefundRefused(refund.key, "processing_error"), event="refund refused")

    async def _refused(self, payment: Payment, refund: Refund, code: str) -> Payment:
        """Stripe says no, for the reason `code`: over, unless an earlier try of ours made it after all."""
        views = await self._stripe.refunds(payment.intent)
        if not any(view.key == refund.key for view in views):
            payment = await self._apply(payment, RefundRefused(refund.key, code), event="refund refused")
        return (await self._seen(payment, views, "refund found"))[0]

    async def look_refunds(self, payment: Payment, reason: str, *, strict: bool = True) -> Payment:
        """Apply all refunds of the intent as Stripe shows them; those made there are adopted.

        One that was made at Stripe out of what a refund asked for here has taken can't be adopted before that one is over:
        with `strict` this raises InvalidAmount, after all others have been applied.
        """
        payment, left = await self._seen(payment, await self._stripe.refunds(payment.intent), reason)
        if left is not None and strict:
            raise left
        return payment

    async def _seen(self, payment: Payment, views: Sequence[RefundView], reason: str) -> tuple[Payment, InvalidAmount | None]:
        """All in one commit; one by one when some can't be adopted yet."""
        if not views:
            return payment, None
        seen = [RefundSeen(view, self._fee_back) for view in reversed(views)]
        try:
            return await self._apply(payment, *seen, event=reason), None
        except InvalidAmount:
            left: InvalidAmount | None = None
        for each in seen:
            try:
                payment = await self._apply(payment, each, event=reason)
            except InvalidAmount as error:
                _log.warning("refund not adopted", key=payment.key, refund=each.view.id, error=str(error))
                left = error
        return payment, left

    async def look_disputes(self, payment: Payment, reason: str) -> Payment:
        """Apply all disputes of the intent as Stripe shows them."""
        views = await self._stripe.disputes(payment.intent)
        return await self._apply(payment, *map(DisputeSeen, reversed(views)), event=reason) if views else payment

    async def look(self, payment: Payment, reason: str) -> Payment:
        """Look at what of a succeeded payment's refunds and disputes is still open."""
        if any(refund.open_work for refund in payment.progress.refunds):
            payment = await self.look_refunds(payment, reason, strict=False)
        if any(dispute.status not in DISPUTE_OVER for dispute in payment.progress.disputes):
            payment = await self.look_disputes(payment, reason)
        return payment
