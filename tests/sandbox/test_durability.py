"""An answered call survives the death of the stand-in; so does what it has still to do."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import stripe
from stripe import StripeClient

from tests.sandbox.process import Receiver, StandIn, event_of, stripe_client
from tests.sandbox.test_idempotency import raw

PAID: Any = {"amount": 1000, "currency": "usd", "confirm": True, "payment_method": "pm_card_visa"}


async def test_nothing_answered_is_lost_by_kill_9(fresh: Any) -> None:
    stand_in: StandIn = fresh()
    answered: dict[str, str] = {}
    enough = asyncio.Event()

    async def pay(client: StripeClient, name: str) -> None:
        number = 0
        while True:
            key = f"{name}-{number}"
            intent = await client.v1.payment_intents.create_async(PAID, {"idempotency_key": key})
            answered[key] = intent.id
            number += 1
            if len(answered) >= 200:
                enough.set()

    async with stripe_client(stand_in.url) as client:
        tasks = [asyncio.create_task(pay(client, f"w{worker}")) for worker in range(8)]
        await asyncio.wait_for(enough.wait(), 20)
        stand_in.kill()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, stripe.APIConnectionError) for error in ended)
    stand_in.start()
    async with stripe_client(stand_in.url) as client:
        page = await client.v1.payment_intents.list_async({"limit": 100})
        known = {intent.id: intent async for intent in page.auto_paging_iter()}
        assert set(answered.values()) <= set(known)
        assert {intent.status for intent in known.values()} == {"succeeded"}
        for key, intent in list(answered.items())[::20]:
            again = await client.v1.payment_intents.create_async(PAID, {"idempotency_key": key})
            assert again.id == intent
        newest = list(answered.values())[-1]
        await event_of(client, "charge.updated", str(known[newest].latest_charge))
        for intent in list(answered.values())[::20]:
            charge = await client.v1.charges.retrieve_async(str(known[intent].latest_charge))
            assert charge.balance_transaction is not None


async def test_timers_and_webhooks_survive(fresh: Any, box: Receiver) -> None:
    stand_in: StandIn = fresh()
    down = [True]
    box.answer = lambda event: 503 if down[0] else 200
    async with stripe_client(stand_in.url) as client:
        await client.v1.webhook_endpoints.create_async({"url": box.url, "enabled_events": ["payment_intent.created"]})
        stand_in.faults(processing=1, processing_s=[3600, 3600])
        intent = await client.v1.payment_intents.create_async(PAID, {"idempotency_key": "timer"})
        assert intent.status == "processing"
        await box.until(lambda events: len(events) == 1)
    stand_in.kill()
    down[0] = False
    stand_in.start()
    async with stripe_client(stand_in.url) as client:
        await box.until(lambda events: len(events) == 2)
        assert box.events[0]["id"] == box.events[1]["id"]
        stand_in.advance(3601)
        await event_of(client, "payment_intent.succeeded", intent.id)
        replay = await raw(stand_in.url, "/v1/payment_intents", {"amount": "1"}, "timer")
        assert replay[0] == 400


async def test_sigterm_ends_cleanly_and_the_clock_stays_advanced(fresh: Any) -> None:
    stand_in: StandIn = fresh()
    stand_in.advance(5000)
    async with aiohttp.ClientSession() as session, session.get(f"{stand_in.url}/readyz") as answer:
        assert answer.status == 200
    assert stand_in.stop() == 0
    stand_in.start()
    assert stand_in.control("GET", "clock")["offset_s"] == 5000
    assert stand_in.control("GET", "faults")["down"] is False
