"""Replays purchases as a marketplace's clients would send them: many at once, some impatiently twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from loadtest.purchases import Purchase
from oncepay.client import Oncepay, PaymentView, Problem

CONCURRENCY = 96
DOUBLED = 0.05
"""The share of purchases that are submitted twice at once, with one key."""
WAIT_S = 10.0
SETTLE_S = 120.0


class Tally(msgspec.Struct):
    """What became of the purchases. `seconds` is from the first submission until all are settled."""

    submitted: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    refused: int = 0
    pending: int = 0
    amount_minor: int = 0
    platform_fee_minor: int = 0
    doubled: int = 0
    doubled_replayed: int = 0
    seconds: float = 0.0
    buyers: dict[str, int] = {}
    """Succeeded payments of each buyer."""

    def add(self, purchase: Purchase, payment: PaymentView | None) -> None:
        """Count one purchase; None was refused."""
        self.submitted += 1
        if payment is None:
            self.refused += 1
        elif payment.status == "succeeded":
            self.succeeded += 1
            self.amount_minor += payment.amount_captured
            self.platform_fee_minor += payment.platform_fee
            self.buyers[purchase.buyer] = self.buyers.get(purchase.buyer, 0) + 1
        elif payment.status == "failed":
            self.failed += 1
        elif payment.status == "canceled":
            self.canceled += 1
        else:
            self.pending += 1


class Mismatch(Exception):
    """One key was answered with two different payments."""


async def replay(
    client: Oncepay,
    found: Sequence[Purchase],
    *,
    seed: int,
    days_per_s: float | None = None,
    concurrency: int = CONCURRENCY,
    on_settled: Callable[[], None] = lambda: None,
) -> Tally:
    """Submit every purchase and wait until each is settled.

    `days_per_s` paces them by their dates; without it they go as fast as `concurrency` allows. Raises Mismatch.
    """
    tally = Tally()
    gate = asyncio.Semaphore(concurrency)
    started_s = time.monotonic()
    first = found[0].date if found else None

    async def one(purchase: Purchase) -> None:
        if days_per_s and first is not None:
            await asyncio.sleep(max(0.0, (purchase.date - first).days / days_per_s - (time.monotonic() - started_s)))
        async with gate:
            payment = await _submit(client, purchase, seed, tally)
        if payment is not None and not payment.terminal:
            payment = await client.wait(payment.key, timeout_s=SETTLE_S)
        tally.add(purchase, payment)
        on_settled()

    async with asyncio.TaskGroup() as group:
        for purchase in found:
            group.create_task(one(purchase))
    tally.seconds = time.monotonic() - started_s
    return tally


async def _submit(client: Oncepay, purchase: Purchase, seed: int, tally: Tally) -> PaymentView | None:
    """One purchase under a key of its own, for some twice at once; None when it was refused for its amount."""
    key = await client.new_key()
    impatient = purchase.chance(seed, "doubled") < DOUBLED

    async def send() -> PaymentView:
        return await client.pay(
            key,
            buyer=f"customer-{purchase.buyer}",
            currency="usd",
            items=purchase.items(),
            payment_method=purchase.card(seed),
            metadata={"purchase": str(purchase.number), "date": purchase.date.isoformat()},
            wait_s=WAIT_S,
        )

    try:
        if not impatient:
            return await send()
        answers = await asyncio.gather(send(), send())
    except Problem as problem:
        if problem.slug == "invalid-amount":
            return None
        raise
    tally.doubled += 1
    tally.doubled_replayed += sum(answer.replayed for answer in answers)
    if len({answer.key for answer in answers}) != 1 or len({a.payment_intent for a in answers if a.payment_intent}) > 1:
        raise Mismatch(f"{key} was answered with {answers}")
    return max(answers, key=lambda answer: answer.version)
