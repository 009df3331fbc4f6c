"""Reads Stripe's lists, a hundred objects a page, over plain HTTP."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import aiohttp
import msgspec

from loadtest.checker.model import Intent, Misread, Progress, Stripe, Transaction, Unreachable

PAGE = 100
TRIES = 12
"""A page is asked for so often, with growing gaps to MAX_GAP_S, before Stripe counts as unreachable."""
FIRST_GAP_S = 0.1
MAX_GAP_S = 3.0
TIMEOUT_S = 30.0
CONFIRMED = frozenset({"requires_action", "processing", "requires_capture", "succeeded"})


class _Object(msgspec.Struct):
    id: str


class _Intent(_Object):
    status: str
    amount_received: int = 0
    latest_charge: str | _Object | None = None
    metadata: dict[str, str] = {}
    last_payment_error: msgspec.Raw = msgspec.Raw(b"null")


class _Transaction(_Object):
    type: str
    currency: str
    net: int
    created: int
    source: str | _Object | None = None


T = TypeVar("T", bound=_Object)


class _Page(msgspec.Struct, Generic[T]):
    data: list[T]
    has_more: bool


def _id(value: str | _Object | None) -> str:
    return value if isinstance(value, str) else value.id if value else ""


def _intent(found: _Intent) -> Intent:
    charge = _id(found.latest_charge)
    attempted = found.status in CONFIRMED or bool(charge) or bytes(found.last_payment_error) != b"null"
    return Intent(found.id, found.metadata.get("oncepay_key", ""), found.status, found.amount_received, charge, attempted)


def _transaction(found: _Transaction) -> Transaction:
    return Transaction(found.id, found.type, found.currency, found.net, _id(found.source), found.created)


class StripeLists:
    """An account's lists. `since` leaves out what was made before (seconds since 1970)."""

    def __init__(self, url: str, key: str, *, since: int = 0) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._since = since
        self._clock = 0.0

    async def read(self, progress: Progress, expected: Callable[[], int | None] = lambda: None) -> Stripe:
        """All intents and all balance transactions. `expected` guesses how many intents there are, for the progress."""
        stripe = Stripe()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:

            def taken(what: str) -> Callable[[int], None]:
                return lambda done: progress(what, done, max(expected() or done, done))

            intents, transactions = await asyncio.gather(
                self._list(session, "payment_intents", _Page[_Intent], taken("Stripe's intents")),
                self._list(session, "balance_transactions", _Page[_Transaction], taken("Stripe's balance transactions")),
            )
        stripe.intents = [_intent(found) for found in intents]
        stripe.transactions = [_transaction(found) for found in transactions]
        for what, found in (("Stripe's intents", intents), ("Stripe's balance transactions", transactions)):
            progress(what, len(found), len(found))
        stripe.now = self._clock
        return stripe

    async def _list(
        self, session: aiohttp.ClientSession, name: str, page_type: type[_Page[T]], taken: Callable[[int], None]
    ) -> list[T]:
        decoder = msgspec.json.Decoder(page_type)
        found: list[T] = []
        params: dict[str, str] = {"limit": str(PAGE)}
        if self._since:
            params["created[gte]"] = str(self._since)
        while True:
            try:
                page = decoder.decode(await self._page(session, f"{self._url}/v1/{name}", params))
            except msgspec.DecodeError as error:
                raise Misread(f"Stripe's list of {name}: {error}") from error
            found += page.data
            taken(len(found))
            if not page.has_more or not page.data:
                return found
            params["starting_after"] = page.data[-1].id

    async def _page(self, session: aiohttp.ClientSession, url: str, params: dict[str, str]) -> bytes:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(min(MAX_GAP_S, FIRST_GAP_S * 2 ** (attempt - 1)))
            try:
                async with session.get(url, params=params) as answer:
                    body = await answer.read()
                    if answer.status == 200:
                        self._note_time(answer.headers.get("Date"))
                        return body
                    problem = f"HTTP {answer.status} {body[:200].decode(errors='replace')}"
                    if answer.status < 500 and answer.status not in (409, 429):
                        raise Misread(f"Stripe at {url}: {problem}")
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
        raise Unreachable(f"Stripe at {url} can't be reached: {problem}")

    def _note_time(self, date: str | None) -> None:
        """Stripe's own time, by which the age of its objects is told; this machine's where it says none."""
        parsed = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
        self._clock = max(self._clock, parsed)
