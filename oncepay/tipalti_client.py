"""The only way to Tipalti. Only the base URL tells the stand-in from the real one.

A submission is never repeated here: whoever made it looks by reference code when it got no usable answer. Reads are
repeated a few times.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Generic, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from prometheus_client import Counter, Histogram

from oncepay.errors import OncepayError, Unavailable
from oncepay.payout import PaymentView, Payout
from oncepay.settings import TipaltiSettings
from oncepay.tipalti_objects import (
    BatchObject,
    FundingObject,
    FundingView,
    InstructionObject,
    LineObject,
    PayeeObject,
    PayeePage,
    PaymentObject,
    PaymentPage,
    RawPage,
    TokenObject,
    amount_object,
)

API = "/api/v1"
BATCH_MAX = 250
"""Lines of a batch, and rows of a page."""
LOOK_MAX = 100
"""Reference codes that are looked up at once: they go into the URL."""
FILTER_BYTES_MAX = 5_000
TRIES = 3
PAUSE_S = 0.3
TOKEN_SLACK_S = 60.0
"""A token is replaced so long before its end."""
CONCURRENCY_MAX = 4
TOLERANCE_S = 300
STAMP_DIGITS_MAX = 12

CALLS = Counter("oncepay_tipalti_calls_total", "Calls to Tipalti.", ["call", "outcome"])
SECONDS = Histogram("oncepay_tipalti_call_seconds", "Calls to Tipalti.", ["call"])

S = TypeVar("S")
T = TypeVar("T")
_encode = msgspec.json.Encoder(decimal_format="number").encode


class TipaltiUnavailable(Unavailable):
    """Tipalti can't be reached, or gave no usable answer."""

    slug = "tipalti-unavailable"


class TipaltiRefused(OncepayError):
    """Tipalti refuses the request as a whole."""

    status = 502
    slug = "tipalti-refused"


class _OnlyId(msgspec.Struct):
    id: str


class _TokenOver(TipaltiUnavailable):
    """Tipalti doesn't take the access token any more. Nothing was done."""


class TipaltiOff(OncepayError):
    """This deployment has no Tipalti account: payouts are exported and booked by hand."""

    status = 409
    slug = "tipalti-off"


class Listed(msgspec.Struct, Generic[T]):
    """A page of a list. `unreadable`: ids, and why. `cursor` leads on; None at the end."""

    items: list[T]
    unreadable: list[tuple[str, str]]
    cursor: str | None


