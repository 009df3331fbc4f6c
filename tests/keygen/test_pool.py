"""The pool's bridge over an outage of etcd, with a clock that the test sets and a real etcd that it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from keygen.blocks import Blocks
from keygen.pool import AHEAD_LEAST, AHEAD_S, LOW_S, RATE_SPAN_S, WAIT_S, Pool
from keygen.slots import SlotRange
from oncepay.errors import NoKeys
from oncepay.etcd import Etcd
from tests.etcd_fixture import EtcdCluster

pytestmark = pytest.mark.cluster

BLOCK_KEYS = 1 << 24
RATE_PER_S = 2_000


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def etcd_of_its_own() -> AsyncIterator[tuple[EtcdCluster, Etcd]]:
    with EtcdCluster(1) as cluster:
        async with Etcd(cluster.settings(), timeout_s=0.5) as etcd:
            yield cluster, etcd


async def demand(pool: Pool, clock: Clock, seconds: int) -> list[str]:
    """RATE_PER_S for so many seconds of the clock; NoKeys when they aren't there."""
    keys: list[str] = []
    for _ in range(seconds):
        clock.now_s += 1
        keys += pool.take(RATE_PER_S) or await pool.wait(RATE_PER_S)
        await pool._round()
    return keys


async def test_five_minutes_at_the_recent_rate_then_503(etcd_of_its_own: tuple[EtcdCluster, Etcd]) -> None:
    cluster, etcd = etcd_of_its_own
    clock = Clock()
    pool = Pool(Blocks(etcd, "keygen-1", BLOCK_KEYS), clock=clock)
    pool.blocks.mirror.start()
    await pool._round()
    # Long enough for the measured rate to become the real one, and over several raised watermarks.
    keys = await demand(pool, clock, round(10 * RATE_SPAN_S))
    assert pool.rate_per_s == pytest.approx(RATE_PER_S, rel=0.01)
    assert pool.available >= 0.99 * AHEAD_S * RATE_PER_S > AHEAD_LEAST
    await pool.check()

    cluster.kill()
    with pytest.raises(AssertionError):
        await etcd_answers(etcd)
    pool._failing_since = clock.now_s
    clock.now_s += 1
    issued = 0
    while (some := pool.take(RATE_PER_S)) is not None:
        keys += some
        issued += 1
        if pool.available > 1.05 * LOW_S * RATE_PER_S:
            await pool.check()
    assert issued >= 0.99 * AHEAD_S, "it bridges five minutes"
    assert pool.available < RATE_PER_S
    with pytest.raises(NoKeys) as refused:
        await pool.check()
    with pytest.raises(NoKeys) as refused:
        await asyncio.wait_for(pool.wait(RATE_PER_S), 2 * WAIT_S)
    assert (refused.value.status, refused.value.slug) == (503, "no-keys")
    assert refused.value.retry_after_s
    assert len(set(keys)) == len(keys)
    await pool.blocks.mirror.stop()


async def etcd_answers(etcd: Etcd) -> None:
    from oncepay.errors import EtcdUnavailable

    try:
        await etcd.get("keys/mac")
    except EtcdUnavailable as error:
        raise AssertionError from error


async def test_a_search_that_finds_too_little_gives_back_what_it_found(etcd_of_its_own: tuple[EtcdCluster, Etcd]) -> None:
    cluster, etcd = etcd_of_its_own
    pool = Pool(Blocks(etcd, "keygen-1", BLOCK_KEYS))
    pool.blocks.mirror.start()
    await pool._round()
    cluster.kill()
    before = pool.available
    # In 98,304 keys there are some 96 of these 64 slots, and etcd is away: no more can be had.
    with pytest.raises(NoKeys):
        await pool.take_in(SlotRange(0, 63), 128)
    assert pool.available == before
    keys = await pool.take_in(SlotRange(0, 63), 50)
    assert len(set(keys)) == 50
    rest = pool.take(pool.available)
    assert rest is not None
    assert len(set(rest) | set(keys)) == before
    await pool.blocks.mirror.stop()
