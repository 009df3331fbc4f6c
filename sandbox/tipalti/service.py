"""The HTTP service of the Tipalti stand-in: tokens, faults, and the calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from aiohttp import web

from sandbox import ids
from sandbox.control import PREFIX as CONTROL_PREFIX
from sandbox.control import Control, reply
from sandbox.serve import drop
from sandbox.store import Row, SqlValue, Table
from sandbox.tipalti import filters, funds, model, payees, payments
from sandbox.tipalti.errors import TipaltiError, invalid
from sandbox.tipalti.world import RECEIVERS_MAX, World

log = logging.getLogger("sandbox.tipalti")

API_PREFIX = "/api/v1"
TOKEN_PATHS = ("/connect/token", "/oauth/token")
IPN_VERIFY_PATH = "/notif/ipn.aspx"
TOKEN_LIFE_S = 3_600
REFRESH_PREFIX = "rt_test_"
"""Refresh tokens that are accepted."""
PAGE_DEFAULT = 100
PAGE_MAX = 250

R = TypeVar("R", bound=Row)


class NewReceiver(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/notifications` (at Tipalti this is set up in its web pages)."""

    url: str
    secret: str


class TipaltiService:
    """One payer's account as a service."""

    def __init__(self, state: Path | None) -> None:
        self.world = World(state)
        payees.register(self.world)
        self.account = funds.Account(self.world)
        payments.register(self.world, self.account)
        self._control = Control(
            clock=self.world.clock,
            counts=self.world.counts,
            faults=self.world.faults,
            more={
                ("POST", "payee"): lambda body: payees.control(self.world, body),
                ("POST", "notifications"): self._add_receiver,
                ("GET", "funding"): lambda _: funds.shown(self.account),
                ("PUT", "funding"): lambda body: funds.control_settings(self.account, body),
                ("POST", "funding"): self._fund,
                ("PUT", "cutoff"): lambda body: funds.control_cutoff(self.account, body),
            },
        )

    async def start(self, url: str) -> None:
        """Begin; see `serve.Service`."""
        del url
        self.world.deliveries.start()
        self.world.timers.arm()

    async def stop(self) -> None:
        """End; see `serve.Service`."""
        self.world.timers.stop()
        await self.world.deliveries.stop()
        self.world.store.close()

    def _add_receiver(self, body: bytes) -> object:
        asked = msgspec.json.decode(body, type=NewReceiver)
        world = self.world
        known = world.receivers.page(RECEIVERS_MAX)
        row = next((receiver for receiver in known if receiver.url == asked.url), None)
        if row is not None:
            row.secret = asked.secret
        elif len(known) == RECEIVERS_MAX:
            raise ValueError(f"no more than {RECEIVERS_MAX} receivers")
        else:
            row = model.Receiver(world.receivers.new_id(), world.now_s(), asked.url, asked.secret)
        world.receivers.save(row)
        return {"id": row.id, "url": row.url}

    def _fund(self, body: bytes) -> object:
        answer = funds.control_fund(self.account, body)
        payments.funded(self.world, self.account)
        return answer

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path = request.path
        if path.startswith(CONTROL_PREFIX):
            answer = await self._control.handle(request)
            await self.world.store.committed()
            return answer
        if path in ("/livez", "/readyz"):
            return reply({"status": "ok"})
        return await self._api(request, path)

    async def _api(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """One call, with whatever fault hits it."""
        world, faults = self.world, self.world.faults
        trace_id = ids.text(16)
        name, call = self._find(request.method, path.removeprefix(API_PREFIX).rstrip("/"))
        world.counts.call(name)
        if faults.settings.down:
            world.counts.faults["down"] += 1
            return drop(request, reset=True)
        if faults.hits("reset", name):
            return drop(request, reset=True)
        try:
            if faults.hits("rate_limited", name):
                raise TipaltiError(429, "TOO_MANY_REQUESTS", "Too many requests.")
            body = await request.read()
            if faults.hits("error_before", name):
                raise TipaltiError(500, "INTERNAL_ERROR", "An unknown error occurred. (A fault of the sandbox.)")
            if call is None:
                raise TipaltiError(404, "NOT_FOUND", f"There is no call {request.method} {path}.")
            if path == IPN_VERIFY_PATH:
                return web.Response(text="VERIFIED" if self._sent(body) else "INVALID")
            if path not in TOKEN_PATHS:
                self._authenticate(request)
            latency_s = faults.between("latency_ms", name) / 1_000
            if latency_s:
                await asyncio.sleep(latency_s / 2)
            status, result = self._execute(request, call, body)
            await world.store.committed()
            if latency_s:
                await asyncio.sleep(latency_s / 2)
            if request.method != "GET" and faults.hits("lost_answer", name):
                return drop(request, reset=False)
            if request.method != "GET" and faults.hits("error_after", name):
                raise TipaltiError(500, "INTERNAL_ERROR", "An unknown error occurred. (A fault of the sandbox.)")
            return self._respond(status, result)
        except TipaltiError as error:
            return self._respond(error.status, error.body(trace_id))

    def _respond(self, status: int, result: object) -> web.Response:
        self.world.counts.statuses[str(status)] += 1
        answer = reply(result, status)
        answer.headers["Date"] = formatdate(self.world.clock.now(), usegmt=True)
        return answer

    def _execute(
        self, request: web.BaseRequest, call: Callable[[web.BaseRequest, bytes], object], body: bytes
    ) -> tuple[int, object]:
        """Execute in one step of the loop."""
        try:
            result = call(request, body)
        except msgspec.DecodeError as error:
            raise invalid(str(error)) from error
        created = request.method == "POST" and request.path not in TOKEN_PATHS
        return (201 if created else 200), result

    def _find(self, method: str, path: str) -> tuple[str, Callable[[web.BaseRequest, bytes], object] | None]:
        """The name of a call and what executes it."""
        world = self.world
        parts = path.strip("/").split("/")
        match (method, *parts):
            case ("POST", "connect" | "oauth", "token"):
                return "POST /connect/token", self._token
            case ("POST", "notif", "ipn.aspx"):
                return f"POST {IPN_VERIFY_PATH}", lambda request, body: None
            case ("POST", "payees"):
                return "POST /payees", lambda request, body: payees.create(world, body)
            case ("GET", "payees"):
                return "GET /payees", self._list_payees
            case ("GET", "payees", identifier):
                return "GET /payees/{id}", lambda request, body: payees.retrieve(world, identifier)
            case ("POST", "payment-batches"):
                return "POST /payment-batches", lambda request, body: payments.create_batch(world, self.account, body)
            case ("GET", "payment-batches", identifier):
                return "GET /payment-batches/{id}", lambda request, body: payments.retrieve_batch(world, identifier)
            case ("GET", "payment-batches", identifier, "instructions"):
                return "GET /payment-batches/{id}/instructions", lambda request, body: payments.instructions(world, identifier)
            case ("GET", "fundings"):
                return "GET /fundings", self._list_fundings
            case ("GET", "payments"):
                return "GET /payments", self._list_payments
            case ("GET", "payments", identifier):
                return "GET /payments/{id}", lambda request, body: payments.retrieve(world, identifier)
        return "unknown", None

    def _token(self, request: web.BaseRequest, body: bytes) -> object:
        """POST /connect/token: a refresh token becomes an access token."""
        form = dict(parse_qsl(body.decode("utf-8", "replace")))
        if form.get("grant_type") != "refresh_token":
            raise TipaltiError(400, "unsupported_grant_type", "grant_type is refresh_token.")
        refresh = form.get("refresh_token", "")
        if not refresh.startswith(REFRESH_PREFIX):
            raise TipaltiError(400, "invalid_grant", f"Refresh tokens of the sandbox begin with {REFRESH_PREFIX}.")
        token = "at_test_" + ids.text(32)
        self.world.tokens.put(token, self.world.clock.now() + TOKEN_LIFE_S)
        return {"access_token": token, "expires_in": TOKEN_LIFE_S, "token_type": "Bearer", "refresh_token": refresh}

    def _authenticate(self, request: web.BaseRequest) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        rows = self.world.store.query("SELECT expires FROM tokens WHERE token = ?", (token.strip(),))
        if scheme.lower() != "bearer" or not rows or rows[0][0] <= self.world.clock.now():
            raise TipaltiError(401, "UNAUTHORIZED", "The access token is missing, unknown or expired.")

    def _sent(self, body: bytes) -> bool:
        """Whether a notification with exactly this body was made here."""
        try:
            identifier = msgspec.json.decode(body, type=dict[str, object]).get("id")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        notice = self.world.notices.get(identifier) if isinstance(identifier, str) else None
        return notice is not None and notice.body == body

    def _list_payees(self, request: web.BaseRequest, body: bytes) -> object:
        return self._list(request, self.world.payees, {"refCode": "ref_code"}, payees.show)

    def _list_fundings(self, request: web.BaseRequest, body: bytes) -> object:
        return self._list(
            request, self.world.fundings, {"currency": "currency"}, lambda row: funds.show(row, payments.exponent(row.currency))
        )

    def _list_payments(self, request: web.BaseRequest, body: bytes) -> object:
        return self._list(request, self.world.payments, payments.FILTER_FIELDS, payments.show)

    def _list(
        self, request: web.BaseRequest, table: Table[R], fields: dict[str, str], show: Callable[[R], dict[str, object]]
    ) -> object:
        """A page, oldest first: `filter`, `limit` (up to 250), `cursor` (the last id of the page before)."""
        query = dict(parse_qsl(request.query_string))
        clauses = filters.parse(query.get("filter", ""), fields)
        try:
            limit = max(1, min(PAGE_MAX, int(query.get("limit") or query.get("pageSize") or PAGE_DEFAULT)))
        except ValueError as error:
            raise invalid("limit is a number.") from error
        cursor = query.get("cursor", "")
        where, values = ["ord > ?"], list[SqlValue]([ids.ordinal(cursor) if cursor else 0])
        for column, allowed in clauses:
            where.append(f"{column} IN ({', '.join('?' * len(allowed))})")
            values += allowed
        condition = " AND ".join(where)
        rows = table.sql(f"SELECT data FROM {table.name} WHERE {condition} ORDER BY ord LIMIT ?", [*values, limit + 1])  # noqa: S608
        total = self.world.store.query(f"SELECT count(*) FROM {table.name} WHERE {condition}", values)[0][0]  # noqa: S608
        more = len(rows) > limit
        rows = rows[:limit]
        return {
            "items": [show(row) for row in rows],
            "totalCount": total,
            "nextCursor": rows[-1].id if more else None,
        }
