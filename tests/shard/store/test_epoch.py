"""A worker's epoch: when another has taken the shard over, nothing that the one before still sends is committed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from deploy.local import Cluster
from oncepay.events import GiveUp, IntentCreated
from shard.store.batch import EpochOver
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment
from tests.shard.store.trouble import SHARD, eventually, frozen, leader_node, opened, receivers, shown, standbys, waiting_commit

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def alone(cluster: Cluster) -> Iterator[None]:
    """The shard's own worker is away: whenever it finds its epoch over, it takes the next one."""
    worker = [name for name in cluster.supervisor().states() if name.startswith(f"worker-{SHARD}")]
    cluster.supervisor().stop(worker)
    try:
        yield
    finally:
        cluster.supervisor().start(worker)


@pytest.fixture
async def old(cluster: Cluster) -> AsyncIterator[Shards]:
    async with opened(cluster, "old", role="worker") as store:
        await store.batcher(SHARD).take_epoch("old")
        yield store


@pytest.fixture
async def new(cluster: Cluster) -> AsyncIterator[Shards]:
    async with opened(cluster, "new", role="worker") as store:
        yield store


def task(call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


async def test_all_that_an_old_worker_sends_is_refused(
    old: Shards, new: Shards, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    payment = make()
    row, _ = await old.accept(make())
    assert await new.batcher(SHARD).take_epoch("new") == (old.batcher(SHARD).epoch or 0) + 1
    calls = (old.accept(payment), old.apply(row, GiveUp("requested"), event="test"), old.get(row.key))
    refused = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in refused] == [EpochOver] * 3
    assert await shown(leader, payment.key) == 0
    assert await new.get(row.key) == row
    assert (await new.accept(payment))[1]
    assert (await store.accept(make()))[1]  # routers need no epoch


async def locks(session: asyncpg.Connection, granted: bool, mode: str) -> int:
    query = (
        "select count(*) from pg_locks where locktype = 'advisory' and classid = 2 and objid = 0 and granted = $1 and mode = $2"
    )
    return int(await session.fetchval(query, granted, mode))


async def test_a_write_that_waits_while_the_epoch_is_taken_is_refused(
    old: Shards, new: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """The interleaving: the old worker's transaction has begun, and waits for the lock behind the one that takes the epoch.

    It must look at the epoch in a statement that comes after its wait, for an earlier one would still see its own.
    """
    payment = make()
    await old.accept(make())
    hold = leader.transaction()
    await hold.start()
    await leader.execute("select pg_advisory_xact_lock(2, 0)")
    taking = task(new.batcher(SHARD).take_epoch("new"))

    async def is_taking() -> bool:
        return await locks(leader, False, "ExclusiveLock") == 1

    await eventually(is_taking, "the new worker waits for the lock")
    writing = task(old.accept(payment))

    async def is_writing() -> bool:
        return await locks(leader, False, "ShareLock") == 1

    await eventually(is_writing, "the old worker's write waits behind it")
    await hold.commit()
    await asyncio.wait_for(taking, 10)
    with pytest.raises(EpochOver):
        await asyncio.wait_for(writing, 10)
    assert await shown(leader, payment.key) == 0


async def test_an_epoch_is_taken_after_what_the_old_worker_has_begun(
    cluster: Cluster, old: Shards, new: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """The other interleaving: its commit is on the way to the standbys. The new one waits it out, and then sees it."""
    row, _ = await old.accept(make())
    with frozen(await receivers(cluster, standbys(leader_node(old).name))):
        writing = task(old.apply(row, IntentCreated(f"pi_{row.key}", "secret"), event="test"))
        await waiting_commit(leader, "old")
        taking = task(new.batcher(SHARD).take_epoch("new"))
        done, _ = await asyncio.wait([taking, writing], timeout=0.7)
        assert not done
    changed = await asyncio.wait_for(writing, 10)
    await asyncio.wait_for(taking, 10)
    assert await new.get(row.key) == changed
    with pytest.raises(EpochOver):
        await old.get(row.key)
