"""A shard's database on one Postgres, the real aggregator beside it, and a feed between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import aiohttp
import asyncpg
from aiohttp import web

from aggregator.database import Database
from aggregator.feed import FeedDoor
from aggregator.migrate import migrate as migrate_aggregator
from aggregator.positions import Reader
from oncepay.cart import Item, Share
from oncepay.payment import Key, Payment, Status, Terms
from oncepay.service import Service
from oncepay.settings import PostgresSettings, Settings
from shard.store.batch import _CALL
from shard.store.leader import Node
from shard.store.migrate import migrate
from shard.store.rows import Put, change_arrays, entry_arrays, new_arrays
from shard.worker.feed import Feed
from shard.worker.forward import Forwarder
from shard.worker.stream import SLOT
from shard.worker.transactions import Transaction
from tests.etcd_fixture import free_ports
from tests.postgres_fixture import PostgresServer

SHARD = "s0"
TOKEN = "between services"


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], what: str, timeout_s: float = 15.0) -> None:
    """Return when `condition` holds; it is something outside that tells of no event (a table, a slot)."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
        await asyncio.sleep(0.02)


def new_payment(key: str, *, status: Status = Status.CREATED, intent: str = "", description: str = "") -> Payment:
    """A payment of 10.00 USD to one seller."""
    now_ms = time.time_ns() // 1_000_000
    items = (Item("ada", 1000, description=description),)
    terms = Terms(items, (Share("ada", 1000, 100),), "2026-10-28.endive")
    return Payment(
        Key(key), status, 1, "buyer", "usd", 1000, terms, b"\1" * 32, now_ms, now_ms, now_ms + 86_400_000, intent=intent
    )


class OneLeader:
    """A shard with a single node. `move` is a change of leader."""

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self._callbacks: list[Callable[[str], None]] = []
        self._there = asyncio.Event()

    def current(self, shard: str) -> Node | None:
        return self.node

    async def wait(self, shard: str, timeout_s: float) -> Node:
        while self.node is None:
            self._there.clear()
            await asyncio.wait_for(self._there.wait(), timeout_s)
        return self.node

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def move(self, node: Node | None) -> None:
        self.node = node
        self._there.set()
        for callback in self._callbacks:
            callback(SHARD)


class ShardDatabase:
    """A migrated shard on a Postgres that stands alone, with its slot."""

    def __init__(self, server: PostgresServer, dsn: str, connection: asyncpg.Connection) -> None:
        self.server = server
        self.dsn = dsn
        self.connection = connection
        self.node = Node("alone", "127.0.0.1", server.port)
        self.leaders = OneLeader(self.node)
        self.barriers = 0
        self.barrier_error: Exception | None = None
        self.keep_error: Exception | None = None
        self._barrier_session: asyncpg.Connection | None = None

    @property
    def database(self) -> str:
        return urlsplit(self.dsn).path[1:]

    async def put(self, *puts: Put) -> None:
        """Commit rows as a router does: one batch with its message."""
        new, changes = [put for put in puts if not put.expect], [put for put in puts if put.expect]
        arrays = (*new_arrays(new), *change_arrays(changes), *entry_arrays(changes))
        rows = await self.connection.fetch(_CALL, [0], None, "router-1", "router-1:1", *arrays, [], [], [], [])
        assert all(row["outcome"] == "done" for row in rows), [dict(row) for row in rows]

    async def accept(self, *keys: str) -> None:
        await self.put(*(Put(new_payment(key), 0, "accepted") for key in keys))

    async def barrier(self, nonce: str) -> None:
        """The quorum of one node is itself."""
        self.barriers += 1
        if self.barrier_error is not None:
            raise self.barrier_error
        if self._barrier_session is None:
            self._barrier_session = await asyncpg.connect(self.dsn)
        await self._barrier_session.execute("select pg_logical_emit_message(true, 'oncepay', $1::text)", nonce)

    async def keep_fed(self, epoch: int) -> None:
        """As a worker has the shard keep that its feed was applied."""
        if self.keep_error is not None:
            raise self.keep_error
        session = await asyncpg.connect(self.dsn.replace("//postgres@", "//oncepay_worker@"))
        try:
            await session.execute("select oncepay.feed_applied($1)", epoch)
        finally:
            await session.close()

    async def is_fed(self) -> bool:
        return bool(await self.connection.fetchval("select fed from oncepay.worker_epoch"))

    async def confirmed_lsn(self) -> int:
        lsn = await self.connection.fetchval(
            "select confirmed_flush_lsn - '0/0'::pg_lsn from pg_replication_slots where slot_name = $1", SLOT
        )
        return int(lsn)

    async def log_end(self) -> int:
        return int(await self.connection.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))

    async def close(self) -> None:
        if self._barrier_session is not None:
            await self._barrier_session.close()
        await self.connection.close()


