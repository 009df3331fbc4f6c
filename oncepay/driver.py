"""Drives a payment through Stripe: whatever was left behind, by whomever, the next step is found in the row.

The order is the promise: the row is on the quorum before Stripe hears of it; the intent's id and the attempt's number are
on the quorum before confirm is called, for the id that was read from the row. Every step may be repeated by anyone: the
Stripe idempotency key of a step is made of the payment's key and the step's name and number.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Literal

from prometheus_client import Counter

from oncepay.aftercare import Aftercare
from oncepay.errors import OncepayError, StripeUnavailable, WrongState
from oncepay.logs import get_logger
from oncepay.payment import Failure, IntentView, Payment, Status
from oncepay.ports import PaymentStore, StaleView
from oncepay.stripe_client import Declined, StripeGateway, StripeRefused, StripeStored
from oncepay.transition import AttemptDeclined, AttemptStarted, Event, GiveUp, IntentCreated, IntentRefused, IntentSeen

STEPS_MAX = 20
"""Steps of one drive; a payment needs at most eight, so more is a defect."""
ROUNDS_MAX = 3
"""How often one drive sends a step again whose outcome is unknown, before it leaves the payment to the worker."""
ATTEMPTS_MAX = 5
"""Attempts that an error stored by Stripe may cost before the payment is declined for it."""
FIND_PAGES_MAX = 20
NOT_THERE = "resource_missing"
"""Stripe's code for an object that the account doesn't have."""
ACCOUNT_SPAN_S = 30 * 86_400
KEY_SURE_S = 3600
"""Stripe forgets idempotency keys after a day: a confirm that may be older than this is looked for before it is sent."""

Step = Callable[[Payment], Awaitable[Payment]]

_log = get_logger("driver")

STEPS = Counter("oncepay_driver_steps_total", "Steps taken for payments.", ["step"])


class TooManySteps(OncepayError):
    """A payment went on and on."""

    slug = "too-many-steps"


def step_key(key: str, step: str) -> str:
    """The Stripe idempotency key of a step (`create`, `confirm:3`, `cancel:<nonce>`); at most 255 characters."""
    return f"{hashlib.sha256(key.encode()).hexdigest()}:{step}"


def create_parameters(payment: Payment) -> dict[str, object]:
    """What Stripe gets to create the intent: a function of the row alone, so every sender sends the same."""
    terms = payment.terms
    parameters: dict[str, object] = {
        "amount": payment.amount,
        "currency": payment.currency,
        "capture_method": terms.capture_method,
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "metadata": {**terms.metadata, "oncepay_key": payment.key},
    }
    if terms.customer:
        parameters["customer"] = terms.customer
    return parameters


def confirm_parameters(payment: Payment) -> dict[str, object]:
    """What Stripe gets to confirm the row's current attempt."""
    parameters: dict[str, object] = {"payment_method": payment.progress.payment_method}
    if payment.terms.off_session:
        parameters["off_session"] = True
    return parameters


