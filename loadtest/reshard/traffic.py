"""Buyers on a cluster while ranges move: some pay in the range, some outside, and each remembers what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from oncepay.keys import slot

WAIT_S = 40
"""Longer than a router holds a request: whoever hears an error has one."""


class Answer(msgspec.Struct, frozen=True):
    """One submission: when it began and how long it took, in seconds, and what came. `status` is HTTP's; 0 is no answer."""

    key: str
    inside: bool
    began_s: float
    took_s: float
    status: int
    state: str


class Traffic:
    """Buyers of one cluster. Every submission is made once: no error is hidden by trying again."""

    def __init__(self, router: str, api_key: str, first: int, last: int) -> None:
        self.answers: list[Answer] = []
        self._router = router
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._first = first
        self._last = last
        self._numbers = itertools.count()
        self._prefix = os.urandom(4).hex()
        self._http: aiohttp.ClientSession | None = None

    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._http is not None
        return self._http

    def key(self, *, inside: bool) -> str:
        """A fresh key of the range, or of any slot outside of it."""
        for number in self._numbers:
            key = f"rs-{self._prefix}-{number}"
            if (self._first <= slot(key) <= self._last) == inside:
                return key
        raise AssertionError

    @asynccontextmanager
    async def running(self, rate_per_s: float) -> AsyncIterator[Traffic]:
        """Submissions at that rate, every second one in the range, whatever the answers take. All are awaited at the end."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=WAIT_S)
        async with aiohttp.ClientSession(headers=self._headers, connector=connector, timeout=timeout) as self._http:
            calls: set[asyncio.Task[None]] = set()

            async def submit() -> None:
                began_s = time.monotonic()
                for number in itertools.count():
                    await asyncio.sleep(max(0.0, began_s + number / rate_per_s - time.monotonic()))
                    call = asyncio.create_task(self._one(self.key(inside=number % 2 == 0), number % 2 == 0))
                    calls.add(call)
                    call.add_done_callback(calls.discard)

            submitting = asyncio.create_task(submit())
            try:
                yield self
            finally:
                submitting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await submitting
                await asyncio.gather(*calls)

    async def _one(self, key: str, inside: bool) -> None:
        began_s = time.monotonic()
        status, state = await self.pay(key)
        self.answers.append(Answer(key, inside, began_s, time.monotonic() - began_s, status, state))

    async def pay(self, key: str, *, card: str = "pm_card_visa") -> tuple[int, str]:
        """One submission: HTTP's status and the payment's. 0 when the connection broke."""
        body = {"buyer": "b", "currency": "usd", "items": [{"seller": "s", "amount": 1000}], "payment_method": card}
        headers = {"Idempotency-Key": key, "Prefer": f"wait={WAIT_S - 10}"}
        try:
            async with self.http.post(f"{self._router}/v1/payments", json=body, headers=headers) as answer:
                found: dict[str, Any] = await answer.json(content_type=None)
                return answer.status, str(found.get("status", ""))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return 0, repr(error)

    async def find(self, keys: Sequence[str]) -> dict[str, str]:
        """What each of the keys is now, by the router; empty for what isn't found."""
        found: dict[str, str] = {}
        gate = asyncio.Semaphore(16)

        async def one(http: aiohttp.ClientSession, key: str) -> None:
            async with gate, http.get(f"{self._router}/v1/payments/{key}") as answer:
                found[key] = str((await answer.json())["status"]) if answer.status == 200 else ""

        async with aiohttp.ClientSession(headers=self._headers) as http:
            await asyncio.gather(*(one(http, key) for key in keys))
        return found


def quantile(values: Sequence[float], part: float) -> float:
    """The value that `part` of the values are not above; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
