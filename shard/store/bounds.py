"""How a shard cuts the slots that it owns into ranges, where that is not as the map says.

A write locks its slot's range by the range's first slot, and is taken only for a range of just that first slot. The map and the
shard's own table are cut in two steps, and a range that went back to its giver is one where it may have been several. Then
a shard that owns a slot answers `moved`; how it cuts is read from it, and the next try finds its range.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import asyncpg

from oncepay.errors import OncepayError
from oncepay.logs import get_logger
from oncepay.shardmap import MapWatch

LOOK_EVERY_S = 0.25
"""A range that is really handed over is asked for again and again meanwhile."""

_log = get_logger("store")


class Bounds:
    """First slots of ranges by `maps`, or by the shard's own table as `read` gives it (`first`, `last`; ascending)."""

    def __init__(self, maps: MapWatch, read: Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]) -> None:
        self._maps = maps
        self._read = read
        self._own: list[tuple[int, int]] = []
        self._version = 0
        """The map's version when they were read. A later one is believed until the shard says otherwise."""
        self._looked_s = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    def first_of(self, slot: int) -> int:
        """The first slot of the range that holds `slot`."""
        current = self._maps.current
        if self._own and self._version == current.version:
            found = bisect.bisect_right(self._own, slot, key=lambda own: own[0]) - 1
            if found >= 0 and slot <= self._own[found][1]:
                return self._own[found][0]
        return current.range_of(slot).first

    def look(self) -> None:
        """Read the shard's own table soon, once at a time."""
        if self._looking is None and time.monotonic() - self._looked_s > LOOK_EVERY_S:
            self._looking = asyncio.create_task(self._look(), name="bounds")

    async def stop(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self) -> None:
        try:
            version = self._maps.current.version
            own = [(row["first"], row["last"]) for row in await self._read()]
            self._own, self._version = own, version
        except (OncepayError, asyncpg.PostgresError, OSError) as error:
            _log.info("ranges not read", error=str(error))
        finally:
            self._looked_s = time.monotonic()
            self._looking = None
