"""A worker in bad weather, on a real shard: etcd away, Stripe down for ten minutes of its clock, the aggregator away meanwhile.

In the end the cache equals the table, the aggregator equals the shard, and nothing was asked for too young.
"""

from __future__ import annotations

import asyncio
import os
import signal

import aiohttp
import asyncpg
import pytest

from cli.shards.check_cache import differing
from deploy.local import Cluster
from oncepay.payment import Payment
from shard.store.store import Shards
from tests.shard.worker.harness import eventually
from tests.shard.worker.test_worker import (
    Derived,
    WorkerProcess,
    derived,
    payment,
    shard_cluster,
    started,
    store,
    workers,
)

__all__ = ["derived", "shard_cluster", "store", "workers"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


async def open_rows(cluster: Cluster) -> dict[str, tuple[int, str]]:
    """The table's payments with open work; none while the shard has no leader."""
    dsn = await asyncio.to_thread(lambda: cluster.status().shards[0].dsn)
    if dsn is None:
        return {}
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("select key, version, status from oncepay.payments where open_work")
    finally:
        await connection.close()
    return {row["key"]: (row["version"], row["status"]) for row in rows}


async def cache_is_table(worker: WorkerProcess, cluster: Cluster) -> None:
    """What is pending is exactly what the table has open; both move, so it is asked until it is so."""

    async def equal() -> bool:
        status, listing = await worker.get("/v1/cache")
        if status != 200:
            return False
        pending = {key: (version, state) for key, version, state in listing["pending"]}
        return not differing(pending, await open_rows(cluster))

    await eventually(equal, "the cache equals the table", 30)


async def ended(store: Shards, made: list[Payment]) -> bool:
    rows = [await store.get(each.key) for each in made]
    return all(row is not None and row.status == "succeeded" and not row.open_work for row in rows)


async def test_stripe_down_for_ten_minutes_of_its_clock(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    """Payments wait, nothing is given up or charged twice, and all of them come to their end when it is back."""
    worker = await started(workers[0])
    control = f"{shard_cluster.settings.stripe.base_url}/_control"
    async with aiohttp.ClientSession() as http:
        await http.put(f"{control}/faults", json={"down": True})
        try:
            made = [payment("down", "pm_card_visa") for _ in range(12)]
            await asyncio.gather(*(store.accept(each) for each in made))
            await eventually(lambda: bool(worker.lines("polled")), "the worker has tried", 30)
            await http.post(f"{control}/clock", json={"advance_s": 600})
            assert not await ended(store, made)
            await cache_is_table(worker, shard_cluster)
        finally:
            await http.put(f"{control}/faults", json={})
        await eventually(lambda: ended(store, made), "all have ended", 60)
        for each in made:
            async with http.get(
                f"{shard_cluster.settings.stripe.base_url}/v1/payment_intents",
                params={"limit": "100"},
                headers={"Authorization": "Bearer sk_test_x"},
            ) as answer:
                intents = (await answer.json())["data"]
            assert sum(item["metadata"].get("oncepay_key") == each.key for item in intents if item["status"] == "succeeded") <= 1
    await derived.same()
    await cache_is_table(worker, shard_cluster)


async def test_etcd_away(shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived) -> None:
    """The active worker keeps its seat, its share and its feed, and goes on settling what was accepted."""
    worker = await started(workers[0])
    frozen = [member.pid for member in shard_cluster.status().etcd if member.pid is not None]
    assert len(frozen) == 3
    made = [payment("etcd", "pm_card_visa") for _ in range(6)]
    await asyncio.gather(*(store.accept(each) for each in made[:3]))
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.gather(*(store.accept(each) for each in made[3:]))
        await eventually(lambda: ended(store, made), "all have ended without etcd", 40)
        assert await worker.active()
        assert not worker.lines("standing down")
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    await derived.same()
    await cache_is_table(worker, shard_cluster)
    assert await worker.active(), "it kept its seat"
