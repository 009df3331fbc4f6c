"""Who waits for a payment."""

from __future__ import annotations

import asyncio
from typing import cast

from msgspec.structs import replace

from oncepay.payment import Key, Payment, Progress, Refund, Status, Terms
from oncepay.ports import PaymentStore
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
    waiting = asyncio.create_task(in_flight.wait(asked, 0.9))
    await asyncio.sleep(0)
    in_flight.moved(PAID)  # version 9, from before the refund was asked for
    await asyncio.sleep(0.01)
    assert not waiting.done()
    refunded = replace(PAID, version=11, amount_refunded=100)
    in_flight.moved(refunded)
    assert await waiting is refunded
