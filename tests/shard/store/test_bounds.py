"""A shard that cuts its slots otherwise than the map says: its payments go on, whichever of the two has more cuts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import asyncpg
import pytest

from oncepay.cart import Fee
from oncepay.keys import slot
from oncepay.shardmap import Range, ShardMap
from shard.store.sellers import Seller, put_seller
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]

CUT = 20_001


async def set_ranges(leader: asyncpg.Connection, ranges: list[tuple[int, int]], version: int) -> None:
    """Make these s0's ranges, under the lock of each that it had, as a move does it."""
    async with leader.transaction():
        for row in await leader.fetch("select first from oncepay.ranges order by first"):
            await leader.execute("select pg_advisory_xact_lock(1, $1)", row["first"])
        await leader.execute("delete from oncepay.ranges")
        rows = [(first, last, version) for first, last in ranges]
        await leader.executemany("insert into oncepay.ranges (first, last, map_version) values ($1, $2, $3)", rows)


@pytest.fixture
async def ranges(leader: asyncpg.Connection) -> AsyncIterator[list[tuple[int, int]]]:
    """s0's ranges, which it has again afterwards."""
    rows = await leader.fetch("select first, last, map_version from oncepay.ranges order by first")
    found = [(row["first"], row["last"]) for row in rows]
    yield found
    await set_ranges(leader, found, rows[0]["map_version"])


def cut(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """With one cut more, at CUT."""
    parts = [[(first, CUT - 1), (CUT, last)] if first < CUT <= last else [(first, last)] for first, last in ranges]
    return [part for some in parts for part in some]


async def pays_on(store: Shards, make: MakePayment) -> None:
    """Payments of both halves are taken, alone and many at once, and so is a seller."""
    payments = [make() for _ in range(40)]
    assert len({slot(payment.key) < CUT for payment in payments}) == 2
    for payment in payments:
        assert (await store.accept(payment))[1]
    number = 0
    while not CUT <= slot(f"seller:bounds-{os.getpid()}-{number}") < 32_768:
        number += 1
    seller = Seller(f"bounds-{os.getpid()}-{number}", "payee", "usd", Fee(100))
    assert (await put_seller(store, "test", seller))[1] in {"created", "replaced", "same"}


async def test_a_cut_that_the_map_does_not_know_yet(
    store: Shards, leader: asyncpg.Connection, make: MakePayment, ranges: list[tuple[int, int]]
) -> None:
    """As when whoever cut the range was killed before it told the map."""
    await set_ranges(leader, cut(ranges), store.maps.current.version)
    await pays_on(store, make)


async def test_a_range_that_came_back_whole_where_the_map_has_two(
    store: Shards, leader: asyncpg.Connection, make: MakePayment, ranges: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a switch of several ranges of the map was undone."""
    current = store.maps.current
    parts = [
        [Range(i.first, CUT - 1, i.shard), Range(CUT, i.last, i.shard)] if i.first < CUT <= i.last else [i]
        for i in current.ranges
    ]
    more = ShardMap(current.version, tuple(part for some in parts for part in some))
    monkeypatch.setattr(store.maps, "_map", more)
    assert len(more.ranges) == len(current.ranges) + 1
    await pays_on(store, make)
    assert store.maps.current is more
