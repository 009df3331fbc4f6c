"""Slots that a former leader still has go; the primary's stay, whether or not etcd names it."""

from __future__ import annotations

import asyncpg
import pytest

from shard.mover.side import Side
from shard.mover.stream import drop_stale
from tests.shard.mover.conftest import SOURCE, World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]

NAME = "oncepay_move_stale"


async def there(session: asyncpg.Connection) -> bool:
    return bool(await session.fetchval("select exists (select from pg_replication_slots where slot_name = $1)", NAME))


async def test_while_etcd_names_no_leader_the_primary_keeps_its_slots(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    leaders = world.moving.leaders
    leader = await leaders.wait(SOURCE, 10)
    side = Side(SOURCE, leaders, world.cluster.settings, "oncepay-mover test")
    at_leader = await side.open(leader)
    at_standby = await side.open(next(node for node in leaders.nodes(SOURCE) if node != leader))
    try:
        await at_leader.execute("select pg_create_logical_replication_slot($1, 'pgoutput', false, false, true)", NAME)
        await at_standby.execute("select pg_create_physical_replication_slot($1)", NAME)
        with monkeypatch.context() as patch:
            patch.setattr(leaders, "current", lambda _: None)
            await drop_stale(side, [NAME])
        assert await there(at_leader)
        assert not await there(at_standby)
    finally:
        await at_leader.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1", NAME)
        at_leader.terminate()
        at_standby.terminate()
