"""Cutting ranges, in a real shard's database: two moves at once, and a cut that isn't there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.postgres_fixture import PostgresServer, postgres_server
from tests.shard.worker.harness import ShardDatabase, shard_database

__all__ = ["postgres_server"]

pytestmark = pytest.mark.cluster

SPLIT = "select oncepay.split_range($1, 1, $2, $3, 7, 10000)"


@pytest.fixture
async def shard(postgres_server: PostgresServer) -> AsyncIterator[ShardDatabase]:
    async with shard_database(postgres_server) as made:
        for move in ("a", "b"):
            await made.connection.fetchval("select oncepay.claim_move($1, 1, 'me', array[$1])", move)
        yield made


async def ranges(shard: ShardDatabase) -> list[tuple[int, int]]:
    rows = await shard.connection.fetch("select first, last from oncepay.ranges order by first")
    return [(row["first"], row["last"]) for row in rows]


async def waits(shard: ShardDatabase, session: asyncpg.Connection) -> None:
    """Return when the session waits for a lock."""
    query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1"
    async with asyncio.timeout(10):
        while not await shard.connection.fetchval(query, session.get_server_pid()):
            await asyncio.sleep(0.01)


async def test_two_moves_that_cut_one_range_at_once_both_have_their_cuts(shard: ShardDatabase) -> None:
    other = await asyncpg.connect(shard.dsn)
    try:
        async with shard.connection.transaction():
            assert await shard.connection.fetchval(SPLIT, "a", 16_384, 32_767) == 2
            cutting = asyncio.create_task(other.fetchval(SPLIT, "b", 49_152, 65_535))
            await waits(shard, other)
        assert await cutting == 1
        assert await ranges(shard) == [(0, 16_383), (16_384, 32_767), (32_768, 49_151), (49_152, 65_535)]
    finally:
        await other.close()


async def test_a_giver_that_has_all_of_the_slots_takes_nothing_back(shard: ShardDatabase) -> None:
    """Its ranges are cut otherwise than the map's: the fence is refused, and the move can be ended."""
    with pytest.raises(asyncpg.PostgresError) as refused:
        await shard.connection.fetchval("select oncepay.fence_range('a', 1, 100, 199, 150)")
    assert refused.value.sqlstate == "OP004"
    take = "select oncepay.take_range('a', 1, 100, 199, 7, null, null)"
    assert await shard.connection.fetchval(take) is False
    assert await ranges(shard) == [(0, 65_535)]
    await shard.connection.execute("update oncepay.ranges set last = 149")
    with pytest.raises(asyncpg.PostgresError) as refused:
        await shard.connection.fetchval(take)
    assert refused.value.sqlstate == "OP004"
