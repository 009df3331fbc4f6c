"""Requests to Stripe as they go over the wire: forms, headers, and the `stripe` package's own transport with its retries.

The package's `raw_request` reads every answer into ordered dictionaries and writes two log lines that nobody sees, which
costs more than the request itself. So its transport is called directly: what is sent, when it is sent again and how long
it pauses stay the package's; bodies are read once, by whoever knows their type.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote_plus, urlsplit

import aiohttp
import stripe

from oncepay.budget import Budget
from oncepay.settings import StripeSettings

RETRIES_MAX = 2

stripe.enable_telemetry = False  # durations of earlier calls, in a header of each call


class Answer(NamedTuple):
    """What came back, whatever it says. Header names in any case."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def replayed(self) -> bool:
        """Whether Stripe has answered this idempotency key before."""
        return self.headers.get("Idempotent-Replayed", "").lower() == "true"


class _Paced(stripe.AIOHTTPClient):
    """The package's transport, whose every request (retries too) takes its turn in the rate budget first."""

    def __init__(self, budget: Budget | None, timeout: aiohttp.ClientTimeout, session: aiohttp.ClientSession) -> None:
        super().__init__(timeout=timeout, session=session)
        self._budget = budget

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: object = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        if self._budget is not None:
            await self._budget.take(method, urlsplit(url).path)
        return await super().request_async(method, url, headers, post_data)


class StripeHttp:
    """Sends requests to one account over `session`."""

    def __init__(self, settings: StripeSettings, session: aiohttp.ClientSession, budget: Budget | None) -> None:
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        self._transport = _Paced(budget, timeout, session)
        self._base_url = settings.base_url
        self._api_version = settings.api_version
        self._headers = {
            "Authorization": f"Bearer {settings.api_key}",
            "User-Agent": f"Stripe/v1 PythonBindings/{stripe.VERSION}",
        }

    async def ask(
        self, method: str, path: str, parameters: Mapping[str, object], *, idempotency_key: str = "", api_version: str = ""
    ) -> Answer:
        """One request with the package's retries. A post without an idempotency key gets one, so that these are safe.

        Raises stripe.APIConnectionError without an answer, aiohttp.ClientError when the body breaks off.
        """
        url, data = self._base_url + path, None
        headers = {**self._headers, "Stripe-Version": api_version or self._api_version}
        if method == "post":
            data = form(parameters)
            headers["Idempotency-Key"] = idempotency_key or str(uuid.uuid4())
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        elif parameters:
            url = f"{url}?{form(parameters)}"
        body, status, answered = await self._transport.request_with_retries_async(
            method, url, headers, data, max_network_retries=RETRIES_MAX
        )
        return Answer(status, body, answered)


def form(parameters: Mapping[str, object]) -> str:
    """Parameters as Stripe reads them: members as `a[b]`, items of lists as `a[0]`, booleans in lower case."""
    pairs = [pair for name, value in parameters.items() for pair in _pairs(name, value)]
    return "&".join([f"{_quoted_name(name)}={quote_plus(value)}" for name, value in pairs])


@functools.lru_cache(1024)
def _quoted_name(name: str) -> str:
    return quote_plus(name)


def _pairs(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _pairs(f"{name}[{key}]", member)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _pairs(f"{name}[{index}]", item)
    elif value is not None:
        yield name, str(value).lower() if isinstance(value, bool) else str(value)
