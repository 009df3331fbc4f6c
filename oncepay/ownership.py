"""The shard map as the shards themselves have it: what a lost or restored etcd's map is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from oncepay.errors import OncepayError
from oncepay.shardmap import SLOTS, Range, ShardMap


class Owned(NamedTuple):
    """A range in a shard's own table: first and last slot, and the version of the map that gave it."""

    first: int
    last: int
    map_version: int


class NotOneMap(OncepayError):
    """The shards' tables don't make one map."""

    status = 409
    slug = "not-one-map"


def map_of(tables: Mapping[str, Sequence[Owned]], *, known_version: int = 0) -> ShardMap:
    """The map that the shards' tables make, newer than any version that they or etcd know.

    Raises NotOneMap, naming the slots, when some belong to nobody or to two.
    """
    rows = sorted((owned.first, owned.last, shard) for shard, table in tables.items() for owned in table)
    expected = 0
    for first, last, shard in (*rows, (SLOTS, SLOTS, "")):
        if first > expected:
            advice = "a move was cut off while it was fenced (`oncepay reshard status`), or a shard is missing"
            raise NotOneMap(f"no shard's table has the slots {expected}–{first - 1}: {advice}")
        if first < expected:
            raise NotOneMap(f"the slots {first}–{min(last, expected - 1)} are in the table of {shard} and of another shard too")
        expected = last + 1
    version = max([known_version, *(owned.map_version for table in tables.values() for owned in table)])
    return ShardMap(version + 1, tuple(Range(first, last, shard) for first, last, shard in rows))
