"""Who waits for a payment."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from msgspec.structs import replace

from oncepay.driver import Driver
from oncepay.payment import Key, Payment, Progress, Refund, Status, Terms
from oncepay.ports import PaymentStore
from router import inflight
from router.inflight import InFlight

PAID = Payment(
    key=Key("order-1"),
    status=Status.SUCCEEDED,
    version=9,
    buyer="b",
    currency="usd",
    amount=100,
    terms=Terms(items=(), shares=(), api_version="x"),
    fingerprint=b"",
    created_at_ms=0,
    updated_at_ms=0,
    expires_at_ms=0,
    intent="pi_1",
)


async def test_a_move_that_is_told_late_is_not_the_one_that_is_waited_for() -> None:
    in_flight = InFlight(cast(PaymentStore, None))
    asked = replace(PAID, version=10, progress=Progress(refunds=(Refund("r1", 100, (), 0),)))
    waiting = asyncio.create_task(in_flight.wait(asked, 0.9, refunds=True))
    await asyncio.sleep(0)
    in_flight.moved(PAID)  # version 9, from before the refund was asked for
    await asyncio.sleep(0.01)
    assert not waiting.done()
    refunded = replace(PAID, version=11, amount_refunded=100)
    in_flight.moved(refunded)
    assert await waiting is refunded


async def test_who_waits_for_the_payment_does_not_wait_for_a_refund() -> None:
    in_flight = InFlight(cast(PaymentStore, None))
    asked = replace(PAID, progress=Progress(refunds=(Refund("r1", 100, (), 0),)))
    assert await in_flight.wait(asked, 30) is asked
    waiting = asyncio.create_task(in_flight.wait(replace(asked, status=Status.CONFIRMING, version=1), 30))
    await asyncio.sleep(0)
    in_flight.moved(asked)
    assert await asyncio.wait_for(waiting, 5) is asked


async def test_callers_look_for_themselves_once_nobody_here_drives_the_payment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "FIRST_LOOKS_S", (0.01,))
    monkeypatch.setattr(inflight, "DRIVEN_LOOK_AGAIN_S", 60.0)
    created = replace(PAID, status=Status.CREATED, version=1, intent="")
    release = asyncio.Event()
    reads = 0

    class Store:
        async def get(self, key: str) -> Payment:
            nonlocal reads
            reads += 1
            return PAID

    class Slow:
        async def drive(self, payment: Payment) -> Payment:
            await release.wait()
            return replace(PAID, status=Status.PROCESSING, version=3)

    in_flight = InFlight(cast(PaymentStore, Store()))
    in_flight.drive(cast(Driver, Slow()), created)
    waiting = asyncio.create_task(in_flight.wait(created, 30))
    await asyncio.sleep(0)
    in_flight.moved(replace(PAID, status=Status.CONFIRMING, version=2))
    await asyncio.sleep(0.3)  # past the first look of who is not driven
    assert not waiting.done()
    assert reads == 0
    release.set()
    async with asyncio.timeout(5):
        assert await waiting is PAID
    assert reads == 1


async def test_who_waits_for_another_router_looks_soon_and_then_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its payment is mostly settled within a moment, and one that isn't costs a read a second at most."""
    monkeypatch.setattr(inflight, "LOOK_AGAIN_S", 60.0)
    created = replace(PAID, status=Status.CREATED, version=1, intent="")
    reads: list[Payment] = []

    class Store:
        async def get(self, key: str) -> Payment:
            reads.append(created)
            return PAID if settled.is_set() else created

    settled = asyncio.Event()
    settled.set()
    in_flight = InFlight(cast(PaymentStore, Store()))
    async with asyncio.timeout(2):
        assert await in_flight.wait(created, 30) is PAID
    settled.clear()
    reads.clear()
    assert await in_flight.wait(created, 2.5) is created
    assert len(reads) == len(inflight.FIRST_LOOKS_S) + 1  # and once when its time was over
