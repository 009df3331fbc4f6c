"""What a payout run reads of all shards, on two real databases: which shards, and each slot from its one owner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import asyncpg
import msgspec
import pytest
from msgspec.structs import replace

from oncepay.etcd import Etcd
from oncepay.keys import slot
from oncepay.payment import Dispute, Progress, Status
from oncepay.settings import Settings
from oncepay.shardmap import MAP_KEY, SHARDS_PREFIX, Range, ShardMap
from shard.store.batch import Batcher
from shard.store.migrate import migrate
from shard.store.payouts import PayoutStore
from shard.store.rows import Put
from shard.store.store import Shards
from tests.etcd_fixture import EtcdCluster
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.shard.worker.harness import ShardDatabase, eventually, new_payment

__all__ = ["postgres_server"]

pytestmark = pytest.mark.cluster

LOW, HIGH = (0, 32_767), (32_768, 65_535)
KEY = next(key for key in map("inquiry-{}".format, range(100)) if slot(key) <= LOW[1])


@pytest.fixture(scope="module")
def etcd_member() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as made:
        yield made


class Parts(Shards):
    """Shards whose leaders are databases of one Postgres: what etcd says is a leader's port is its number in `dsns`."""

    dsns: Sequence[str] = ()

    async def connect(self, host: str, port: int) -> asyncpg.Connection:
        return await asyncpg.connect(self.dsns[port - 1].replace("//postgres@", "//oncepay_aggregator@"))


class World:
    """Two shards that know every slot's rows; who owns what is each test's."""

    def __init__(self, etcd: Etcd, shards: Parts, databases: Mapping[str, ShardDatabase]) -> None:
        self.etcd = etcd
        self.shards = shards
        self.databases = databases
        self.store = PayoutStore(shards, "test")

    async def own(self, shard: str, *ranges: tuple[int, int]) -> None:
        """The shard's own table, as a move's commit leaves it."""
        connection = self.databases[shard].connection
        async with connection.transaction():
            await connection.execute("delete from oncepay.ranges")
            await connection.executemany("insert into oncepay.ranges (first, last, map_version) values ($1, $2, 1)", ranges)

    async def begin(self, *ranges: Range, restored: Sequence[str] = ()) -> None:
        """The map, a record for each shard, and a process that reads them."""
        for shard in (*self.databases, *restored):
            record = {"name": shard, "scope": shard, "nodes": []} | ({"restored": True} if shard in restored else {})
            await self.etcd.put(SHARDS_PREFIX + shard, json.dumps(record).encode())
        for shard in self.databases:
            await self.own(shard, *((item.first, item.last) for item in ranges if item.shard == shard))
        await self.etcd.put(MAP_KEY, msgspec.json.encode(ShardMap(1, ranges)))
        await self.shards.start()


@pytest.fixture
async def world(
    postgres_server: PostgresServer, etcd_member: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    async def proved(*_: object) -> None:
        """The quorum of one node is itself."""

    monkeypatch.setattr("shard.store.batch.prove", proved)
    settings = Settings(etcd=etcd_member.settings())
    async with Etcd(settings.etcd) as etcd:
        shards = Parts(etcd, settings, role="oncepay_aggregator", password="", actor="test")
        databases: dict[str, ShardDatabase] = {}
        for number, name in enumerate(("s0", "s1"), 1):
            dsn = postgres_server.new_database()
            await migrate(dsn, shard=name, ranges=[(0, 65_535)], passwords={})
            databases[name] = ShardDatabase(postgres_server, dsn, await asyncpg.connect(dsn))
            url = json.dumps({"conn_url": f"postgres://127.0.0.1:{number}/postgres"})
            await etcd.put(f"patroni/{name}/members/{name}a", url.encode())
            await etcd.put(f"patroni/{name}/leader", f"{name}a".encode())
        shards.dsns = [database.dsn for database in databases.values()]
        try:
            yield World(etcd, shards, databases)
        finally:
            await shards.stop()
            for database in databases.values():
                await database.close()


async def test_a_shard_that_owns_nothing_any_more_is_waited_for(world: World) -> None:
    """What it committed before its last slots moved may still be on its way to the aggregator."""
    await world.begin(Range(0, 65_535, "s1"), restored=["s2"])
    assert sorted(await world.store.moments()) == ["s0", "s1"], "a shard that was restored and not accepted has no feed"


async def test_a_restored_shard_that_owns_slots_is_waited_for(world: World) -> None:
    """As soon as the map says so, whether its record does or not."""
    await world.begin(Range(*LOW, "s0"), Range(*HIGH, "s1"), restored=["s0"])
    assert sorted(await world.store.moments()) == ["s0", "s1"]


async def test_an_inquiry_is_not_missed_while_its_range_is_handed_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that moment no shard answers the range's rows; the read is made again until one does, and one alone."""
    made = new_payment(KEY)
    inquiry = Dispute("du_1", "warning_needs_response", 1_000)
    progress = Progress(disputes=(inquiry,))
    asked = replace(made, status=Status.SUCCEEDED, version=2, intent="pi_1", amount_captured=1_000, progress=progress)
    for database in world.databases.values():  # also the copy that a move makes
        await database.put(Put(made, 0, "accepted"))
        await database.put(Put(asked, 1, "asked"))
    await world.begin(Range(*LOW, "s0"), Range(*HIGH, "s1"))
    assert [payment.key for payment in await world.store.disputed()] == [KEY]

    reads: list[str] = []
    read = Batcher.read

    async def counted(self: Batcher, query: str, *arguments: object, message: str = "list") -> Sequence[Mapping[str, Any]]:
        reads.append(self.shard)
        return await read(self, query, *arguments, message=message)

    monkeypatch.setattr(Batcher, "read", counted)
    for still in ((), (LOW,)):  # neither has it; then as one sees who reads the giver before the fence, and the taker after it
        await world.own("s0", *still)
        await world.own("s1", *(LOW, HIGH) if still else (HIGH,))
        reads.clear()
        reading = asyncio.create_task(world.store.disputed())
        await eventually(lambda task=reading: len(reads) > 2 or task.done(), "it was read again")
        assert not reading.done(), await reading
        await world.own("s0")
        await world.own("s1", LOW, HIGH)
        assert [payment.key for payment in await reading] == [KEY]
