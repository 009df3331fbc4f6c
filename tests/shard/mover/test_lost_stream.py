"""A failover can lose a stream's slot before a standby has it: what then has to be done again, and that nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shard.mover.copy import Copied, Copier
from shard.mover.errors import MoveError, MoveRefused
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


async def test_a_rollback_that_can_not_go_on_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh copy fails however often it is begun: the target has the range, and may keep it."""
    keys = [world.key() for _ in range(4)]
    await asyncio.gather(*(world.pay(key) for key in keys))
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    await world.moving.run(move.id, "reversible")
    await lose(world, TARGET, f"oncepay_back_{move.id}")
    run = Copier.run

    async def failing(copier: Copier, on_chunk: Any) -> Copied:
        async def fail(_: Copied) -> None:
            raise MoveError("the source takes no more")

        return await run(copier, fail)

    monkeypatch.setattr(Copier, "run", failing)
    with pytest.raises(MoveError, match="takes no more"):
        await world.moving.run(move.id, "rolled_back")
    stuck, _ = await world.moving.records.get(move.id)
    assert (stuck.state, stuck.back) == ("copy", True)
    assert any((await world.rows(SOURCE)).values())
    assert f"{SOURCE}: oncepay_copy_{move.id}" in await world.left_over(move)
    with pytest.raises(MoveRefused):
        await world.moving.run(move.id, "aborted")

    finished = await world.moving.run(move.id, "finished")
    assert (finished.state, finished.back) == ("finished", False)
    assert await world.left_over(move) == []
    assert not any((await world.rows(SOURCE)).values())
    assert await world.owner() == TARGET
    assert {(await world.client.get(key)).status for key in keys} == {"succeeded"}
    assert (await world.pay(world.key())).status == "succeeded"


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
