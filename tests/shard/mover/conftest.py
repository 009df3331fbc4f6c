"""A whole cluster's ranges and shards, as the tests of moves need them."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import asyncpg
import pytest

from deploy.local import Cluster, Status
from oncepay.client import Oncepay, PaymentView
from oncepay.etcd import Etcd
from oncepay.keys import slot
from oncepay.moves import Move
from oncepay.shardmap import ShardMap
from shard.mover.plan import plan
from shard.mover.run import Mover, mover

SOURCE, TARGET = "s1", "s0"
SLOTS = 48
FIRSTS = itertools.count(33_000, 100)
"""Ranges of their own for the tests of a run, within what s1 owns."""


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 20.0) -> None:
    """Return when `condition` holds; it is something outside that tells of no event (a table, another process)."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)
    assert await condition(), what


@dataclass
class World:
    """One test's range, and how it reaches the cluster."""

    cluster: Cluster
    status: Status
    moving: Mover
    client: Oncepay
    first: int
    last: int

    def key(self, prefix: str = "move") -> str:
        """A fresh key in the range."""
        for number in itertools.count():
            key = f"{prefix}-{os.urandom(6).hex()}-{number}"
            if self.first <= slot(key) <= self.last:
                return key
        raise AssertionError

    def seller(self) -> str:
        """The id of a seller whose row is in the range."""
        for number in itertools.count():
            seller = f"sel-{os.urandom(4).hex()}-{number}"
            if self.first <= slot(f"seller:{seller}") <= self.last:
                return seller
        raise AssertionError

    async def pay(self, key: str, *, card: str = "pm_card_visa", amount: int = 1000) -> PaymentView:
        return await self.client.pay(
            key, buyer="b", currency="usd", items=[{"seller": "s", "amount": amount}], payment_method=card, wait_s=30
        )

    async def cart(self, key: str) -> PaymentView:
        """A payment that waits for its buyer."""
        return await self.client.pay(key, buyer="b", currency="usd", items=[{"seller": "s", "amount": 900}], wait_s=10)

    async def plan(self, **options: object) -> Move:
        current = await self.map()
        found = await plan(self.moving, current, self.first, self.last, TARGET, **options)  # type: ignore[arg-type]
        assert found.ok, [check for check in found.checks if not check.ok]
        return found.move

    async def map(self) -> ShardMap:
        return await self.moving.records.change_map(lambda found: found)

    async def owner(self) -> str:
        return (await self.map()).range_of(self.first).shard

    async def session(self, shard: str) -> asyncpg.Connection:
        """A superuser's session with the shard's leader."""
        node = await self.moving.leaders.wait(shard, 10)
        postgres = self.cluster.settings.postgres
        return await asyncpg.connect(
            host=node.host, port=node.port, user=postgres.superuser, password=postgres.superuser_password,
            database=postgres.database,
        )  # fmt: skip

    async def rows(self, shard: str) -> dict[str, int]:
        """How many rows of the range a shard holds, by table."""
        session = await self.session(shard)
        try:
            names = [row["name"] for row in await session.fetch("select name from oncepay.slot_tables")]
            query = "select count(*) from oncepay.{} where slot between $1 and $2"
            return {name: await session.fetchval(query.format(name), self.first, self.last) for name in names}
        finally:
            await session.close()

    async def left_over(self, move: Move) -> list[str]:
        """What is left of a move on either shard, or on any of their nodes."""
        found: list[str] = []
        like = f"%{move.id}%"
        for shard in (SOURCE, TARGET):
            session = await self.session(shard)
            try:
                for catalog, column in (
                    ("pg_publication", "pubname"), ("pg_subscription", "subname"), ("pg_replication_slots", "slot_name"),
                    ("pg_replication_origin", "roname"),
                ):  # fmt: skip
                    query = f"select {column} from {catalog} where {column} like $1"
                    found += [f"{shard}: {row[0]}" for row in await session.fetch(query, like)]
            finally:
                await session.close()
        return found


@pytest.fixture
async def world(cluster: Cluster) -> AsyncIterator[World]:
    """A range of s1 that no other test moves. What a failed test leaves of its move is given up."""
    status = await asyncio.to_thread(cluster.status)
    first = next(FIRSTS) + os.getpid() % 97
    async with (
        Etcd(cluster.settings.etcd) as etcd,
        mover(etcd, cluster.settings) as moving,
        Oncepay(router=status.urls["router"], api_key=status.api_key) as client,
    ):
        made = World(cluster, status, moving, client, first, first + SLOTS - 1)
        yield made
        for move in await moving.records.all():
            if move.touches(made.first, made.last) and not move.over:
                goal = "rolled_back" if move.state == "reversible" or move.back else "aborted"
                await moving.run(move.id, goal)  # type: ignore[arg-type]
