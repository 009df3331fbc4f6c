"""The HTTP service: authentication, limits, faults and idempotency around the handlers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from pathlib import Path

import msgspec
from aiohttp import web

from sandbox import ids
from sandbox.control import PREFIX as CONTROL_PREFIX
from sandbox.control import Control, reply
from sandbox.serve import drop
from sandbox.stripe import charging, errors, feed, ledger, payouts, refunds, routes, threeds, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.events import Events
from sandbox.stripe.expand import expand
from sandbox.stripe.forms import FormError, Params, nest, pairs
from sandbox.stripe.idempotency import JSON_KIND, Answer, Idempotency, fingerprint
from sandbox.stripe.intents import MetadataIndex
from sandbox.stripe.settlement import Settlement
from sandbox.stripe.world import API_VERSION, World

log = logging.getLogger("sandbox.stripe")

RATE_LIMIT_DEFAULT = 1_000
TEXT_ENCODING = "utf-8"
_JSON = "application/json"
_encode = msgspec.json.Encoder().encode


class RollSecret(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/roll_secret`."""

    endpoint: str
    expires_in_s: float = float(feed.ROLL_S)


class StripeService:
    """One Stripe test account as a service. `rate_limit` is in calls per endpoint and second."""

    def __init__(self, state: Path | None, rate_limit: int = RATE_LIMIT_DEFAULT, settlement_currency: str = "") -> None:
        self.world = World(state)
        self.world.settlement = Settlement(settlement_currency)
        self.world.events = Events(self.world)
        self.world.metadata = MetadataIndex(self.world)
        self._idempotency = Idempotency(self.world)
        self._rate_limit = rate_limit
        charging.register(self.world)
        refunds.register(self.world)
        payouts.register(self.world)
        self._control = Control(
            clock=self.world.clock,
            counts=self.world.counts,
            faults=self.world.faults,
            more={("POST", "roll_secret"): self._roll_secret, ("POST", "balance_transactions"): self._post_balance},
        )

    async def start(self, url: str) -> None:
        """Begin; see `serve.Service`."""
        self.world.url = url
        self.world.events.webhooks.deliveries.start()
        self.world.timers.arm()

    async def stop(self) -> None:
        """End; see `serve.Service`."""
        self.world.timers.stop()
        await self.world.events.webhooks.deliveries.stop()
        self.world.store.close()

    def _roll_secret(self, body: bytes) -> object:
        asked = msgspec.json.decode(body, type=RollSecret)
        return feed.roll_secret(self.world, asked.endpoint, asked.expires_in_s)

    def _post_balance(self, body: bytes) -> object:
        asked = msgspec.json.decode(body, type=ledger.Posting)
        return ledger.post_other(self.world, asked)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path = request.path
        if path.startswith(routes.PREFIX):
            return await self._api(request, path)
        if path.startswith(CONTROL_PREFIX):
            answer = await self._control.handle(request)
            await self.world.store.committed()
            return answer
        if path.startswith(threeds.PREFIX):
            return await self._threeds(request, path.removeprefix(threeds.PREFIX))
        if path in ("/livez", "/readyz"):
            return reply({"status": "ok"})
        return reply(
            {"error": {"type": "invalid_request_error", "message": f"Unrecognized request URL ({request.method}: {path})."}}, 404
        )

    async def _threeds(self, request: web.BaseRequest, intent_id: str) -> web.StreamResponse:
        if request.method == "POST":
            answer = threeds.decide(self.world, intent_id, (await request.read()).decode(TEXT_ENCODING, "replace"))
            await self.world.store.committed()
            return answer
        return threeds.show(self.world, intent_id)

    async def _api(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """One call of Stripe's API, with whatever fault hits it."""
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=_cross_origin(request))
        world = self.world
        faults = world.faults
        request_id = "req_" + ids.text(14)
        route, identifier = routes.find(request.method, path)
        name = route.name if route else "unknown"
        calls = world.counts.call(name)
        if faults.settings.down:
            world.counts.faults["down"] += 1
            return drop(request, reset=True)
        if faults.hits("reset", name):
            return drop(request, reset=True)
        try:
            if route is None:
                raise errors.StripeError(
                    404,
                    "invalid_request_error",
                    f"Unrecognized request URL ({request.method}: {path}). Please see https://stripe.com/docs or we can help at "
                    "https://support.stripe.com/.",
                )
            if calls > self._rate_limit or faults.hits("rate_limited", name):
                raise errors.rate_limited("endpoint-rate")
            body = (await request.read()).decode(TEXT_ENCODING, "replace")
            if faults.hits("error_before", name):
                raise errors.api_error(stored=False)
            return await self._enter(request, route, identifier, body, request_id)
        except FormError as error:
            failure = errors.invalid(str(error), code=error.code, param=error.param)
        except errors.StripeError as error:
            failure = error
        return self._respond(request, request_id, failure.status, _encode(failure.body(request_id)), headers=failure.headers)

    async def _enter(
        self, request: web.BaseRequest, route: routes.Route, identifier: str, body: str, request_id: str
    ) -> web.StreamResponse:
        """Authenticate, look the idempotency key up, wait as the latency says, execute, and answer after the commit."""
        text = request.query_string if request.method == "GET" else body or request.query_string
        flat = pairs(text)
        api_key, publishable = _authenticate(request, flat)
        if publishable and not route.browser:
            raise errors.StripeError(
                403,
                "invalid_request_error",
                "This API call cannot be made with a publishable API key. Please use a secret API key.",
            )
        key = request.headers.get("Idempotency-Key") if request.method == "POST" else None
        latency_s = self.world.faults.between("latency_ms", route.name) / 1_000
        ticket: int | None = None
        mark = b""
        if key:
            mark = fingerprint(request.path, flat)
            found = self._idempotency.begin(api_key, key, mark)
            if isinstance(found, Answer):
                if latency_s:
                    await asyncio.sleep(latency_s)
                await self.world.store.committed()
                return self._replay(request, request_id, found, key)
            ticket = found
        call = Call(
            params=Params(nest(flat)),
            id=identifier,
            request_id=request_id,
            idempotency_key=key,
            publishable=publishable,
            url=self.world.url,
        )
        try:
            if latency_s:
                await asyncio.sleep(latency_s / 2)
            status, data, failure = self._execute(route, call, ticket, mark)
        finally:
            if ticket is not None:
                self._idempotency.release(ticket)
        await self.world.store.committed()
        if latency_s:
            await asyncio.sleep(latency_s / 2)
        if failure is None and request.method != "GET" and self.world.faults.hits("lost_answer", route.name):
            return drop(request, reset=False)
        return self._respond(request, request_id, status, data, key=key)

    def _execute(
        self, route: routes.Route, call: Call, ticket: int | None, mark: bytes
    ) -> tuple[int, bytes, errors.StripeError | None]:
        """Execute and keep the answer, in one step of the loop. Returns status, body, and a failure that isn't kept."""
        world = self.world
        writes = not route.name.startswith("GET")
        if writes:
            world.events.request, world.events.idempotency_key = call.request_id, call.idempotency_key
        kind, kept = JSON_KIND, b""
        try:
            result = route.handler(world, call)
            status = 200
            data = _encode(self._shown(result, call))
            if isinstance(result, Object) and not call.publishable and result.more is None and "expand" not in call.params:
                kind, kept = result.kind, world.tables[result.kind].pack(result.row)
        except FormError as error:
            failure = errors.invalid(str(error), code=error.code, param=error.param)
            return failure.status, _encode(failure.body(call.request_id)), failure
        except errors.StripeError as error:
            status, data = error.status, _encode(error.body(call.request_id))
            if not error.stored:
                return status, data, error
        except Exception:
            log.exception("%s failed", route.name)
            failure = errors.api_error(stored=False)
            return failure.status, _encode(failure.body(call.request_id)), failure
        finally:
            world.events.request = world.events.idempotency_key = None
        if writes and world.faults.hits("error_after", route.name):
            failure = errors.api_error(stored=True)
            status, data, kind = failure.status, _encode(failure.body(call.request_id)), JSON_KIND
        if ticket is not None:
            kept = kept if kind else data
            self._idempotency.keep(ticket, Answer(world.now_s(), mark, status, kind, kept))
        return status, data, None

    def _shown(self, result: Result, call: Call) -> object:
        """What a result looks like to this caller."""
        if not isinstance(result, Object):
            view = result
        else:
            view = views.RENDER[result.kind](self.world, result.row)
            if result.more:
                view.update(result.more)
            if call.publishable and result.kind == "payment_intent":
                view = {name: value for name, value in view.items() if name in views.PUBLISHABLE_MEMBERS}
        if "expand" in call.params:
            paths = call.params.texts("expand")
            if paths:
                try:
                    view = expand(self.world, view, paths)
                except errors.StripeError as error:
                    error.stored = True  # by now the call has been executed
                    raise
        return view

    def _replay(self, request: web.BaseRequest, request_id: str, answer: Answer, key: str) -> web.StreamResponse:
        data = answer.data if not answer.kind else _encode(views.of_snapshot(self.world, answer.kind, answer.data))
        return self._respond(request, request_id, answer.status, data, {"Idempotent-Replayed": "true"}, key)

    def _respond(
        self,
        request: web.BaseRequest,
        request_id: str,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        key: str | None = None,
    ) -> web.Response:
        self.world.counts.statuses[str(status)] += 1
        every = {
            "Content-Type": _JSON,
            "Request-Id": request_id,
            "Stripe-Version": request.headers.get("Stripe-Version", API_VERSION),
        }
        if key:
            every["Idempotency-Key"] = key
            if not headers:
                every["Original-Request"] = request_id
        if headers:
            every.update(headers)
        if "Origin" in request.headers:
            every.update(_cross_origin(request))
        return web.Response(body=data, status=status, headers=every)


