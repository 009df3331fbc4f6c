"""Buyers outside of the platform that write down what they were told, and hold it to that.

    async with Recorder(router, api_key, ranges) as recorder:
        ...                                     # something breaks
    violations = await recorder.check()         # none lost, none doubled, nothing older than before
    print(recorder.gap_s(began_s))

Every payment is submitted twice at once, by one caller who wants to know that it is accepted, and by one who waits for its end.
What counts as told is an answer below 300: the payment's version and state then. An
answer 503 with `Retry-After`, 429 with it, or a connection that broke says nothing, and the same call is made again; any other
answer is a violation.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from oncepay.keys import slot
from oncepay.money import format_minor

BUYERS = 6
PAUSE_S = 0.03
AGAIN_S = 0.25
"""How soon a buyer comes again who was told nothing. `Retry-After` says whole seconds, too coarse to measure a gap with."""
CALL_S = 60.0
"""An answer may take this long: the hold's bound, and the settlement's."""
READS = 0.3
"""The share of a buyer's turns in which it also looks at an earlier payment."""
CHECKS_AT_ONCE = 32
CHECK_S = 90.0
SETTLE_S = 10
SETTLED = frozenset({"succeeded", "failed", "canceled"})
AMOUNT_MINOR = 1250
SHOWN_MAX = 50
"""Violations that are kept; of more only the number is."""

Ranges = Sequence[Sequence[int]]


