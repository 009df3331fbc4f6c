"""The one way to Stripe: the `stripe` package's retries over kept connections, with answers as typed views.

Retries and their pauses are the library's; its tree of objects is left out.
Calls are bounded in number and time. What comes back is a view of the PaymentIntent, or one of three errors: a decline,
a refusal (Stripe says no, for good), or StripeUnavailable (the outcome is not known).
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import msgspec
import stripe
from prometheus_client import Counter, Histogram

from oncepay.breaker import Breaker
from oncepay.budget import Budget, BudgetShort
from oncepay.deadlines import Deadlines
from oncepay.errors import OncepayError, StripeUnavailable
from oncepay.payment import DisputeView, Failure, IntentView, RefundView
from oncepay.settings import StripeSettings
from oncepay.stripe_http import REPLAYED, StripeHttp
from oncepay.stripe_objects import (
    BankPayoutList,
    ChargeObject,
    DisputeList,
    DisputeObject,
    ErrorAnswer,
    ErrorObject,
    EventList,
    IntentList,
    IntentObject,
    LedgerTransactionList,
    LedgerTransactionObject,
    RefundList,
    RefundObject,
    failure_of,
)
from oncepay.wire import Answer

CONCURRENCY_MAX = 128
DEADLINE_S = 60.0
"""A call with all its retries; past it the outcome is unknown."""
FAILURES_MAX = 10
"""Calls in a row without a usable answer after which the others are held back."""
PAGE_MAX = 100
EXPAND = ["latest_charge.balance_transaction"]
EXPAND_REFUND = ["balance_transaction", "failure_balance_transaction"]

T = TypeVar("T")

CALLS = Counter("oncepay_stripe_calls_total", "Calls to Stripe.", ["call", "outcome"])
SECONDS = Histogram("oncepay_stripe_call_seconds", "Time of a call to Stripe with its retries.", ["call"])


class Declined(OncepayError):
    """The payment method was declined."""

    status = 402
    slug = "declined"

    def __init__(self, failure: Failure, charge: str, view: IntentView | None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.charge = charge
        self.view = view


class StripeRefused(OncepayError):
    """Stripe refused the request, and would refuse it again."""

    status = 422
    slug = "stripe-refused"

    def __init__(self, error: ErrorObject) -> None:
        super().__init__(error.message or error.code or error.type)
        self.code = error.code or error.type
        self.view = error.payment_intent.view() if error.payment_intent else None


class StripeGateway:
    """Calls to one Stripe account. Open it in a running loop: `async with StripeGateway(settings) as gateway: ...`."""

    def __init__(self, settings: StripeSettings, budget: Budget | None = None) -> None:
        self._settings = settings
        self._budget = budget
        self._breaker = Breaker(failures_max=FAILURES_MAX)
        self._slots = asyncio.Semaphore(CONCURRENCY_MAX)
        self._http: StripeHttp | None = None
        self._deadlines = Deadlines()

    async def __aenter__(self) -> StripeGateway:
        secure = self._settings.base_url.startswith("https")
        context = ssl.create_default_context(cafile=stripe.ca_bundle_path) if secure else None
        self._http = StripeHttp(self._settings, self._budget, context)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._http is not None:
            await self._http.close()

    async def create(self, parameters: Mapping[str, object], idempotency_key: str, api_version: str) -> IntentView:
        """Create a PaymentIntent, unconfirmed. Raises StripeRefused or StripeUnavailable."""
        return (await self._post("create", "/v1/payment_intents", parameters, idempotency_key, api_version)).view()

    async def confirm(self, intent: str, parameters: Mapping[str, object], idempotency_key: str, api_version: str) -> IntentView:
        """Confirm. Raises Declined, StripeRefused or StripeUnavailable."""
        path = f"/v1/payment_intents/{intent}/confirm"
        return (await self._post("confirm", path, {**parameters, "expand": EXPAND}, idempotency_key, api_version)).view()

    async def cancel(self, intent: str, idempotency_key: str, api_version: str) -> IntentView:
        """Cancel. Raises StripeRefused with the intent's view when its state doesn't allow it."""
        path = f"/v1/payment_intents/{intent}/cancel"
        return (await self._post("cancel", path, {"expand": EXPAND}, idempotency_key, api_version)).view()

    async def capture(self, intent: str, amount: int, idempotency_key: str, api_version: str) -> IntentView:
        """Capture `amount` minor units. Raises Declined, or StripeRefused with the view of an intent whose state forbids it."""
        path, parameters = f"/v1/payment_intents/{intent}/capture", {"amount_to_capture": amount, "expand": EXPAND}
        return (await self._post("capture", path, parameters, idempotency_key, api_version)).view()

    async def refund(self, parameters: Mapping[str, object], idempotency_key: str, api_version: str) -> RefundView:
        """Make a refund. Raises Declined, StripeRefused or StripeUnavailable."""
        options = {"idempotency_key": idempotency_key, "api_version": api_version}
        body = await self._call("refund", "post", "/v1/refunds", {**parameters, "expand": EXPAND_REFUND}, options)
        return _decoded(body, RefundObject).view()

    async def refunds(self, intent: str) -> list[RefundView]:
        """All refunds of an intent, newest first, with their balance transactions (at most PAGE_MAX)."""
        expand = [f"data.{name}" for name in EXPAND_REFUND]
        query = {"payment_intent": intent, "limit": PAGE_MAX, "expand": expand}
        body = await self._call("list", "get", "/v1/refunds", query, {})
        return [item.view() for item in _decoded(body, RefundList).data]

    async def disputes(self, intent: str) -> list[DisputeView]:
        """All disputes of an intent, newest first."""
        body = await self._call("list", "get", "/v1/disputes", {"payment_intent": intent, "limit": PAGE_MAX}, {})
        return [item.view() for item in _decoded(body, DisputeList).data]

    async def refunds_since(self, *, created_gte: int, starting_after: str = "") -> RefundList:
        """One page (at most 100, newest first) of the account's refunds made since then (seconds since 1970)."""
        body = await self._call("list", "get", "/v1/refunds", _span(created_gte, None, starting_after), {})
        return _decoded(body, RefundList)

    async def disputes_since(self, *, created_gte: int, starting_after: str = "") -> DisputeList:
        """One page (at most 100, newest first) of the account's disputes opened since then (seconds since 1970)."""
        body = await self._call("list", "get", "/v1/disputes", _span(created_gte, None, starting_after), {})
        return _decoded(body, DisputeList)

    async def dispute_evidence(self, dispute: str, evidence: Mapping[str, str], *, submit: bool) -> DisputeView:
        """Put evidence to a dispute; with `submit` it is handed in for good. Raises StripeRefused."""
        parameters = {"evidence": dict(evidence), "submit": submit}
        body = await self._call("dispute", "post", f"/v1/disputes/{dispute}", parameters, {})
        return _decoded(body, DisputeObject).view()

    async def retrieve(self, intent: str) -> IntentView:
        """The PaymentIntent as it is now, with its latest charge and that one's balance transaction."""
        body = await self._call("retrieve", "get", f"/v1/payment_intents/{intent}", {"expand": EXPAND}, {})
        return _decoded(body, IntentObject).view()

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList:
        """One page (at most 100, newest first) of PaymentIntents created in the given span (seconds since 1970)."""
        created = {"gte": created_gte} | ({"lte": created_lte} if created_lte is not None else {})
        query: dict[str, object] = {"limit": PAGE_MAX, "created": created, "expand": [f"data.{EXPAND[0]}"]}
        if starting_after:
            query["starting_after"] = starting_after
        return _decoded(await self._call("list", "get", "/v1/payment_intents", query, {}), IntentList)

    async def events(
        self, *, types: Collection[str], created_gte: int, starting_after: str = "", ending_before: str = ""
    ) -> EventList:
        """One page (at most 100, newest first) of the account's events of these types (at most 20).

        With `ending_before` it is the page next to that event, not the newest one.
        """
        query: dict[str, object] = {"limit": PAGE_MAX, "created": {"gte": created_gte}, "types": sorted(types)}
        query |= {"starting_after": starting_after} if starting_after else {}
        query |= {"ending_before": ending_before} if ending_before else {}
        return _decoded(await self._call("list", "get", "/v1/events", query, {}), EventList)

    async def balance_transactions(self, *, created_gte: int, created_lt: int, starting_after: str = "") -> LedgerTransactionList:
        """One page (at most 100, newest first) of the account's balance transactions of a span (seconds since 1970)."""
        body = await self._call("list", "get", "/v1/balance_transactions", _span(created_gte, created_lt, starting_after), {})
        return _decoded(body, LedgerTransactionList)

    async def bank_payouts(self, *, created_gte: int, created_lt: int, starting_after: str = "") -> BankPayoutList:
        """One page (at most 100, newest first) of the payouts to the bank of a span (seconds since 1970)."""
        body = await self._call("list", "get", "/v1/payouts", _span(created_gte, created_lt, starting_after), {})
        return _decoded(body, BankPayoutList)

    async def balance_transaction(self, transaction: str) -> LedgerTransactionObject:
        """One balance transaction. Raises StripeRefused when Stripe doesn't have it."""
        body = await self._call("retrieve", "get", f"/v1/balance_transactions/{quote(transaction, safe='')}", {}, {})
        return _decoded(body, LedgerTransactionObject)

    async def charge(self, charge: str) -> ChargeObject:
        """One charge. Raises StripeRefused when Stripe doesn't have it."""
        return _decoded(await self._call("retrieve", "get", f"/v1/charges/{quote(charge, safe='')}", {}, {}), ChargeObject)

    async def _post(
        self, call: str, path: str, parameters: Mapping[str, object], idempotency_key: str, api_version: str
    ) -> IntentObject:
        options = {"idempotency_key": idempotency_key, "api_version": api_version}
        return _decoded(await self._call(call, "post", path, parameters, options), IntentObject)

    async def _call(
        self, call: str, method: str, path: str, parameters: Mapping[str, object], options: Mapping[str, str]
    ) -> bytes:
        async with self._slots:
            if not self._breaker.allowance(1):
                CALLS.labels(call, "held_back").inc()
                raise StripeUnavailable("Stripe gave no usable answers; it is asked again in a moment")
            self._breaker.probing()
            try:
                body = await self._asked(call, method, path, parameters, options)
            except StripeStored:
                self._breaker.success()  # Stripe answers; it is this one request that has gone wrong for good
                raise
            except BudgetShort:
                self._breaker.unanswered()
                raise
            except StripeUnavailable:
                self._breaker.failure()
                raise
            except OncepayError:
                self._breaker.success()
                raise
            except BaseException:
                self._breaker.unanswered()
                raise
            self._breaker.success()
            return body

    async def _asked(
        self, call: str, method: str, path: str, parameters: Mapping[str, object], options: Mapping[str, str]
    ) -> bytes:
        """One call with the library's retries, within DEADLINE_S; the body of a good answer."""
        assert self._http is not None, "open the gateway first"
        started_s = time.monotonic()
        try:
            answer = await self._deadlines.within(DEADLINE_S, self._http.ask(method, path, parameters, **options))
        except (stripe.StripeError, TimeoutError) as error:  # no answer, or one that broke off
            _calls(call, StripeUnavailable.slug).inc()
            raise StripeUnavailable(f"{path}: {error!r}") from error
        finally:
            _seconds(call).observe(time.monotonic() - started_s)
        if 200 <= answer.status < 300:
            _calls(call, "ok").inc()
            return answer.body
        failure = failure_from(answer)
        _calls(call, failure.slug).inc()
        raise failure


