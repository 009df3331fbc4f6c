"""A store on the whole cluster, as a router has it, and superuser sessions to plant and to look."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest

from deploy.local import Cluster
from oncepay.cart import Item, Share
from oncepay.etcd import Etcd
from oncepay.keys import slot
from oncepay.payment import Key, Payment, Status, Terms
from shard.store.store import Shards
from tests.shard.store.trouble import until_whole

MakePayment = Callable[..., Payment]


def on_shard(shard_ranges: list[list[int]], key: str) -> bool:
    """Whether the key's slot is in the ranges."""
    return any(first <= slot(key) <= last for first, last in shard_ranges)


@pytest.fixture
async def store(cluster: Cluster) -> AsyncIterator[Shards]:
    settings = cluster.settings
    async with Etcd(settings.etcd) as etcd:
        shards = Shards(etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor="test")
        await shards.start()
        try:
            yield shards
        finally:
            await shards.stop()


@pytest.fixture
async def leader(cluster: Cluster, store: Shards) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's session on the leader of s0."""
    node = store.leaders.current("s0")
    assert node is not None
    postgres = cluster.settings.postgres
    connection = await asyncpg.connect(
        host=node.host, port=node.port, user=postgres.superuser, password=postgres.superuser_password, database=postgres.database
    )
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def whole(cluster: Cluster, store: Shards) -> AsyncIterator[None]:
    """All three nodes of s0 are there before a test that does something to them, and after it."""
    await until_whole(cluster, store)
    yield
    await until_whole(cluster, store)


@pytest.fixture
def make() -> MakePayment:
    """Makes payments with fresh keys; on s0 unless told."""
    numbers = itertools.count()
    prefix = os.urandom(6).hex()

    def payment(key: str = "", amount: int = 1000) -> Payment:
        while not key:
            tried = f"{prefix}-{next(numbers)}"
            key = tried if slot(tried) < 32_768 else ""
        return Payment(
            key=Key(key),
            status=Status.CREATED,
            version=1,
            buyer="b",
            currency="usd",
            amount=amount,
            terms=Terms(items=(Item("a", amount),), shares=(Share("a", amount, 10),), api_version="v"),
            fingerprint=b"0123456789abcdef",
            created_at_ms=1_700_000_000_000,
            updated_at_ms=1_700_000_000_000,
            expires_at_ms=4_000_000_000_000,
        )

    return payment
