"""Ranges that come and go: a moved range is not in the change feed, so what is pending of it is loaded and dropped by the map."""

from __future__ import annotations

import asyncio

from oncepay.errors import ShardUnavailable
from oncepay.logs import get_logger
from oncepay.moves import owned_runs
from oncepay.shardmap import MapWatch, ShardMap
from shard.worker.cache import PendingCache
from shard.worker.feed import Feed
from shard.worker.fill import Connect, fill
from shard.worker.payout_cache import PayoutCache

RETRY_S = 0.5

Runs = list[tuple[int, int]]

_log = get_logger("cache")


class Moved:
    """Keeps the caches to what the map gives to `shard`. Made before they are filled: what comes later is loaded."""

    def __init__(
        self, shard: str, cache: PendingCache, payouts: PayoutCache, feed: Feed, maps: MapWatch, connect: Connect
    ) -> None:
        self._shard = shard
        self._cache = cache
        self._payouts = payouts
        self._feed = feed
        self._maps = maps
        self._connect = connect
        self._version = maps.current.version
        self.owned: Runs = owned_runs(maps.current, shard)
        """What the caches hold, or are to be filled with at first."""

    async def run(self) -> None:
        """Follow the map until canceled. Begin when the cache is filled."""
        while True:
            current = self._maps.current
            if current.version > self._version:
                await self._follow(current)
            await self._maps.newer(self._version, 60.0)

    async def _follow(self, current: ShardMap) -> None:
        now = owned_runs(current, self._shard)
        # A version that was not seen may have given a range away, and the next one given it back: what is pending of it has
        # changed elsewhere meanwhile, and the feed doesn't tell. So all is dropped and loaded then.
        seen = current.version == self._version + 1
        for first, last in without(self.owned, now if seen else []):
            dropped = self._cache.forget_slots(first, last) + self._payouts.forget_slots(first, last)
            _log.info("range given away", first=first, last=last, pending=dropped)
        for run in without(now, self.owned if seen else []):
            await self._load(run)
        self.owned, self._version = now, current.version

    async def _load(self, run: tuple[int, int]) -> None:
        """What is pending of a range that has come: it was written by the move, and stands in the table alone."""
        while True:
            self._cache.begin_load()
            self._payouts.begin_load()
            try:
                await fill(self._cache, self._payouts, self._feed, self._connect, [run])
                return
            except ShardUnavailable as error:
                # What was read of a leader that was deposed meanwhile may never have been: all is read again.
                self._cache.forget_slots(*run)
                self._payouts.forget_slots(*run)
                _log.info("range not loaded", first=run[0], last=run[1], error=str(error))
                await asyncio.sleep(RETRY_S)


def without(runs: Runs, others: Runs) -> Runs:
    """The slots of `runs` that are in none of `others`. Both ascending, without overlaps."""
    left: Runs = []
    for first, last in runs:
        start = first
        for other_first, other_last in others:
            if other_last < start or other_first > last:
                continue
            if other_first > start:
                left.append((start, other_first - 1))
            start = other_last + 1
        if start <= last:
            left.append((start, last))
    return left
