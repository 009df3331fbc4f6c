"""Clients that keep what they were told, and what is done to a cluster while they pay."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import aiohttp

from deploy.local import Cluster
from deploy.local.status import Status
from oncepay.client import Oncepay, PaymentView

STEADY_S = 60.0
LOOK_S = 0.5
READS_AT_ONCE = 32


class Witness(Oncepay):
    """A client that keeps every answer about a payment, by key: to these the platform is held."""

    def __init__(self, status: Status, *, deadline_s: float = 120.0) -> None:
        urls = status.urls
        super().__init__(
            router=urls["router"],
            keygen=urls["keygen"],
            aggregator=urls["aggregator"],
            api_key=status.api_key,
            deadline_s=deadline_s,
        )
        self.answers: defaultdict[str, list[PaymentView]] = defaultdict(list)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

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
        answer = await super().pay(key, buyer=buyer, currency=currency, items=items, wait_s=wait_s, **fields)
        self.answers[key].append(answer)
        return answer

    async def get(self, key: str) -> PaymentView:
        answer = await super().get(key)
        self.answers[key].append(answer)
        return answer

    def acknowledged(self) -> dict[str, PaymentView]:
        """The last answer of each key that said how the payment ended."""
        ended = ((key, [answer for answer in answers if answer.terminal]) for key, answers in self.answers.items())
        return {key: answers[-1] for key, answers in ended if answers}

    def contradictions(self) -> list[str]:
        """Keys with two ends, two intents, or two amounts."""
        found = []
        for key, answers in self.answers.items():
            ends = {(answer.status, answer.amount_captured) for answer in answers if answer.terminal}
            intents = {answer.payment_intent for answer in answers if answer.payment_intent}
            if len(ends) > 1 or len(intents) > 1 or len({answer.amount for answer in answers}) > 1:
                found.append(f"{key}: {ends} {intents}")
        return found

    async def read_again(self, keys: Sequence[str]) -> dict[str, PaymentView]:
        """Each of the payments as the platform shows it now. Raises Problem for one that it doesn't know."""
        gate = asyncio.Semaphore(READS_AT_ONCE)

        async def one(key: str) -> PaymentView:
            async with gate:
                return await self.get(key)

        return dict(zip(keys, await asyncio.gather(*map(one, keys)), strict=True))


class Milestones:
    """Counts what is settled, and wakes who waits for a number of it."""

    def __init__(self) -> None:
        self.settled = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def advance(self) -> None:
        """One more is settled."""
        self.settled += 1
        for count, event in self._waiting:
            if self.settled >= count:
                event.set()

    async def reach(self, count: int) -> None:
        """Until `count` are settled."""
        event = asyncio.Event()
        self._waiting.append((count, event))
        if self.settled < count:
            await event.wait()


async def put_faults(status: Status, faults: Mapping[str, object]) -> None:
    """How the stand-in for Stripe misbehaves from now on."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{status.urls['stripe']}/_control/faults", json=faults) as answer:
            assert answer.status == 200, await answer.text()


@asynccontextmanager
async def misbehaving(status: Status, faults: Mapping[str, object]) -> AsyncIterator[None]:
    """The stand-in for Stripe has these faults meanwhile, and none after that."""
    await put_faults(status, faults)
    try:
        yield
    finally:
        await put_faults(status, {})


async def until_status(cluster: Cluster, holds: Callable[[Status], bool], within_s: float = STEADY_S) -> Status:
    """The cluster's status once it is so; asking is the only way to see it. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not holds(found := await asyncio.to_thread(cluster.status)):
            await asyncio.sleep(LOOK_S)
    return found


async def kill_process(cluster: Cluster, name: str) -> int:
    """SIGKILL the process of that name once it runs; its pid."""

    def pid_of(status: Status) -> int | None:
        return next(process.pid for process in status.processes if process.name == name)

    pid = pid_of(await until_status(cluster, lambda status: pid_of(status) is not None))
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid
