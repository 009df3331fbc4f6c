"""The pool's bridge over an outage of etcd, with a clock that the test sets and a real etcd that it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from keygen import pool as pool_module
from keygen.blocks import Blocks
from keygen.pool import AHEAD_LEAST, AHEAD_S, LOW_S, RATE_SPAN_S, TURN_S, TURNS_RATE_MOST, WAIT_S, WAITING_A_TURN, Pool
from keygen.slots import SlotRange
from keygen.turns import TURNS
from oncepay.errors import NoKeys
from oncepay.etcd import Etcd
from oncepay.keys import SECRET_BYTES, MacSecrets, check_issued, slot
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


async def demand(pool: Pool, clock: Clock, seconds: int, rate_per_s: int = RATE_PER_S) -> list[str]:
    """So many keys a second for so many seconds of the clock; NoKeys when they aren't there."""
    keys: list[str] = []
    for _ in range(seconds):
        clock.now_s += 1
        keys += pool.take(rate_per_s) or await pool.wait(rate_per_s)
        await pool._round()
    return keys


async def test_five_minutes_at_the_recent_rate_then_503(
    etcd_of_its_own: tuple[EtcdCluster, Etcd], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "WAITING_MOST", AHEAD_LEAST)
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


def rotated(secrets: MacSecrets) -> MacSecrets:
    """With one more secret, which is used from now on."""
    return MacSecrets(9, secrets.secrets | {9: b"9" * SECRET_BYTES})


async def test_keys_wait_for_their_turn_by_the_rate_at_which_they_are_taken(etcd_of_its_own: tuple[EtcdCluster, Etcd]) -> None:
    """So many that a turn lasts as long as it should; of another secret's none is given out, nor is any taken twice."""
    _, etcd = etcd_of_its_own
    clock = Clock()
    pool = Pool(Blocks(etcd, "keygen-1", BLOCK_KEYS), clock=clock)
    pool.blocks.mirror.start()
    await pool._round()
    assert pool._make_wait() is False
    assert pool._reserve.waiting == 0, "nobody takes any"
    keys = await demand(pool, clock, round(4 * RATE_SPAN_S), 20)
    while pool._make_wait():
        pass
    enough = 0.95 * 20 * TURN_S * WAITING_A_TURN
    assert pool._reserve.waiting > enough
    assert pool.available > AHEAD_LEAST + enough, "what waits isn't what an outage is bridged with"
    more = await demand(pool, clock, 200, 20)
    assert len({slot(key) % TURNS for key in more}) == 1
    keys += more

    secrets = pool.blocks.secrets()
    assert secrets is not None
    await etcd.put("keys/mac", msgspec.json.encode(rotated(secrets)))
    await asyncio.wait_for(shown(pool), 5)
    await pool._round()
    assert pool._reserve.waiting == 0
    later = await demand(pool, clock, 100, 20)
    assert all(check_issued(key, {9: b"9" * SECRET_BYTES}) for key in later[pool_module.READY_LEAST :])
    assert len(set(keys) | set(later)) == len(keys) + len(later)

    pool.rate_per_s = 2 * TURNS_RATE_MOST
    assert pool._make_wait() is False, "who takes so many takes them ahead"
    await pool.blocks.mirror.stop()


async def shown(pool: Pool) -> None:
    """Until the mirror shows the new secret."""
    while (known := pool.blocks.secrets()) is None or known.current != 9:
        await asyncio.sleep(0.01)