class TipaltiClient:
    """Calls to one payer's account: `async with TipaltiClient(settings) as tipalti: ...`."""

    def __init__(self, settings: TipaltiSettings) -> None:
        self._settings = settings
        self._base_url = settings.base_url.rstrip("/")
        self._refresh_token = settings.refresh_token
        self._token = ""
        self._token_until_s = 0.0
        self._token_lock = asyncio.Lock()
        self._places = asyncio.Semaphore(CONCURRENCY_MAX)
        self._http: aiohttp.ClientSession | None = None

    @property
    def on(self) -> bool:
        """Whether this deployment has an account."""
        return bool(self._base_url)

    async def __aenter__(self) -> TipaltiClient:
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._http is not None:
            await self._http.close()

    async def submit(self, payouts: Sequence[Payout]) -> dict[str, LineObject]:
        """Send a batch; its lines by reference code. What has no line has an unknown outcome.

        Raises TipaltiUnavailable (the outcome is unknown) or TipaltiRefused (nothing of it was taken).
        """
        assert 1 <= len(payouts) <= BATCH_MAX
        lines = [InstructionObject(p.payee, amount_object(p.amount, p.currency), p.ref_code) for p in payouts]
        await self._access_token()  # so that what is sent next is sent at once
        body = await self._call("submit", "POST", "/payment-batches", body=_encode({"paymentInstructions": lines}))
        return {line.refCode: line for line in _decoded(body, BatchObject).paymentInstructions}

    async def payments(self, ref_codes: Sequence[str]) -> dict[str, PaymentView]:
        """What Tipalti knows of these reference codes, at most LOOK_MAX of them."""
        return {view.ref_code: view for view in await self.payments_of(ref_codes)}

    async def payments_of(self, ref_codes: Sequence[str]) -> list[PaymentView]:
        """All payments with these reference codes, at most LOOK_MAX of them. There should be one of each."""
        assert 1 <= len(ref_codes) <= LOOK_MAX
        page = _decoded(await self._read("look", "/payments", _among("refCode", ref_codes)), PaymentPage)
        try:
            return [item.view() for item in page.items]
        except ValueError as error:
            raise TipaltiUnavailable(f"a payment that can't be read: {error}") from error

    async def payments_after(self, cursor: str = "", limit: int = BATCH_MAX) -> Listed[PaymentView]:
        """A page of all payments, oldest first."""
        return await self._listed("list", "/payments", cursor, limit, PaymentObject, PaymentObject.view)

    async def fundings_after(self, cursor: str = "", limit: int = BATCH_MAX) -> Listed[FundingView]:
        """A page of what came to the balance from the bank, oldest first."""
        return await self._listed("fundings", "/fundings", cursor, limit, FundingObject, FundingObject.view)

    async def _listed(self, call: str, path: str, cursor: str, limit: int, kind: type[S], view: Callable[[S], T]) -> Listed[T]:
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        page = _decoded(await self._read(call, path, query), RawPage)
        found = Listed[T]([], [], page.nextCursor if page.items and page.nextCursor != cursor else None)
        for item in page.items:
            try:
                found.items.append(view(msgspec.json.decode(item, type=kind)))
            except (msgspec.DecodeError, ValueError) as error:
                found.unreadable.append((_id_of(item), str(error)))
        return found

    async def payees(self, names: Iterable[str]) -> dict[str, PayeeObject]:
        """The payees, by the names asked for (the payer's own ids, else Tipalti's). Those that it doesn't know are absent."""
        wanted = sorted(set(names))
        found: dict[str, PayeeObject] = {}
        for some in _chunks(wanted):
            page = _decoded(await self._read("payees", "/payees", _among("refCode", some)), PayeePage)
            found |= {item.refCode: item for item in page.items}
        absent = [name for name in wanted if name not in found]
        for start in range(0, len(absent), CONCURRENCY_MAX):
            some = absent[start : start + CONCURRENCY_MAX]
            ones = await asyncio.gather(*map(self._payee, some))
            found |= {name: one for name, one in zip(some, ones, strict=True) if one is not None}
        return found

    async def _payee(self, name: str) -> PayeeObject | None:
        try:
            return _decoded(await self._read("payee", f"/payees/{quote(name, safe='')}", {}), PayeeObject)
        except TipaltiRefused:
            return None

    async def create_payee(self, ref_code: str, name: str = "", email: str = "") -> PayeeObject:
        """Make a payee; it is payable when its onboarding at Tipalti is over. Raises TipaltiRefused when it is there."""
        body = _encode({"refCode": ref_code, "name": name or ref_code} | ({"email": email} if email else {}))
        return _decoded(await self._call("create_payee", "POST", "/payees", body=body), PayeeObject)

    async def verified(self, notification: bytes) -> bool:
        """Send a notification's raw body back: whether Tipalti sent it."""
        url = self._settings.verify_url or f"{self._base_url}/notif/ipn.aspx"
        body = await self._asked("verify", "POST", url, {}, {}, notification)
        return body.strip() == b"VERIFIED"

    # One call

    async def _read(self, call: str, path: str, query: Mapping[str, str]) -> bytes:
        """A read, repeated a few times."""
        for attempt in range(1, TRIES):
            try:
                return await self._call(call, "GET", path, query=query)
            except TipaltiUnavailable:
                await asyncio.sleep(PAUSE_S * attempt)
        return await self._call(call, "GET", path, query=query)

    async def _call(
        self, call: str, method: str, path: str, *, query: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> bytes:
        url = f"{self._base_url}{API}{path}"
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            return await self._asked(call, method, url, headers | await self._bearer(), query or {}, body)
        except _TokenOver:
            return await self._asked(call, method, url, headers | await self._bearer(), query or {}, body)

    async def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self._access_token()}"}

    async def _access_token(self) -> str:
        async with self._token_lock:
            if time.monotonic() >= self._token_until_s:
                form = {
                    "grant_type": "refresh_token",
                    "client_id": self._settings.client_id,
                    "client_secret": self._settings.client_secret,
                    "refresh_token": self._refresh_token,
                }
                url = self._settings.token_url or f"{self._base_url}/connect/token"
                token = _decoded(await self._asked("token", "POST", url, {}, {}, form), TokenObject)
                self._token = token.access_token
                self._token_until_s = time.monotonic() + max(1.0, token.expires_in - TOKEN_SLACK_S)
                self._refresh_token = token.refresh_token or self._refresh_token
            return self._token

    async def _asked(
        self,
        call: str,
        method: str,
        url: str,
        headers: Mapping[str, str],
        query: Mapping[str, str],
        body: bytes | dict[str, str] | None,
    ) -> bytes:
        assert self._http is not None, "open the client first"
        if not self.on:
            raise TipaltiOff
        began_s = time.monotonic()
        try:
            async with self._places, self._http.request(method, url, headers=headers, params=query, data=body) as answer:
                content, status = await answer.read(), answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            CALLS.labels(call, "unanswered").inc()
            raise TipaltiUnavailable(f"{call}: {error!r}") from error
        finally:
            SECONDS.labels(call).observe(time.monotonic() - began_s)
        CALLS.labels(call, "ok" if status < 300 else str(status)).inc()
        if status < 300:
            return content
        text = f"{call}: {status} {content[:300].decode(errors='replace')}"
        if status == 401:
            self._token_until_s = 0.0  # the next call takes a new token
            raise _TokenOver(text)
        if status in (400, 404, 409, 422):
            raise TipaltiRefused(text)
        raise TipaltiUnavailable(text)


