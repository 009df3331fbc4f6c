"""What a move leaves behind is deleted page by page or by slots: all of the range, and nothing of what is beside it."""

from __future__ import annotations

import asyncio

import pytest

from oncepay.keys import slot
from shard.mover import remove
from shard.mover.remove import Remover
from shard.mover.tables import Table
from tests.shard.mover.conftest import SOURCE, TARGET, World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


async def others(world: World) -> int:
    """Payments at the source that aren't in the range."""
    session = await world.session(SOURCE)
    try:
        query = "select count(*) from oncepay.payments where slot not between $1 and $2"
        return int(await session.fetchval(query, world.first, world.last))
    finally:
        await session.close()


@pytest.mark.parametrize("by_pages", [True, False])
async def test_all_of_the_range_goes_and_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch, by_pages: bool) -> None:
    keys = [world.key() for _ in range(6)]
    beside = [key for key in (f"beside-{world.first}-{n}" for n in range(400)) if await world_owner(world, key) == SOURCE][:6]
    await asyncio.gather(*(world.pay(key) for key in (*keys, *beside)))
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    await world.moving.run(move.id, "reversible")
    before, held = await others(world), await world.rows(SOURCE)
    assert before >= len(beside)
    monkeypatch.setattr(remove, "ROWS_A_PAGE", 0.0 if by_pages else 1e9)
    monkeypatch.setattr(remove, "PAGES_FIRST", 1)
    left: dict[str, int] = {}
    by_slots = Remover._by_slots

    async def then_by_slots(remover: Remover, table: Table) -> None:
        left[table.name] = (await world.rows(SOURCE))[table.name]
        await by_slots(remover, table)

    monkeypatch.setattr(Remover, "_by_slots", then_by_slots)
    finished = await world.moving.run(move.id, "finished")
    assert left == ({name: 0 for name in left} if by_pages else held)
    assert finished.rows_deleted == sum(held.values()) > len(keys)
    assert set((await world.rows(SOURCE)).values()) == {0}
    assert await others(world) == before
    assert await world.rows(TARGET) == held


async def world_owner(world: World, key: str) -> str:
    """The shard of a key that isn't in the range; empty for one that is."""
    number = slot(key)
    return "" if world.first <= number <= world.last else (await world.map()).range_of(number).shard
