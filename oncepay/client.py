"""A small async client: takes keys, submits payments, retries safely, waits for the end.

    async with Oncepay(router="http://127.0.0.1:8080", keygen="http://127.0.0.1:8081", api_key=key) as client:
        payment = await client.pay(
            await client.new_key(),
            buyer="b-77",
            currency="usd",
            items=[{"seller": "records-4", "amount": 1499, "quantity": 2}],
            payment_method="pm_card_visa",
        )
        print(payment.status, payment.amount)

Every call is safe to repeat: a payment is submitted again only under the same key. Calls are repeated after connection
errors, 429 and 5xx answers, as long as `deadline_s` allows, no sooner than `Retry-After` says.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

KEYS_AT_ONCE = 100
DEADLINE_S = 120.0
PAUSE_S = 0.1
PAUSE_MAX_S = 2.0
TERMINAL = frozenset({"succeeded", "failed", "canceled"})

T = TypeVar("T")


class Problem(Exception):
    """The answer was a problem (RFC 9457). `type` is stable; `field` names the member of the body that is wrong."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.type = str(body.get("type", "about:blank"))
        self.slug = self.type.rsplit("/", 1)[-1]
        self.title = str(body.get("title", ""))
        self.detail = str(body.get("detail", ""))
        self.field = body.get("field")
        super().__init__(f"{status} {self.slug}: {self.detail or self.title}")


class Unreachable(Exception):
    """No usable answer came within the deadline; the same call may be made again with the same key."""


class PaymentView(msgspec.Struct, frozen=True):
    """A payment as the API shows it. Amounts in minor units. `replayed` says that an earlier call made it."""

    key: str
    status: str
    buyer: str
    currency: str
    amount: int
    version: int
    amount_captured: int = 0
    amount_refunded: int = 0
    items: list[dict[str, Any]] = []
    platform_fee: int = 0
    payment_intent: str | None = None
    client_secret: str = ""
    failure: dict[str, Any] | None = None
    next_action: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    created_at: str = ""
    updated_at: str = ""
    entries: list[dict[str, Any]] = []
    refunds: list[dict[str, Any]] = []
    disputes: list[dict[str, Any]] = []
    successor: str = ""
    replayed: bool = False

    @property
    def terminal(self) -> bool:
        """Whether the status can never change again."""
        return self.status in TERMINAL


class _Keys(msgspec.Struct):
    keys: list[str]


class _Page(msgspec.Struct):
    payments: list[PaymentView]
    cursor: str | None = None


