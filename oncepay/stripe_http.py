"""Requests to Stripe as they go over the wire: forms, headers, and the `stripe` package's retries.

The package's `raw_request` reads every answer into ordered dictionaries and writes two log lines that nobody sees, which
costs more than the request itself, and its transports cost as much again. So of the package only its retries are used: when a
request is sent again and how long it pauses. A request is made once, as bytes, and goes over `oncepay.wire`; bodies are read
once, by whoever knows their type.
"""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from urllib.parse import quote_plus, urlsplit

import stripe

from oncepay.budget import Budget
from oncepay.settings import StripeSettings
from oncepay.wire import Answer, Wire

RETRIES_MAX = 2
REPLAYED = "idempotent-replayed"
SHOULD_RETRY = "stripe-should-retry"
HEADERS = (SHOULD_RETRY, REPLAYED)
"""What is read of an answer's headers; by the first one Stripe tells the package whether to send it again."""

_UNQUOTED = re.compile(r"[A-Za-z0-9_.~-]*").fullmatch

stripe.enable_telemetry = False  # durations of earlier calls, in a header of each call


class _Request:
    """A request as it goes over the wire, and what came of it when it was sent by itself, before the package was asked."""

    __slots__ = ("data", "first")

    def __init__(self, data: bytes, first: Answer | stripe.APIConnectionError) -> None:
        self.data = data
        self.first: Answer | stripe.APIConnectionError | None = first


class _Transport(stripe.HTTPClient):
    """The package's retries over `Wire`. Every request (retries too) takes its turn in the rate budget first."""

    name = "oncepay"

    def __init__(self, budget: Budget | None, wire: Wire) -> None:
        super().__init__()
        self._budget = budget
        self._wire = wire

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: object = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        """`url` is the path alone, `post_data` the request. The first time its first answer is told again."""
        assert isinstance(post_data, _Request)
        answer, post_data.first = post_data.first, None
        if isinstance(answer, stripe.APIConnectionError):
            raise answer
        if answer is None:
            answer = await self.once(method, url, post_data.data)
        return answer.body, answer.status, answer.headers

    async def once(self, method: str, path: str, data: bytes) -> Answer:
        """One request. Raises stripe.APIConnectionError."""
        if self._budget is not None:
            await self._budget.take(method, path)
        try:
            return await self._wire.ask(data)
        except OSError as error:
            raise stripe.APIConnectionError(repr(error), should_retry=True) from error  # type: ignore[no-untyped-call]

    def sleep_async(self, secs: float) -> Awaitable[None]:
        return asyncio.sleep(secs)


class StripeHttp:
    """Sends requests to one account. Open it in a running loop; `secure` is the TLS context where the URL is https."""

    def __init__(self, settings: StripeSettings, budget: Budget | None, secure: ssl.SSLContext | None) -> None:
        url = urlsplit(settings.base_url)
        port = url.port or (443 if secure else 80)
        self._wire = Wire(url.hostname or "", port, secure=secure, timeout_s=settings.timeout_s, headers=HEADERS)
        self._transport = _Transport(budget, self._wire)
        self._base_path = url.path.rstrip("/")
        self._api_version = settings.api_version
        agent = f"Stripe/v1 PythonBindings/{stripe.VERSION}"
        self._head = (
            f" HTTP/1.1\r\nHost: {url.netloc.rpartition('@')[2]}\r\nAuthorization: Bearer {settings.api_key}\r\n"
            f"User-Agent: {agent}\r\nAccept: */*\r\nStripe-Version: "
        )

    async def close(self) -> None:
        """End all connections."""
        await self._wire.close()

    async def ask(
        self, method: str, path: str, parameters: Mapping[str, object], *, idempotency_key: str = "", api_version: str = ""
    ) -> Answer:
        """One request with the package's retries. A post without an idempotency key gets one, so that these are safe.

        Raises stripe.APIConnectionError without a whole answer, ValueError for what can't stand in a request's head.
        """
        version = api_version or self._api_version
        if method == "post":
            key, data = idempotency_key or str(uuid.uuid4()), form(parameters)
            _check(path, version, key)
            request = (
                f"POST {self._base_path}{path}{self._head}{version}\r\nIdempotency-Key: {key}\r\n"
                f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(data)}\r\n\r\n{data}"
            )
        else:
            _check(path, version)
            query = f"?{form(parameters)}" if parameters else ""
            request = f"GET {self._base_path}{path}{query}{self._head}{version}\r\n\r\n"
        whole = request.encode("ascii")
        first: Answer | stripe.APIConnectionError
        try:
            first = await self._transport.once(method, path, whole)
        except stripe.APIConnectionError as error:
            first = error
        else:
            if first.status < 400 and SHOULD_RETRY not in first.headers:
                return first  # nothing that the package would send again
        body, status, answered = await self._transport.request_with_retries_async(
            method, path, {}, _Request(whole, first), max_network_retries=RETRIES_MAX
        )
        return Answer(status, body, answered)


def _check(*words: str) -> None:
    """Raises ValueError for a word that would end where it mustn't, in a request's first line or in a header."""
    for word in words:
        if not (word.isascii() and word.isprintable()) or " " in word:
            raise ValueError(f"{word!r} can't stand in a request to Stripe")


def form(parameters: Mapping[str, object]) -> str:
    """Parameters as Stripe reads them: members as `a[b]`, items of lists as `a[0]`, booleans in lower case. ASCII."""
    pairs: list[str] = []
    for name, value in parameters.items():
        _add(pairs, name, value)
    return "&".join(pairs)


@functools.lru_cache(1024)
def _quoted_name(name: str) -> str:
    return quote_plus(name)


def _quoted(value: str) -> str:
    return value if _UNQUOTED(value) else quote_plus(value)


def _add(pairs: list[str], name: str, value: object) -> None:
    if isinstance(value, str):
        pairs.append(f"{_quoted_name(name)}={_quoted(value)}")
    elif isinstance(value, bool):
        pairs.append(f"{_quoted_name(name)}={'true' if value else 'false'}")
    elif isinstance(value, int):
        pairs.append(f"{_quoted_name(name)}={value}")
    elif isinstance(value, Mapping):
        for key, member in value.items():
            _add(pairs, f"{name}[{key}]", member)
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            _add(pairs, f"{name}[{index}]", item)
    elif value is not None:
        pairs.append(f"{_quoted_name(name)}={_quoted(str(value))}")