def _span(created_gte: int, created_lt: int | None, starting_after: str) -> dict[str, object]:
    created = {"gte": created_gte} | ({"lt": created_lt} if created_lt is not None else {})
    query: dict[str, object] = {"limit": PAGE_MAX, "created": created}
    return query | ({"starting_after": starting_after} if starting_after else {})


@functools.cache
def _calls(call: str, outcome: str) -> Counter:
    return CALLS.labels(call, outcome)


@functools.cache
def _seconds(call: str) -> Histogram:
    return SECONDS.labels(call)


def failure_from(answer: Answer) -> OncepayError:
    """What an answer other than 2xx means.

    Only Stripe's own 400, 402 and 404 say no to the request. All else leaves the outcome unknown, or says nothing of the
    payment: a 409, 429 or 5xx, a key that may not (401, 403), an answer that somebody in between has made.
    """
    try:
        error: ErrorObject | None = msgspec.json.decode(answer.body, type=ErrorAnswer).error
    except msgspec.DecodeError:
        error = None
    text = f"{answer.status} {(error.message or error.code or error.type) if error else 'without a reason'}"
    other_parameters = error is not None and error.type == "idempotency_error"  # those of another version of this code
    if error is not None and answer.status == 402:
        failure, charge = failure_of(error)
        return Declined(failure, charge, error.payment_intent.view() if error.payment_intent else None)
    if error is not None and answer.status in {400, 404} and not other_parameters and error.code != "rate_limit":
        return StripeRefused(error)
    if answer.headers.get(REPLAYED, "").lower() == "true" or (other_parameters and answer.status in {400, 404}):
        return StripeStored(text)
    return StripeUnavailable(text)


def _decoded(body: bytes, kind: type[T]) -> T:
    """An answer's body. What can't be read leaves the outcome unknown, like no answer."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise StripeUnavailable(f"an answer that can't be read as {kind.__name__}: {error}") from error


class StripeStored(StripeUnavailable):
    """The answer to this idempotency key is an error, and will be again: an error that Stripe has stored, or other parameters
    that the key was used with. Only a look can tell what it did."""

    slug = "stripe-stored-error"
