"""A worker's cache and ranges that come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.errors import ShardUnavailable
from oncepay.keys import slot
from oncepay.settings import PayoutSettings, PollSettings
from oncepay.shardmap import Range, ShardMap
from shard.store.rows import Put
from shard.worker import moved
from shard.worker.cache import PendingCache
from shard.worker.feed import Feed, Place
from shard.worker.fill import Connect, fill
from shard.worker.moved import Moved, Runs, without
from shard.worker.payout_cache import PayoutCache
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.shard.worker.harness import ShardDatabase, new_payment, running_feed, settings_for, shard_database

__all__ = ["postgres_server"]

LAST = 60


@st.composite
def runs(draw: st.DrawFn) -> Runs:
    slots = sorted(draw(st.sets(st.integers(0, LAST))))
    found: Runs = []
    for number in slots:
        if found and found[-1][1] + 1 == number:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def slots_of(found: Runs) -> set[int]:
    return {number for first, last in found for number in range(first, last + 1)}


@given(runs(), runs())
def test_without_is_the_difference_of_the_slots(one: Runs, other: Runs) -> None:
    left = without(one, other)
    assert slots_of(left) == slots_of(one) - slots_of(other)
    assert left == sorted(left)
    assert all(first <= last for first, last in left)


def cache_of(keys: list[str]) -> PendingCache:
    cache = PendingCache(PollSettings())
    for key in keys:
        cache.put(key, "attempted", 2, True, 4e9)
    return cache


def test_a_range_that_goes_takes_its_payments_along() -> None:
    keys = [f"order-{n}" for n in range(200)]
    cache = cache_of(keys)
    low = [key for key in keys if slot(key) < 32_768]
    assert cache.forget_slots(0, 32_767) == len(low)
    assert {item.key for item in cache} == set(keys) - set(low)
    assert sum(cache.counts.values()) == len(keys) - len(low)
    assert cache.forget_slots(0, 32_767) == 0


def test_what_settles_while_a_range_is_loaded_does_not_come_back() -> None:
    """The interleaving: the page was read before the payment settled, and is put after the feed told of that."""
    cache = cache_of(["stays"])
    cache.begin_load()
    cache.put("settles", "succeeded", 5, False, 4e9)
    cache.put("settles", "confirming", 4, True, 4e9)
    cache.put("pending", "attempted", 2, True, 4e9)
    cache.end_fill()
    assert {item.key for item in cache} == {"stays", "pending"}


class Maps:
    """A watch of the map that shows what it is told to."""

    def __init__(self, version: int, owner_of_low: str) -> None:
        self._changed = asyncio.Event()
        self.show(version, owner_of_low)

    def show(self, version: int, owner_of_low: str) -> None:
        self.current = ShardMap(version, (Range(0, 32_767, owner_of_low), Range(32_768, 65_535, "s0")))
        self._changed.set()

    async def newer(self, version: int, timeout_s: float) -> None:
        while self.current.version <= version:
            self._changed.clear()
            await self._changed.wait()


@pytest.mark.cluster
async def test_what_is_pending_of_a_fenced_range_is_loaded_too(postgres_server: PostgresServer) -> None:
    """A worker that begins within a fence: when the range goes back to the shard, no new map tells of it."""
    async with shard_database(postgres_server) as shard:
        await shard.put(Put(new_payment("pending"), 0, "accepted"))
        await shard.connection.fetchval("select oncepay.claim_move('m', 1, 'me', array['m'])")
        assert await shard.connection.fetchval("select oncepay.fence_range('m', 1, 0, 65535, 150)") == 1
        cache, payouts, maps = PendingCache(PollSettings()), PayoutCache(PayoutSettings()), Maps(1, "s0")
        cache.begin_fill()
        payouts.begin_fill()
        async with running_feed(shard, settings_for(shard)) as feed:
            moved_ = Moved("s0", cache, payouts, feed.feed, maps, connect_to(shard))  # type: ignore[arg-type]
            await fill(cache, payouts, feed.feed, connect_to(shard), moved_.owned)
        assert {item.key for item in cache} == {"pending"}


class LateFeed:
    """A feed whose rows of before the range was given away come as late as they can: until its barrier has passed."""

    def __init__(self, feed: Feed, cache: PendingCache, late: list[str]) -> None:
        self._feed = feed
        self._cache = cache
        self._late = late

    async def fence(self) -> Place:
        for key in self._late:
            self._cache.put(key, "confirming", 2, True, 4e9)
        self._late = []
        return await self._feed.fence()


@pytest.mark.cluster
async def test_what_the_feed_told_late_of_a_range_does_not_stay_when_it_comes_back(postgres_server: PostgresServer) -> None:
    """The interleaving: a payment's row is on its way through the feed while its range goes, it is settled by the other shard,
    and the range comes back before it is looked at. What a move brings is in no feed: it would be pending for ever.
    """
    async with shard_database(postgres_server) as shard:
        await shard.put(Put(new_payment("pending"), 0, "accepted"))
        cache, payouts = PendingCache(PollSettings()), PayoutCache(PayoutSettings())
        cache.put("before", "confirming", 2, True, 4e9)
        cache.begin_load()
        payouts.begin_load()
        async with running_feed(shard, settings_for(shard)) as feed:
            late = LateFeed(feed.feed, cache, ["while it is loaded"])
            await fill(cache, payouts, late, connect_to(shard), [(0, 65_535)])  # type: ignore[arg-type]
        assert {item.key for item in cache} == {"pending"}


def connect_to(shard: ShardDatabase) -> Connect:
    async def connect(_host: str, _port: int) -> asyncpg.Connection:
        return await asyncpg.connect(shard.dsn)

    return connect


@pytest.mark.parametrize(
    ("steps", "loaded"),
    [
        ([(2, "s1")], []),
        ([(2, "s1"), (3, "s0")], [(0, 32_767)]),
        ([(3, "s0")], [(0, 65_535)]),
        ([(5, "s1")], [(32_768, 65_535)]),
    ],
    ids=["goes", "goes and comes back", "went and came back unseen", "more than one step, and not ours"],
)
async def test_a_range_that_went_and_came_back_is_loaded(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, str]], loaded: Runs
) -> None:
    """The trap: two versions of the map that come as one (a long load, a watch that was cut) look as if nothing had happened."""
    keys = [f"order-{n}" for n in range(50)]
    cache, found = cache_of(keys), list[tuple[int, int]]()
    maps = Maps(1, "s0")

    async def load(_cache: Any, _payouts: Any, _feed: Any, _connect: Any, loaded: Runs) -> None:
        (run,) = loaded
        found.append(run)
        assert not [item.key for item in cache if run[0] <= slot(item.key) <= run[1]], "what was known of it is dropped first"

    monkeypatch.setattr(moved, "fill", load)
    following = Moved("s0", cache, PayoutCache(PayoutSettings()), None, maps, None)  # type: ignore[arg-type]
    task = asyncio.create_task(following.run())
    try:
        for version, owner_of_low in steps:
            maps.show(version, owner_of_low)
            for _ in range(10):
                await asyncio.sleep(0)
    finally:
        task.cancel()
    assert found == loaded


async def test_what_a_deposed_leader_showed_is_forgotten_before_the_range_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interleaving: version 6 was never on the quorum; the real one comes by the feed, and settles the payment."""
    cache, maps, tries, key = cache_of([]), Maps(1, "s1"), list[int](), "order-1"
    monkeypatch.setattr(moved, "RETRY_S", 0.0)

    async def load(_cache: Any, _payouts: Any, _feed: Any, _connect: Any, loaded: Runs) -> None:
        tries.append(1)
        cache.put(key, "processing", 6 if len(tries) == 1 else 5, True, 4e9)
        if len(tries) == 1:
            raise ShardUnavailable("the leader changed")
        cache.end_fill()

    monkeypatch.setattr(moved, "fill", load)
    following = Moved("s0", cache, PayoutCache(PayoutSettings()), None, maps, None)  # type: ignore[arg-type]
    task = asyncio.create_task(following.run())
    try:
        await asyncio.sleep(0)
        maps.current = ShardMap(2, (Range(0, 65_535, "s0"),))
        maps._changed.set()
        for _ in range(20):
            await asyncio.sleep(0.001)
    finally:
        task.cancel()
    assert len(tries) == 2
    assert {(item.key, item.version) for item in cache} == {(key, 5)}
    cache.put(key, "succeeded", 6, False, 4e9)
    assert len(cache) == 0
