"""A range moves to another shard and back while payments go on, on a whole cluster."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiohttp
import asyncpg
import pytest
from click.testing import CliRunner

from cli.reshard import reshard
from cli.shards.check_cache import _cache as cache_of
from oncepay.keys import slot
from shard.mover.errors import MoveRefused, MoveStopped
from tests.shard.mover.conftest import SOURCE, TARGET, World, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


async def cached(world: World, shard: str) -> dict[str, tuple[int, str]]:
    """What of the range the shard's worker holds as pending."""
    headers = {"Authorization": f"Bearer {world.cluster.settings.internal_token}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        found = await cache_of(http, world.status, shard)
    return {key: state for key, state in found.items() if world.first <= slot(key) <= world.last}


async def in_the_aggregator(world: World, keys: list[str]) -> Counter[str]:
    """How many entries the aggregator holds of each key."""
    connection = await asyncpg.connect(world.status.aggregator_dsn)
    try:
        rows = await connection.fetch("select key from oncepay.entries where key = any ($1::text[])", keys)
        return Counter(row["key"] for row in rows)
    finally:
        await connection.close()


async def test_a_range_moves_and_comes_back_while_payments_go_on(world: World) -> None:
    """No client sees an error, the worker of the owner alone has what is pending, each entry is counted once."""
    carts = [world.key() for _ in range(3)]
    keys = [world.key() for _ in range(6)]
    await asyncio.gather(*(world.cart(key) for key in carts), *(world.pay(key) for key in keys))
    seller = world.seller()
    await put_seller(world, seller)
    stop = asyncio.Event()
    ends: list[str] = []

    async def buyer() -> None:
        while not stop.is_set():
            key = world.key()
            keys.append(key)
            ends.append((await world.pay(key)).status)

    buyers = [asyncio.create_task(buyer()) for _ in range(3)]
    try:
        move = await world.plan()
        with pytest.raises(MoveRefused, match=move.id):
            await world.plan()
        ready = await world.moving.run(move.id, "ready")
        assert ready.rows_copied >= 9
        assert await world.owner() == SOURCE
        switched = await world.moving.run(move.id, "reversible")
        assert await world.owner() == TARGET
        assert switched.pause_s is not None
        assert switched.pause_s < switched.pause_limit_s
        there = ends.copy()
        await eventually(lambda: asyncio.sleep(0, len(ends) > len(there) + 3), "payments go on at the target")
        await caches_are_right(world, owner=TARGET, other=SOURCE, pending=set(carts))
        confirmed = await world.client.confirm(carts[0], payment_method="pm_card_visa")
        assert confirmed.status in {"succeeded", "confirming", "processing"}
        back = await world.moving.run(move.id, "rolled_back")
        assert back.state == "rolled_back"
        assert await world.owner() == SOURCE
        here = ends.copy()
        await eventually(lambda: asyncio.sleep(0, len(ends) > len(here) + 3), "payments go on at the source again")
    finally:
        stop.set()
        await asyncio.gather(*buyers)
    assert set(ends) == {"succeeded"}
    await caches_are_right(world, owner=SOURCE, other=TARGET, pending=set(carts[1:]))
    assert await world.left_over(move) == []
    assert set((await world.rows(TARGET)).values()) == {0}
    for key in (*keys, carts[0]):
        assert (await world.client.get(key)).status == "succeeded"
    wanted = Counter({key: 2 for key in (*keys, carts[0])})

    async def counted() -> bool:
        return await in_the_aggregator(world, [*keys, carts[0]]) == wanted

    await eventually(counted, "each payment and its fee are counted once")


async def put_seller(world: World, seller: str) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {world.status.api_key}"}) as http:
        url = f"{world.status.urls['router']}/v1/sellers/{seller}"
        async with http.put(url, json={"payee": "p-1", "currency": "usd"}) as answer:
            assert answer.status in {200, 201}, await answer.text()


async def caches_are_right(world: World, *, owner: str, other: str, pending: set[str]) -> None:
    async def are() -> bool:
        return pending <= (await cached(world, owner)).keys() and not await cached(world, other)

    await eventually(are, f"what is pending is with the worker of {owner} alone")


async def test_a_planted_difference_stops_the_move_and_is_named(world: World) -> None:
    """One row of the copy is changed behind the move's back: the switch doesn't happen."""
    keys = [world.key() for _ in range(4)]
    await asyncio.gather(*(world.pay(key) for key in keys))
    move = await world.plan()
    await world.moving.run(move.id, "ready")
    await plant(world, keys[2])
    await world.moving.records.change(move.id, state="verify")
    with pytest.raises(MoveStopped, match=keys[2]):
        await world.moving.run(move.id, "ready")
    stopped, _ = await world.moving.records.get(move.id)
    assert stopped.state == "verify"
    assert keys[2] in stopped.differences[0]
    assert "payments: 1 row of 2000 minor units" in stopped.differences[0]
    assert await world.owner() == SOURCE
    command, env = ["status", move.id, "--output", "json"], {"ONCEPAY_HOME": str(world.cluster.home)}
    shown = await asyncio.to_thread(CliRunner().invoke, reshard, command, env=env)
    assert json.loads(shown.stdout)["differences"] == list(stopped.differences)
    aborted = await world.moving.run(move.id, "aborted")
    assert aborted.state == "aborted"
    assert await world.left_over(move) == []
    assert set((await world.rows(TARGET)).values()) == {0}
    assert (await world.client.get(keys[2])).status == "succeeded"


async def plant(world: World, key: str) -> None:
    session = await world.session(TARGET)
    try:
        async with session.transaction():
            await session.execute("set local session_replication_role = replica")
            tag = await session.execute("update oncepay.payments set buyer = 'other' where key = $1", key)
        assert tag == "UPDATE 1"
    finally:
        await session.close()