class View(msgspec.Struct, frozen=True):
    """What of a payment is held against the platform."""

    key: str
    status: str
    version: int
    amount_captured: int = 0
    payment_intent: str | None = None


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer. `at_s` is of the monotonic clock. `status` 0: the connection broke, with `error`."""

    at_s: float
    took_s: float
    call: str
    key: str
    status: int
    version: int = 0
    state: str = ""
    intent: str = ""
    error: str = ""

    @property
    def told(self) -> bool:
        return 200 <= self.status < 300


class Recorder:
    """Six buyers that pay one payment after the other on the slots of `ranges`, and remember every answer."""

    def __init__(self, router: str, api_key: str, ranges: Ranges, *, buyers: int = BUYERS, history: Path | None = None) -> None:
        self._router = router
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._ranges = ranges
        self._buyers = buyers
        self._prefix = os.urandom(6).hex()
        self._count = 0
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._history: IO[str] | None = open(history, "a", encoding="utf-8") if history else None  # noqa: SIM115
        self.answers: list[Answer] = []
        self.told: dict[str, View] = {}
        """The newest answer of each payment."""
        self.violations: list[str] = []
        self.violation_count = 0
        self._heard = asyncio.Event()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, force_close=False)
        timeout = aiohttp.ClientTimeout(total=CALL_S)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout)
        self._tasks = [asyncio.create_task(self._buy(number)) for number in range(self._buyers)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            await self.stop()
        for task in self._tasks:
            task.cancel()  # whoever still waits for an answer waits for a platform that failed
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.close()

    async def stop(self) -> None:
        """Let every buyer end its turn. Raises what one of them raised."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        """Give the connections back, and end the history."""
        if self._session is not None:
            await self._session.close()
        if self._history is not None:
            self._history.close()
            self._history = None

    async def more(self, count: int, within_s: float = 60.0) -> None:
        """Return when `count` more payments were told of. Raises TimeoutError."""
        wanted = len(self.told) + count
        async with asyncio.timeout(within_s):
            while len(self.told) < wanted:
                self._heard.clear()
                await self._heard.wait()

    def note(self, event: str, **details: Any) -> None:
        """A line of the history that is no answer, such as a fault."""
        self._write({"at_s": round(time.monotonic(), 3), "event": event, **details})

    def _write(self, record: dict[str, Any]) -> None:
        if self._history is not None:
            self._history.write(json.dumps(record) + "\n")

    def _new_key(self, number: int) -> str:
        while True:
            self._count += 1
            key = f"seen-{self._prefix}-{number}-{self._count}"
            if any(first <= slot(key) <= last for first, last in self._ranges):
                return key

    async def _buy(self, number: int) -> None:
        chance = random.Random(f"{self._prefix}{number}")
        mine: list[str] = []
        while not self._stopping:
            key = self._new_key(number)
            await asyncio.gather(self._until_told(key, "accept"), self._until_told(key, "settle"))
            mine.append(key)
            if chance.random() < READS:
                await self._until_told(chance.choice(mine), "get")
            await asyncio.sleep(PAUSE_S)

    async def _until_told(self, key: str, call: str) -> None:
        answer = await self._ask(key, call)
        while not answer.told:
            await asyncio.sleep(AGAIN_S)
            answer = await self._ask(key, call)

    async def _ask(self, key: str, call: str) -> Answer:
        """Make the call once, and keep what it brought."""
        assert self._session is not None
        floor = self.told.get(key)
        began_s = time.monotonic()
        view: View | None = None
        error = ""
        status = 0
        try:
            async with self._request(key, call) as response:
                body = await response.read()
                status = response.status
                if status < 300:
                    view = msgspec.json.decode(body, type=View)
                elif status not in (429, 503) or "Retry-After" not in response.headers:
                    error = body[:300].decode(errors="replace")
                    self._violate(f"{call} {key} was answered {status}: {error}")
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            status, view, error = 0, None, repr(problem)
        now_s = time.monotonic()
        answer = Answer(
            at_s=round(now_s, 4),
            took_s=round(now_s - began_s, 4),
            call=call,
            key=key,
            status=status,
            version=view.version if view else 0,
            state=view.status if view else "",
            intent=(view.payment_intent or "") if view else "",
            error=error,
        )
        self.answers.append(answer)
        self._write(msgspec.to_builtins(answer))
        if view is not None:
            self._hear(view, floor)
        return answer

    def _request(self, key: str, call: str) -> Any:
        assert self._session is not None
        if call == "get":
            return self._session.get(f"{self._router}/v1/payments/{quote(key, safe='')}")
        body = {
            "buyer": f"buyer-{key[-1]}",
            "currency": "usd",
            "items": [{"seller": "records-4", "amount": AMOUNT_MINOR}],
            "payment_method": "pm_card_visa",
        }
        headers = {"Idempotency-Key": key, "Prefer": f"wait={0 if call == 'accept' else SETTLE_S}"}
        return self._session.post(f"{self._router}/v1/payments", json=body, headers=headers)

    def _hear(self, view: View, floor: View | None) -> None:
        """Hold an answer against `floor`, the newest one that was there when its call was made."""
        if floor is not None:
            self._compare(view, floor)
        newest = self.told.get(view.key)
        if newest is not None and newest.payment_intent and view.payment_intent not in (None, newest.payment_intent):
            self._violate(f"{view.key} has two intents: {newest.payment_intent} and {view.payment_intent}")
        if newest is None or view.version > newest.version:
            self.told[view.key] = view
            self._heard.set()

    def _compare(self, view: View, before: View) -> None:
        if view.version < before.version:
            self._violate(f"{view.key} was answered backwards: version {view.version} after {before.version}")
        if before.status in SETTLED and (view.status, view.amount_captured) != (before.status, before.amount_captured):
            self._violate(f"{view.key} was {before.status} and is {view.status}")

    def _violate(self, what: str) -> None:
        self.violation_count += 1
        if len(self.violations) < SHOWN_MAX:
            self.violations.append(what)
        self.note("violation", what=what)

    async def check(self) -> list[str]:
        """Read every payment again that was told of, and wait for its end. All violations, those from before too.

        Call it after `stop` and before `close`, when the platform is whole again.
        """
        gate = asyncio.Semaphore(CHECKS_AT_ONCE)
        deadline_s = time.monotonic() + CHECK_S

        async def one(key: str) -> None:
            async with gate:
                while True:
                    answer = await self._ask(key, "get")
                    if answer.status == 404:
                        return  # a violation already: it was told of, and is gone
                    if answer.told and answer.state in SETTLED:
                        if answer.state != "succeeded":
                            self._violate(f"{key} ended {answer.state} with a good card")
                        return
                    if time.monotonic() > deadline_s:
                        self._violate(f"{key} has no end after {CHECK_S:.0f} s: {answer}")
                        return
                    await asyncio.sleep(AGAIN_S)

        await asyncio.gather(*map(one, list(self.told)))
        intents = [view.payment_intent for view in self.told.values()]
        if len(set(intents)) != len(intents):
            self._violate("two payments have one intent")
        return self.violations

    def since(self, began_s: float) -> list[Answer]:
        """The answers that came from that moment on."""
        return [answer for answer in self.answers if answer.at_s >= began_s]

    def gap_s(self, began_s: float = 0.0) -> float:
        """The longest time without a payment that was accepted, from that moment on."""
        times = [began_s or self.answers[0].at_s] if self.answers else []
        times += [answer.at_s for answer in self.since(began_s) if answer.told and answer.call == "accept"]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    def slowest_s(self, began_s: float = 0.0) -> float:
        """The longest that any answer took that came from that moment on."""
        return max((answer.took_s for answer in self.since(began_s)), default=0.0)

    def refused(self, began_s: float = 0.0) -> int:
        """Answers that told the caller to come again, and broken connections."""
        return sum(not answer.told for answer in self.since(began_s))

    def paid(self) -> str:
        """What was acknowledged in all, as money."""
        return format_minor(sum(view.amount_captured for view in self.told.values()), "usd")


def all_ranges(shards: Iterable[Ranges]) -> list[Sequence[int]]:
    """The ranges of several shards as one list."""
    return [each for ranges in shards for each in ranges]
