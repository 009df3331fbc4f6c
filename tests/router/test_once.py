"""Once, in bad weather: one key from many clients over two routers, doubled webhooks, a router killed, answers lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from deploy.local import Cluster
from deploy.local.status import Status
from oncepay.client import Oncepay
from tests.router.conftest import CART, intents_of

pytestmark = pytest.mark.cluster

VISA = "pm_card_visa"
SetFaults = Callable[..., Any]


@pytest.fixture
async def faults(stripe: aiohttp.ClientSession) -> AsyncIterator[SetFaults]:
    """Sets the stand-in's faults; they are off again afterwards."""

    async def put(**given: object) -> None:
        async with stripe.put("/_control/faults", json=given) as answer:
            assert answer.status == 200, await answer.text()

    yield put
    await put()


async def test_two_hundred_clients_two_routers_one_killed_one_charge(
    cluster: Cluster,
    status: Status,
    client: Oncepay,
    stripe: aiohttp.ClientSession,
    faults: SetFaults,
    fresh: Callable[[], str],
) -> None:
    await faults(seed=7, webhook_doubled=1.0, latency_ms=[20, 60])
    key = fresh()
    victim = next(process.pid for process in status.processes if process.name == "router-1")
    assert victim is not None
    calls = [asyncio.create_task(client.pay(key, **CART, payment_method=VISA)) for _ in range(200)]
    while not any(call.done() for call in calls):
        await asyncio.sleep(0.01)
        if await intents_of(stripe, key):
            break
    os.kill(victim, signal.SIGKILL)
    answers = await asyncio.gather(*calls)
    final = await client.wait(key)
    assert final.status == "succeeded"
    assert {a.payment_intent for a in answers if a.payment_intent} == {final.payment_intent}
    found = await intents_of(stripe, key)
    assert [intent["id"] for intent in found if intent["status"] == "succeeded"] == [final.payment_intent]
    assert not [i for i in found if i["id"] != final.payment_intent and i["latest_charge"]]
    kinds = [entry["kind"] for entry in (await client.get(key)).entries]
    assert kinds.count("payment") == 1


@pytest.mark.parametrize(
    "weather",
    [
        {"lost_answer": 1.0},
        {"error_after": 1.0},
        {"error_before": 0.7},
        {"reset": 0.7},
        {"rate_limited": 0.7},
        {"lost_answer": 0.5, "error_after": 0.3, "webhook_lost": 1.0},
    ],
    ids=lambda weather: "+".join(weather),
)
async def test_whatever_stripe_answers_each_payment_is_charged_once(
    client: Oncepay, stripe: aiohttp.ClientSession, faults: SetFaults, fresh: Callable[[], str], weather: dict[str, float]
) -> None:
    """Some seconds of bad weather while eight payments come in; afterwards every one is settled, and charged once."""
    await faults(seed=3, **weather)
    keys = [fresh() for _ in range(8)]
    await asyncio.gather(*(client.pay(key, **CART, payment_method=VISA, wait_s=3) for key in keys))
    await faults()
    ends = await asyncio.gather(*(client.wait(key, timeout_s=60) for key in keys))
    assert {end.status for end in ends} <= {"succeeded", "failed"}
    for end in ends:
        charged = [i for i in await intents_of(stripe, end.key) if i["status"] == "succeeded"]
        assert [i["id"] for i in charged] == ([end.payment_intent] if end.status == "succeeded" else [])


async def test_a_slow_method_is_settled_without_webhooks(client: Oncepay, faults: SetFaults, fresh: Callable[[], str]) -> None:
    await faults(seed=1, processing=1.0, processing_s=[0.5, 1.0], webhook_lost=1.0)
    payment = await client.pay(fresh(), **CART, payment_method=VISA, wait_s=0.2)
    assert payment.status in {"created", "attempted", "confirming", "processing"}
    assert (await client.wait(payment.key, timeout_s=40)).status == "succeeded"


@pytest.mark.parametrize(("outcome", "end"), [("complete", "succeeded"), ("fail", "requires_payment_method")])
async def test_the_buyer_authenticates(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str], outcome: str, end: str
) -> None:
    payment = await client.pay(fresh(), **CART, payment_method="pm_card_authenticationRequired", on_decline="retry")
    assert payment.status == "requires_action"
    async with stripe.post(f"/_3ds/{payment.payment_intent}", data={"outcome": outcome}) as answer:
        assert answer.status < 400
    async with asyncio.timeout(20):
        while (now := await client.get(payment.key)).status == "requires_action":
            await asyncio.sleep(0.1)
    assert now.status == end