class Oncepay:
    """A client of one deployment. Use it as an async context manager, in one event loop."""

    def __init__(
        self,
        *,
        router: str,
        keygen: str = "",
        aggregator: str = "",
        api_key: str = "",
        deadline_s: float = DEADLINE_S,
        connections: int = 100,
    ) -> None:
        self._router = router.rstrip("/")
        self._keygen = keygen.rstrip("/")
        self._aggregator_url = aggregator.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._deadline_s = deadline_s
        self._connections = connections
        self._keys: deque[str] = deque()
        self._keys_lock = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Oncepay:
        connector = aiohttp.TCPConnector(limit=self._connections)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def keys(self, count: int, slots: tuple[int, int] | None = None) -> list[str]:
        """`count` fresh idempotency keys (1 to 10,000), with `slots` (first, last) of that range of slots only."""
        body = {"count": count} if slots is None else {"count": count, "slots": slots}
        answer = await self._call("POST", f"{self._keygen}/v1/keys", body)
        return msgspec.json.decode(answer.body, type=_Keys).keys

    async def new_key(self) -> str:
        """One fresh key, out of a small supply that is fetched KEYS_AT_ONCE at a time."""
        async with self._keys_lock:
            if not self._keys:
                self._keys.extend(await self.keys(KEYS_AT_ONCE))
            return self._keys.popleft()

    async def pay(
        self,
        key: str,
        *,
        buyer: str,
        currency: str,
        items: Sequence[Mapping[str, Any]],
        wait_s: float = 10.0,
        **fields: Any,
    ) -> PaymentView:
        """Submit a payment under `key`, or hear what became of it. `fields` are the body's other members.

        Returns the payment after at most `wait_s` seconds of settlement, whatever its status is then. Raises Problem for
        an answer that no repetition changes, Unreachable when the deadline is over.
        """
        body = {"buyer": buyer, "currency": currency, "items": list(items), **fields}
        headers = {"Idempotency-Key": key, "Prefer": f"wait={wait_s:g}"}
        return await self._payment("POST", "/v1/payments", body, headers, timeout_s=wait_s + 40)

    async def get(self, key: str) -> PaymentView:
        """The payment with its ledger entries. Raises Problem (404) when there is none."""
        return await self._payment("GET", f"/v1/payments/{quote(key, safe='')}")

    async def confirm(self, key: str, payment_method: str, *, command: str = "", wait_s: float = 10.0) -> PaymentView:
        """Try another payment method on the same payment. `command` is the call's own idempotency key, made when empty."""
        return await self._command(key, "confirm", {"payment_method": payment_method}, command, wait_s)

    async def cancel(self, key: str, *, command: str = "", wait_s: float = 10.0) -> PaymentView:
        """Give the payment up."""
        return await self._command(key, "cancel", {}, command, wait_s)

    async def capture(self, key: str, *, command: str = "", wait_s: float = 10.0, **part: Any) -> PaymentView:
        """Take what was authorised; `amount` or `items` for a part of it."""
        return await self._command(key, "capture", part, command, wait_s)

    async def refund(self, key: str, *, command: str = "", wait_s: float = 10.0, **part: Any) -> PaymentView:
        """Give back all that is left; `amount` or `items` for a part of it, and a `reason`. `command` names the refund."""
        return await self._command(key, "refunds", part, command, wait_s)

    async def _command(self, key: str, what: str, body: Mapping[str, Any], command: str, wait_s: float) -> PaymentView:
        path = f"/v1/payments/{quote(key, safe='')}/{what}"
        headers = {"Idempotency-Key": command or f"command-{secrets.token_hex(16)}", "Prefer": f"wait={wait_s:g}"}
        return await self._payment("POST", path, body, headers, wait_s + 40)

    async def payments(
        self, *, buyer: str = "", seller: str = "", status: str = "", limit: int = 100
    ) -> AsyncIterator[PaymentView]:
        """All payments that fit, newest first, page by page."""
        given = {"buyer": buyer, "seller": seller, "status": status, "limit": str(limit)}
        query = {name: value for name, value in given.items() if value}
        while True:
            text = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
            answer = await self._call("GET", f"{self._router}/v1/payments?{text}")
            page = msgspec.json.decode(answer.body, type=_Page)
            for payment in page.payments:
                yield payment
            if page.cursor is None:
                return
            query["cursor"] = page.cursor

    async def wait(self, key: str, *, timeout_s: float = 60.0) -> PaymentView:
        """Look until the payment is terminal, at most `timeout_s` seconds; the payment as it is then."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = 0.2
        while True:
            payment = await self.get(key)
            if payment.terminal or time.monotonic() + pause_s > deadline_s:
                return payment
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, PAUSE_MAX_S)

    async def derived(self, path: str, **query: str | int) -> Any:
        """The aggregator's answer for `path` (as `/v1/sellers/s-4/revenue`), decoded."""
        text = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in query.items())
        answer = await self._call("GET", f"{self._aggregator_url}{path}{'?' + text if text else ''}")
        return json.loads(answer.body)

    async def aggregator(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The body of the aggregator's answer. A post that may have been done is repeated: use it where that is safe."""
        return (await self._call(method, f"{self._aggregator_url}{path}", body)).body

    async def _payment(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 40.0,
    ) -> PaymentView:
        answer = await self._call(method, self._router + path, body, headers, timeout_s)
        view = msgspec.json.decode(answer.body, type=PaymentView)
        return msgspec.structs.replace(view, replayed=answer.replayed)

    async def _call(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 40.0,
    ) -> _Answer:
        """One call with its repetitions."""
        assert self._session is not None, "use the client in `async with`"
        deadline_s = time.monotonic() + self._deadline_s
        pause_s = PAUSE_S
        data = msgspec.json.encode(body) if body is not None else None
        while True:
            try:
                answer = await self._once(method, url, data, headers, timeout_s)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                again, retry_s, last = True, 0.0, f"{error!r}"
            else:
                if answer.status < 400:
                    return answer
                again, retry_s, last = answer.status == 429 or answer.status >= 500, answer.retry_after_s, answer.problem_text
                if not again:
                    raise Problem(answer.status, answer.problem)
            pause = max(retry_s, pause_s) * random.uniform(0.8, 1.2)
            if time.monotonic() + pause > deadline_s:
                raise Unreachable(f"{method} {url}: {last}")
            await asyncio.sleep(pause)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    async def _once(
        self, method: str, url: str, data: bytes | None, headers: Mapping[str, str] | None, timeout_s: float
    ) -> _Answer:
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        sent = {**(headers or {}), "Content-Type": "application/json"} if data is not None else headers
        async with self._session.request(method, url, data=data, headers=sent, timeout=timeout) as response:
            return _Answer(
                response.status,
                await response.read(),
                response.headers.get("Idempotent-Replayed") == "true",
                _seconds(response.headers.get("Retry-After")),
            )


class _Answer(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    replayed: bool
    retry_after_s: float

    @property
    def problem(self) -> dict[str, Any]:
        try:
            return msgspec.json.decode(self.body, type=dict[str, Any])
        except msgspec.DecodeError:
            return {"detail": self.body[:200].decode("utf-8", "replace")}

    @property
    def problem_text(self) -> str:
        return f"{self.status} {self.problem.get('detail') or self.problem.get('title') or ''}"


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdigit() else 0.0
