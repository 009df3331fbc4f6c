"""A planned change of leader while payments come in: slower answers, no error, and it ends by itself."""

from __future__ import annotations

import asyncio
import os
import time

import aiohttp
import pytest

from deploy.local import Cluster
from oncepay.client import Oncepay

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

SHARD = "s0"
WITHIN_S = 30.0
"""Generous for a busy machine; without the worker leaving the closing node it never ends."""


async def leader_of(cluster: Cluster) -> str | None:
    status = await asyncio.to_thread(cluster.status)
    return next(shard.leader for shard in status.shards if shard.name == SHARD)


async def switch(cluster: Cluster, leader: str) -> None:
    """Ask Patroni for another leader, as `patronictl switchover` does."""
    credential = cluster.patroni_rest_credential()
    port = cluster.ports.patroni(0, int(leader[-1]) - 1)
    headers = {"Authorization": aiohttp.encode_basic_auth(credential.username, credential.password)}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with asyncio.timeout(60):  # Patroni refuses while no standby is known to be fit
            while True:
                async with session.post(f"http://127.0.0.1:{port}/switchover", json={"leader": leader}) as answer:
                    if answer.status == 200:
                        return
                    assert answer.status in {412, 503}, await answer.text()
                if await leader_of(cluster) != leader:
                    return
                await asyncio.sleep(1)


async def test_a_planned_change_of_leader_ends_and_nobody_sees_an_error(cluster: Cluster) -> None:
    status = await asyncio.to_thread(cluster.status)
    before = await leader_of(cluster)
    assert before is not None
    stop = asyncio.Event()
    prefix = os.urandom(6).hex()
    ends: list[str] = []

    async def buyer(client: Oncepay, number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            payment = await client.pay(
                f"switch-{prefix}-{number}-{count}",
                buyer="b",
                currency="usd",
                items=[{"seller": "s", "amount": 1000}],
                payment_method="pm_card_visa",
                wait_s=30,
            )
            ends.append(payment.status)

    async with Oncepay(router=status.urls["router"], api_key=status.api_key) as client:
        buyers = [asyncio.create_task(buyer(client, number)) for number in range(4)]
        await switch(cluster, before)
        began_s = time.monotonic()
        async with asyncio.timeout(WITHIN_S):
            while (now := await leader_of(cluster)) in (None, before):
                await asyncio.sleep(0.2)
            while not await whole(cluster):
                await asyncio.sleep(0.5)
        took_s = time.monotonic() - began_s
        stop.set()
        await asyncio.gather(*buyers)
    assert now != before
    assert took_s < WITHIN_S
    assert set(ends) == {"succeeded"}


async def whole(cluster: Cluster) -> bool:
    """Whether all three nodes run and stream again."""
    status = await asyncio.to_thread(cluster.status)
    return all(process.healthy for process in status.processes if process.name.startswith(f"node-{SHARD}"))