def check_signature(body: bytes, header: str, secrets: Iterable[str], now_s: float) -> bool:
    """Whether `tipalti-signature` (`<seconds since 1970>,<hex HMAC-SHA256 of "<seconds>-<body>">`) is of one of the secrets
    and at most TOLERANCE_S old."""
    stamp, _, digest = header.partition(",")
    if not (header.isascii() and stamp.isdigit() and len(stamp) <= STAMP_DIGITS_MAX) or abs(now_s - int(stamp)) > TOLERANCE_S:
        return False
    signed = stamp.encode() + b"-" + body
    made = [hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets]
    return any([hmac.compare_digest(one, digest.strip().lower()) for one in made])


def _chunks(values: Sequence[str]) -> Iterator[list[str]]:
    """Values in pieces that fit into a URL."""
    chunk: list[str] = []
    size_bytes = 0
    for value in values:
        cost_bytes = len(quote(value, safe="")) + 9
        if chunk and (size_bytes + cost_bytes > FILTER_BYTES_MAX or len(chunk) == BATCH_MAX):
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(value)
        size_bytes += cost_bytes
    if chunk:
        yield chunk


def _among(field: str, values: Sequence[str]) -> dict[str, str]:
    quoted = ",".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    return {"filter": f"{field}=in=({quoted})", "limit": str(BATCH_MAX)}


def _id_of(item: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(item, type=_OnlyId).id
    except msgspec.DecodeError:
        return "?"


def _decoded(body: bytes, kind: type[T]) -> T:
    """An answer's body. What can't be read leaves the outcome unknown, like no answer."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise TipaltiUnavailable(f"an answer that can't be read as {kind.__name__}: {error}") from error
