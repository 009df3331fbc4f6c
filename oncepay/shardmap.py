"""The shard map: which shard owns which range of slots. One record in etcd, with a version that only grows."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import Callable, Sequence

import msgspec

from oncepay.errors import EtcdUnavailable
from oncepay.etcd import Etcd, Mirror
from oncepay.etcd.types import KeyValue

SLOTS = 65_536
MAP_KEY = "map"
SHARDS_PREFIX = "shards/"


class Range(msgspec.Struct, frozen=True):
    """The slots `first` to `last`, both included, on `shard`."""

    first: int
    last: int
    shard: str


class ShardMap(msgspec.Struct, frozen=True):
    """Ranges in ascending order that cover every slot once."""

    version: int
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        expected = 0
        for item in self.ranges:
            if item.first != expected or item.last < item.first:
                raise ValueError(f"the ranges of map version {self.version} don't cover the slots from {expected} on once")
            expected = item.last + 1
        if expected != SLOTS:
            raise ValueError(f"the ranges of map version {self.version} end at slot {expected - 1}")

    def range_of(self, slot: int) -> Range:
        """The range that holds `slot` (0 to 65,535)."""
        return self.ranges[bisect.bisect_right(self.ranges, slot, key=lambda item: item.first) - 1]

    def shards(self) -> tuple[str, ...]:
        """The shards that own something, in the order of their first slots."""
        return tuple(dict.fromkeys(item.shard for item in self.ranges))


def even_map(shards: Sequence[str], version: int = 1) -> ShardMap:
    """A first map: the slots dealt out evenly, in order."""
    bounds = [SLOTS * i // len(shards) for i in range(len(shards) + 1)]
    return ShardMap(version, tuple(Range(bounds[i], bounds[i + 1] - 1, name) for i, name in enumerate(shards)))


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same slots in as few ranges as possible, ascending."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


class _Record(msgspec.Struct):
    """What is read of a shard's own record."""

    restored: bool = False
    removing: bool = False


async def _read_records(etcd: Etcd) -> dict[str, _Record]:
    kvs, _ = await etcd.get_prefix(SHARDS_PREFIX)
    return {kv.key.removeprefix(SHARDS_PREFIX): msgspec.json.decode(kv.value, type=_Record) for kv in kvs}


async def read_shards(etcd: Etcd) -> list[str]:
    """All shards, also those that own nothing; but none that was restored from a backup, whose rows are others', and that has no
    workers until it is accepted. Raises EtcdUnavailable.
    """
    return sorted(shard for shard, record in (await _read_records(etcd)).items() if not record.restored)


async def read_takers(etcd: Etcd) -> list[str]:
    """The shards that may take slots: those of `read_shards` that nobody is removing. Raises EtcdUnavailable."""
    return sorted(shard for shard, record in (await _read_records(etcd)).items() if not record.restored and not record.removing)


def is_removing(record: bytes) -> bool:
    """Whether somebody removes the shard whose record this is: it may get nothing any more."""
    return msgspec.json.decode(record, type=_Record).removing


async def read_map(etcd: Etcd) -> ShardMap | None:
    """The map as etcd holds it now; None when there is none. Raises EtcdUnavailable."""
    kv = await etcd.get(MAP_KEY)
    return None if kv is None else msgspec.json.decode(kv.value, type=ShardMap)


class MapWatch:
    """The current map, kept so by a watch. A lower version than the one known is ignored (etcd restored from old)."""

    def __init__(self, etcd: Etcd) -> None:
        self._mirror = Mirror(etcd, MAP_KEY, on_change=self._changed)
        self._map: ShardMap | None = None
        self._newer = asyncio.Event()
        self._callbacks: list[Callable[[ShardMap], None]] = []

    async def start(self, timeout_s: float = 60.0) -> None:
        """Begin to watch; returns when a map is there. Raises EtcdUnavailable after `timeout_s`."""
        self._mirror.start()
        await self._mirror.wait_synced(timeout_s)

    async def stop(self) -> None:
        """End the watch."""
        await self._mirror.stop()

    @property
    def known(self) -> bool:
        """Whether a map has been read."""
        return self._map is not None

    @property
    def current(self) -> ShardMap:
        """The newest map seen. Raises EtcdUnavailable when none has been."""
        if self._map is None:
            raise EtcdUnavailable("no shard map has been read from etcd yet")
        return self._map

    async def newer(self, version: int, timeout_s: float) -> None:
        """Return as soon as a later map than `version` is there, at the latest after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._map is None or self._map.version <= version:
                    await self._newer.wait()

    def on_change(self, callback: Callable[[ShardMap], None]) -> None:
        """Call `callback` with each new map."""
        self._callbacks.append(callback)

    def _changed(self, key: str, value: KeyValue | None) -> None:
        if key or value is None:
            return
        seen = msgspec.json.decode(value.value, type=ShardMap)
        if self._map is None or seen.version > self._map.version:
            self._map = seen
            self._newer.set()
            self._newer = asyncio.Event()
            for callback in self._callbacks:
                callback(seen)