def _cross_origin(request: web.BaseRequest) -> dict[str, str]:
    """Browsers may call from any origin, as at Stripe."""
    return {
        "Access-Control-Allow-Origin": request.headers.get("Origin", "*"),
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type"),
        "Access-Control-Max-Age": "300",
    }


def _authenticate(request: web.BaseRequest, flat: list[tuple[str, str]]) -> tuple[str, bool]:
    """The API key of the call and whether it is a browser's (publishable) key. 401 when there is none that counts."""
    header = request.headers.get("Authorization", "")
    scheme, _, value = header.partition(" ")
    key = value.strip()
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(key, validate=True).decode(TEXT_ENCODING).partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            key = ""
    elif scheme.lower() != "bearer":
        key = next((text for name, text in flat if name == "key"), "")
    if key.startswith("sk_test_"):
        return key, False
    if key.startswith("pk_test_"):
        return key, True
    if not key:
        raise errors.unauthorized(
            "You did not provide an API key. You need to provide your API key in the Authorization header, using Bearer auth "
            "(e.g. 'Authorization: Bearer YOUR_SECRET_KEY')."
        )
    raise errors.unauthorized(
        f"Invalid API Key provided: {key[:7]}{'*' * min(20, max(0, len(key) - 11))}{key[-4:] if len(key) > 11 else ''}"
    )
