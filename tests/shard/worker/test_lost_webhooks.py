"""Webhooks that get lost: the polls settle what they would have told, on a whole cluster."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest

from deploy.local import Cluster
from oncepay.client import Oncepay
from tests.faults.witness import misbehaving

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(200)]

COUNT = 150
PROCESSING_S = 2.0
SLACK_S = 4.0
"""For a machine that does other work too."""


async def test_with_a_fifth_of_the_webhooks_lost_all_is_settled_within_two_poll_intervals(cluster: Cluster) -> None:
    """Payments that stay in `processing` for a moment, so that nobody waits for them any more when Stripe is done."""
    status, interval_s = await asyncio.to_thread(cluster.status), cluster.settings.poll.first_s
    faults = {"processing": 1.0, "processing_s": [PROCESSING_S, PROCESSING_S], "webhook_lost": 0.2}
    urls = status.urls
    before = await webhooks(urls["stripe"])
    async with (
        Oncepay(router=urls["router"], keygen=urls["keygen"], api_key=status.api_key) as client,
        misbehaving(status, faults),
    ):

        async def pay(number: int, key: str) -> float:
            """Seconds from when Stripe is done with the payment until it is settled."""
            made = await client.pay(
                key, buyer=f"buyer-{number}", currency="usd", items=[{"seller": "ada", "amount": 1000}], wait_s=0,
                payment_method="pm_card_visa",
            )  # fmt: skip
            began_s = time.monotonic()
            while not made.terminal:
                await asyncio.sleep(0.25)  # asking is the only way to see it
                made = await client.get(key)
            assert made.status == "succeeded"
            return time.monotonic() - began_s - PROCESSING_S

        took_s = sorted(await asyncio.gather(*(pay(n, key) for n, key in enumerate(await client.keys(COUNT)))))
    lost = (await webhooks(urls["stripe"]))["lost"] - before["lost"]
    print(f"{lost} webhooks lost; settled after {took_s[COUNT // 2]:.1f} s at the median, {took_s[-1]:.1f} s at most")
    assert lost > COUNT * 0.1
    assert took_s[-1] < 2 * interval_s + SLACK_S


async def webhooks(stripe: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as http, http.get(f"{stripe}/_control/counts") as answer:
        found: dict[str, int] = (await answer.json())["webhooks"]
        return found