class Driver:
    """Moves payments on. `on_move` hears of every row that this driver committed or found moved.

    `fee_back` (the setting `fee.refunded`) says whether a refund that was made at Stripe gives the platform's fee back.
    """

    def __init__(
        self, store: PaymentStore, stripe: StripeGateway, on_move: Callable[[Payment], None] | None = None, *, fee_back: bool
    ) -> None:
        self._store = store
        self._stripe = stripe
        self._on_move = on_move or (lambda payment: None)
        self._aftercare = Aftercare(stripe, self._apply, step_key, fee_back=fee_back)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def _lock(self, key: str) -> asyncio.Lock:
        """One look and one step at a time for a payment, within this process."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    def is_driving(self, key: str) -> bool:
        """Whether this process is at a look or a step for the payment."""
        lock = self._locks.get(key)
        return lock is not None and lock.locked()

    async def idle(self, key: str) -> None:
        """Return when this process is at no look or step for the payment."""
        async with self._lock(key):
            pass

    async def drive(self, payment: Payment) -> Payment:
        """Take steps until the payment is settled, waits for somebody, or its outcome has to be found out later.

        `payment` is a row behind the quorum. Raises StripeUnavailable when Stripe gave no usable answer in ROUNDS_MAX
        rounds: then the row tells whoever comes next where to go on.
        """
        async with self._lock(payment.key):
            return await self._drive(payment)

    async def drive_on(self, key: str, now_ms: int | None = None) -> Payment | None:
        """Go on with a payment that somebody left behind: look first, give it up when it is past its time, then drive.

        None when there is no such row.
        """
        async with self._lock(key):
            payment = await self._store.get(key)
            if payment is None:
                return None
            expired = payment.expires_at_ms <= (now_ms if now_ms is not None else time.time_ns() // 1_000_000)
            if payment.intent and payment.open_work:
                try:
                    payment = await self._look_on(payment)
                except StripeRefused as refused:
                    if not expired or refused.code != NOT_THERE:
                        raise  # an intent that isn't there may only be given up, once its time is over
            if expired and not payment.terminal and payment.status not in {Status.PROCESSING, Status.REQUIRES_CAPTURE}:
                payment = await self._command(payment, GiveUp("expired"), event="expired")
            return await self._drive(payment)

    async def _look_on(self, payment: Payment) -> Payment:
        """Look at whatever of the payment is open."""
        if payment.status is not Status.SUCCEEDED or payment.progress.stripe_fee < 0:
            payment = await self._look(payment, "poll")
        if payment.status is Status.SUCCEEDED:
            payment = await self._aftercare.look(payment, "poll")
        return payment

    async def look(self, key: str, reason: str) -> Payment | None:
        """Retrieve the payment's intent and apply what it shows, then take what steps follow. None without a row."""
        async with self._lock(key):
            payment = await self._store.get(key)
            if payment is None or not payment.intent or not payment.open_work:
                return payment
            payment = await self._look(payment, reason)
            return await self._drive(payment) if payment.status is Status.REQUIRES_PAYMENT_METHOD else payment

    async def look_after(self, key: str, what: Literal["refunds", "disputes"], reason: str) -> Payment | None:
        """Look at the refunds or the disputes of a payment. None without a row that has an intent and succeeded."""
        async with self._lock(key):
            payment = await self._store.get(key)
            if payment is None or not payment.intent:
                return None
            if payment.status is not Status.SUCCEEDED:
                payment = await self._look(payment, reason)
            if payment.status is not Status.SUCCEEDED:
                return payment
            look = self._aftercare.look_refunds if what == "refunds" else self._aftercare.look_disputes
            return await look(payment, reason)

    async def key_at_stripe(self, intent: str) -> str:
        """The key in an intent's metadata at Stripe; empty when it is none of ours. Raises StripeUnavailable."""
        try:
            return (await self._stripe.retrieve(intent)).key
        except StripeRefused:
            return ""

    async def see(self, payment: Payment, view: IntentView, event: str) -> Payment:
        """Apply a view of the payment's intent to a row that was read *before* Stripe was looked at.

        Facts that are terminal at Stripe always apply; another view only while the row has not changed, else it is dropped.
        """
        try:
            return await self._apply(payment, IntentSeen(view), event=event)
        except StaleView as stale:
            return stale.payment

    async def _apply(self, payment: Payment, *events: Event, event: str) -> Payment:
        after = await self._store.apply(payment, *events, event=event)
        if after is not payment:
            _steps(event).inc()
            log = _log.info if after.settled else _log.debug
            log("moved", key=after.key, status=after.status, version=after.version, event_name=event)
            self._on_move(after)
        return after

    async def _command(self, payment: Payment, *events: Event, event: str) -> Payment:
        """Apply what the row may have outrun meanwhile; then the row as it is goes on."""
        try:
            return await self._apply(payment, *events, event=event)
        except WrongState:
            found = await self._store.get(payment.key)
            if found is None or found.version == payment.version:
                raise
            return found

    async def _look(self, payment: Payment, reason: str) -> Payment:
        """A fresh look at Stripe, applied to the row that was read before it; again while the row moves meanwhile."""
        for _ in range(STEPS_MAX):
            view = await self._stripe.retrieve(payment.intent)
            try:
                return await self._apply(payment, IntentSeen(view), event=reason)
            except StaleView as stale:
                payment = stale.payment
        raise TooManySteps(f"{payment.key} keeps changing under every look")

    async def _drive(self, payment: Payment) -> Payment:
        for _ in range(STEPS_MAX):
            step = self._step(payment)
            if step is None:
                return payment
            before = payment
            try:
                payment = await step(payment)
            except StaleView as stale:
                payment = stale.payment
            if payment is before:
                return payment
        raise TooManySteps(f"{payment.key} is {payment.status} after {STEPS_MAX} steps")

    def _step(self, payment: Payment) -> Step | None:
        """The next thing to do, None where somebody else has the next move."""
        match payment.status:
            case Status.CREATED:
                return self._create
            case Status.ATTEMPTED if payment.terms.payment_method and not payment.progress.attempt:
                return self._first_attempt
            case Status.CONFIRMING:
                return self._confirm
            case Status.REQUIRES_PAYMENT_METHOD if payment.terms.on_decline == "fail":
                return self._give_up_declined
            case Status.CANCELING:
                return self._cancel
            case Status.REQUIRES_CAPTURE if payment.progress.capture is not None:
                return self._aftercare.capture
            case Status.SUCCEEDED if any(refund.status == "requested" for refund in payment.progress.refunds):
                return self._aftercare.refund
        return None

    async def _first_attempt(self, payment: Payment) -> Payment:
        return await self._command(payment, AttemptStarted(1, payment.terms.payment_method), event="attempt 1")

    async def _give_up_declined(self, payment: Payment) -> Payment:
        return await self._command(payment, GiveUp("declined"), event="declined for good")

    async def _create(self, payment: Payment) -> Payment:
        """Create the intent and commit its id, with the first attempt where the body brought a payment method."""
        try:
            view = await self._created(payment)
        except StripeRefused as refused:
            failure = Failure(code=refused.code, message=str(refused))
            return await self._apply(payment, IntentRefused(failure), event="creation refused")
        events: list[Event] = [IntentCreated(view.id, view.client_secret)]
        if payment.terms.payment_method:
            events.append(AttemptStarted(1, payment.terms.payment_method))
        after = await self._committed_creation(payment, events)
        if after.intent != view.id:
            await self._cancel_orphan(view.id, payment)
        return after

    async def _committed_creation(self, payment: Payment, events: list[Event]) -> Payment:
        """Commit the creation only onto a row that is still `created`; a row that moved is returned as it is."""
        try:
            return await self._apply(payment, *events, event="intent created")
        except (OncepayError, StaleView):
            found = await self._store.get(payment.key)
            if found is None or found.status is Status.CREATED:
                raise
            return found

    async def _created(self, payment: Payment) -> IntentView:
        parameters, version = create_parameters(payment), payment.terms.api_version
        step = "create"
        for attempt in range(ROUNDS_MAX):
            try:
                return await self._stripe.create(parameters, step_key(payment.key, step), version)
            except StripeStored:
                found = await self._find(payment)
                if found is not None:
                    return found
                step = f"create:{attempt + 2}"  # nothing was made, and this key will repeat its error for ever
            except StripeUnavailable:
                if attempt == ROUNDS_MAX - 1:
                    raise
                await _pause(attempt)
        raise StripeUnavailable("Stripe stored an error for every try to create the intent")

    async def _find(self, payment: Payment) -> IntentView | None:
        """The unconfirmed intent that an earlier create made without telling us: found by its metadata."""
        start_s = payment.created_at_ms // 1000 - 60
        after = ""
        for _ in range(FIND_PAGES_MAX):
            page = await self._stripe.intents(created_gte=start_s, starting_after=after)
            for item in page.data:
                view = item.view()
                if view.key == payment.key and view.status in {"requires_payment_method", "requires_confirmation"}:
                    return view
            if not page.has_more or not page.data:
                return None
            after = page.data[-1].id
        return None

    async def _cancel_orphan(self, intent: str, payment: Payment) -> None:
        """An intent that lost the race for its row: nothing will ever confirm it; tell Stripe so."""
        _log.info("orphan", key=payment.key, intent=intent)
        try:
            await self._stripe.cancel(intent, step_key(payment.key, f"orphan:{intent}"), payment.terms.api_version)
        except (StripeUnavailable, StripeRefused) as error:
            _log.warning("orphan not canceled", key=payment.key, intent=intent, error=str(error))

    async def _confirm(self, payment: Payment) -> Payment:
        """Confirm the attempt that the row names, and commit the outcome."""
        if time.time() - payment.updated_at_ms / 1000 > KEY_SURE_S:
            looked = await self._look(payment, "look at an old attempt")
            if looked is not payment:
                return looked
        number = payment.progress.attempt
        for round_ in range(ROUNDS_MAX):
            try:
                view = await self._stripe.confirm(
                    payment.intent,
                    confirm_parameters(payment),
                    step_key(payment.key, f"confirm:{number}"),
                    payment.terms.api_version,
                )
                return await self.see(payment, view, "confirm answered")
            except Declined as declined:
                event = AttemptDeclined(number, declined.charge, declined.failure)
                return await self._apply(payment, event, event="declined")
            except StripeRefused as refused:
                return await self._confirm_refused(payment, refused)
            except StripeStored:
                return await self._confirm_stored(payment)
            except StripeUnavailable:
                looked = await self._look(payment, "look after an unknown confirm")
                if looked is not payment or round_ == ROUNDS_MAX - 1:
                    return looked
                await _pause(round_)
        return payment

    async def _confirm_refused(self, payment: Payment, refused: StripeRefused) -> Payment:
        if refused.code == "payment_intent_unexpected_state":
            return await self._look(payment, "look after a refused confirm")
        failure = Failure(code=refused.code, message=str(refused))
        return await self._apply(payment, AttemptDeclined(payment.progress.attempt, "", failure), event="refused")

    async def _confirm_stored(self, payment: Payment) -> Payment:
        """Stripe stored an error for this attempt: it is over. A look tells whether it had its effect all the same."""
        looked = await self._look(payment, "look after a stored error")
        if looked is not payment:
            return looked
        number, method = payment.progress.attempt, payment.progress.payment_method
        over = AttemptDeclined(number, "", Failure(code="processing_error", message="Stripe could not process the attempt."))
        if number >= ATTEMPTS_MAX:
            return await self._apply(payment, over, event="stored error")
        return await self._command(payment, over, AttemptStarted(number + 1, method), event=f"attempt {number + 1}")

    async def _cancel(self, payment: Payment) -> Payment:
        """Cancel at Stripe and commit what it shows then. Each try has a key of its own: an error would be stored."""
        for round_ in range(ROUNDS_MAX):
            try:
                nonce = f"cancel:{time.time_ns():x}"
                view = await self._stripe.cancel(payment.intent, step_key(payment.key, nonce), payment.terms.api_version)
                return await self.see(payment, view, "canceled at Stripe")
            except StripeRefused as refused:
                if refused.code == NOT_THERE and await self._is_gone(payment):
                    return await self.see(payment, IntentView(payment.intent, "canceled"), "not at Stripe")
                looked = await self._look(payment, "look after a refused cancel")
                if looked is payment:
                    _log.info("cancel waits", key=payment.key, code=refused.code)
                return looked
            except StripeUnavailable:
                if round_ == ROUNDS_MAX - 1:
                    return await self._look(payment, "look after an unknown cancel")
                await _pause(round_)
        return payment

    async def _is_gone(self, payment: Payment) -> bool:
        """Whether the account that is asked has intents of ours from those days: else it is another one, and knows nothing."""
        page = await self._stripe.intents(created_gte=payment.created_at_ms // 1000 - ACCOUNT_SPAN_S)
        return any(item.id != payment.intent and item.view().key for item in page.data)


@functools.lru_cache(128)
def _steps(step: str) -> Counter:
    return STEPS.labels(step)


async def _pause(round_: int) -> None:
    """Exponential back-off with jitter: about 0.25, 0.5, 1 s."""
    await asyncio.sleep(0.25 * 2**round_ * random.uniform(0.8, 1.2))
