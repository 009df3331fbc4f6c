"""A stream may bring what its giver doesn't show yet, and be past what its taker shows: that is no difference."""

from __future__ import annotations

import asyncio

import pytest

from oncepay.keys import slot
from shard.mover.compare import Comparer
from shard.mover.run import Journey
from tests.shard.mover.conftest import SOURCE, TARGET, World, eventually
from tests.shard.store.trouble import frozen, receivers

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(120)]


async def test_a_commit_that_waits_for_its_standbys_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interleaving: a payment is committed at the giver after its position was read. The taker has replayed it, but the
    commit still waits, and the giver shows none."""
    await world.pay(world.key())
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    hold = await world.moving.records.take(move.id, None)
    journey = Journey(world.moving, hold, lambda _: None)
    late = world.key()
    at_taker = await world.session(TARGET)
    try:
        await journey._claim()
        stream = journey._stream(back=False)
        comparer = Comparer(stream, journey._tables)
        await stream.applied(await stream.giver.position(), 30)

        applied, thawed = stream.applied, asyncio.Event()

        async def was_applied(position: int, timeout_s: float) -> None:
            """Before the payment came, until the giver commits again."""
            if thawed.is_set():
                await applied(position, timeout_s)

        monkeypatch.setattr(stream, "applied", was_applied)
        leader = world.moving.leaders.current(SOURCE)
        assert leader is not None
        members = [f"{SOURCE}-{n}" for n in (1, 2, 3) if f"{SOURCE}-{n}" != leader.name]
        with frozen(await receivers(world.cluster, members)):
            paying = asyncio.create_task(world.pay(late))

            async def is_ahead() -> bool:
                return bool(await at_taker.fetchval("select count(*) from oncepay.payments where key = $1", late))

            await eventually(is_ahead, "the taker has it")
            comparing = asyncio.create_task(comparer.keys([(slot(late), late)]))
            done, _ = await asyncio.wait([comparing], timeout=1.5)
            assert not done, comparing.result()
            thawed.set()
        assert await asyncio.wait_for(comparing, 30) == []
        assert (await asyncio.wait_for(paying, 30)).status == "succeeded"
    finally:
        await at_taker.close()
        await journey.close()
        await hold.leave()
    await world.moving.run(move.id, "aborted")


async def test_what_the_taker_has_replayed_is_waited_for_until_it_shows_it(world: World) -> None:
    """The interleaving: a payment has ended at the giver, and the taker has replayed it, but there its commit still waits."""
    await world.pay(world.key())
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    hold = await world.moving.records.take(move.id, None)
    journey = Journey(world.moving, hold, lambda _: None)
    late = world.key()
    try:
        await journey._claim()
        stream = journey._stream(back=False)
        comparer = Comparer(stream, journey._tables)
        await stream.applied(await stream.giver.position(), 30)
        leader = world.moving.leaders.current(TARGET)
        assert leader is not None
        members = [f"{TARGET}-{n}" for n in (1, 2, 3) if f"{TARGET}-{n}" != leader.name]
        with frozen(await receivers(world.cluster, members)):
            assert (await world.pay(late)).status == "succeeded"
            comparing = asyncio.create_task(comparer.keys([(slot(late), late)]))
            done, _ = await asyncio.wait([comparing], timeout=2)
            assert not done, comparing.result()
        assert await asyncio.wait_for(comparing, 30) == []
    finally:
        await journey.close()
        await hold.leave()
    await world.moving.run(move.id, "aborted")
