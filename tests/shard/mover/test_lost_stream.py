"""A failover can lose a stream's slot before a standby has it: what then has to be done again, and that nothing is lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.shard.mover.conftest import SOURCE, TARGET, World

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(120)]


async def lose(world: World, shard: str, slot: str) -> None:
    """Drop a slot under the stream that reads it, as a failover does."""
    session = await world.session(shard)
    try:
        async with asyncio.timeout(20):
            while await session.fetchval("select count(*) from pg_replication_slots where slot_name = $1", slot):
                await session.execute(
                    "select pg_terminate_backend(active_pid, 2000) from pg_replication_slots where slot_name = $1", slot
                )
                await session.execute(
                    "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1 and not active",
                    slot,
                )
    finally:
        await session.close()


async def test_a_rollback_without_its_stream_copies_the_range_back(world: World) -> None:
    """What was written since the switch is at the target alone: without the copy the rollback would lose it."""
    keys = [world.key() for _ in range(4)]
    await asyncio.gather(*(world.pay(key) for key in keys))
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    await world.moving.run(move.id, "reversible")
    await lose(world, TARGET, f"oncepay_back_{move.id}")
    since = [world.key() for _ in range(4)]
    await asyncio.gather(*(world.pay(key) for key in since))
    back = await world.moving.run(move.id, "rolled_back")
    assert back.state == "rolled_back"
    assert back.attempt == 2
    assert await world.owner() == SOURCE
    assert {(await world.client.get(key)).status for key in (*keys, *since)} == {"succeeded"}
    assert await world.left_over(move) == []
    assert set((await world.rows(TARGET)).values()) == {0}


async def test_a_switch_without_its_stream_copies_anew(world: World) -> None:
    """The range was ready, and the stream is gone: what is written now would never reach the target."""
    await world.pay(world.key())
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    await lose(world, SOURCE, f"oncepay_move_{move.id}")
    late = world.key()
    await world.pay(late)
    switched = await world.moving.run(move.id, "reversible")
    assert switched.attempt == 2
    assert await world.owner() == TARGET
    assert (await world.client.get(late)).status == "succeeded"