@asynccontextmanager
async def shard_database(server: PostgresServer) -> AsyncIterator[ShardDatabase]:
    """A shard of its own for a test."""
    dsn = server.new_database()
    await migrate(dsn, shard=SHARD, ranges=[(0, 65_535)], passwords={})
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
    shard = ShardDatabase(server, dsn, connection)
    try:
        yield shard
    finally:
        await eventually(lambda: _drop_slot(connection), "the slot is free", 10)
        await shard.close()


async def _drop_slot(connection: asyncpg.Connection) -> bool:
    try:
        await connection.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
    except asyncpg.ObjectInUseError:
        return False
    return True


class RunningAggregator:
    """The aggregator's feed door on a port of its own; it can go away and come back."""

    def __init__(self, settings: Settings, dsn: str, port: int) -> None:
        self.settings = settings
        self.dsn = dsn
        self.port = port
        self.connection: asyncpg.Connection | None = None
        self._runner: web.AppRunner | None = None
        self._database = Database(dsn)

    async def start(self) -> None:
        service = Service(self.settings, kind="aggregator", name="aggregator")
        self._database = Database(self.dsn)
        await self._database.__aenter__()
        FeedDoor(self._database, Reader(self._database), TOKEN, recording=lambda: False, applied=lambda: None).register(service)
        service.app._client_max_size = 64 << 20
        self._runner = web.AppRunner(service.app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.connection = self.connection or await asyncpg.connect(self.dsn)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            await self._database.__aexit__()
            self._runner = None

    async def keys(self) -> set[str]:
        assert self.connection is not None
        return {row["key"] for row in await self.connection.fetch("select key from oncepay.payments")}

    async def watermark(self) -> int | None:
        assert self.connection is not None
        lsn = await self.connection.fetchval("select lsn from oncepay.watermarks where shard = $1", SHARD)
        return None if lsn is None else int(lsn)

    async def holds(self, *keys: str) -> None:
        async def all_there() -> bool:
            return set(keys) <= await self.keys()

        await eventually(all_there, f"the aggregator has {keys[:3]} …")


@asynccontextmanager
async def running_aggregator(server: PostgresServer, settings: Settings) -> AsyncIterator[RunningAggregator]:
    dsn = server.new_database()
    await migrate_aggregator(dsn, passwords={})
    aggregator = RunningAggregator(settings, dsn, urlsplit(settings.aggregator_url).port or 0)
    await aggregator.start()
    try:
        yield aggregator
    finally:
        await aggregator.stop()
        if aggregator.connection is not None:
            await aggregator.connection.close()


def settings_for(shard: ShardDatabase) -> Settings:
    return Settings(
        postgres=PostgresSettings(database=shard.database),
        aggregator_url=f"http://127.0.0.1:{free_ports(1)[0]}",
        internal_token=TOKEN,
        auth=False,
    )


class RunningFeed:
    """A feed and its forwarder, running."""

    def __init__(self, feed: Feed, forwarder: Forwarder, seen: list[Transaction]) -> None:
        self.feed = feed
        self.forwarder = forwarder
        self.seen = seen
        self.tasks: list[asyncio.Task[None]] = []
        self.keeping: asyncio.Task[None]

    @property
    def seen_keys(self) -> list[str]:
        return [row.key for transaction in self.seen for row in transaction.payments]


@asynccontextmanager
async def running_feed(shard: ShardDatabase, settings: Settings, epoch: int | None = None) -> AsyncIterator[RunningFeed]:
    """A feed as the worker runs it, with an epoch taken for it."""
    if epoch is None:
        epoch = int(await shard.connection.fetchval("select oncepay.take_epoch('worker')"))
    seen: list[Transaction] = []
    async with aiohttp.ClientSession() as http:
        forwarder = Forwarder(http, settings, SHARD, epoch)
        feed = Feed(SHARD, shard.leaders, settings, "worker-s0-1", epoch, shard.barrier, asyncio.Event(), forwarder, seen.append)
        running = RunningFeed(feed, forwarder, seen)
        running.tasks = [asyncio.create_task(feed.run()), asyncio.create_task(forwarder.run())]
        running.keeping = asyncio.create_task(forwarder.remember(lambda: shard.keep_fed(epoch)))
        try:
            yield running
        finally:
            tasks = (*running.tasks, running.keeping)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
