"""Positions: how far each shard's feed is applied, and readers that wait until it is far enough for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

import asyncpg

from aggregator import queries
from aggregator.database import Database, Use
from aggregator.views import Positions
from oncepay.errors import InvalidField, Unavailable
from oncepay.feed import lsn_text, parse_lsn

WAIT_S = 30.0
"""How long a reader waits for its `min_position`."""
RECHECK_S = 0.5
"""How soon a waiting reader sees what another process of the aggregator has applied."""
SHARDS_MAX = 1_000

SQL = queries.load("read.sql")


class PositionNotReached(Unavailable):
    """The aggregator is not yet as far as the request wants."""

    slug = "position-not-reached"


def parse(text: str, field: str = "min_position") -> dict[str, int]:
    """`s0:0/1234,s1:0/5678` as shard → position; empty text is no wish. Raises InvalidField."""
    wanted: dict[str, int] = {}
    for part in text.split(",") if text else ():
        shard, colon, lsn = part.strip().rpartition(":")
        if not colon or not shard or len(wanted) >= SHARDS_MAX:
            raise InvalidField(f"{part!r} is not shard:X/Y", field=field)
        try:
            wanted[shard] = max(parse_lsn(lsn), wanted.get(shard, 0))
        except ValueError as error:
            raise InvalidField(str(error), field=field) from None
    return wanted


def shown(positions: Mapping[str, int]) -> Positions:
    """As answers show them."""
    return {shard: lsn_text(lsn) for shard, lsn in positions.items()}


def reached(positions: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    """Whether `positions` are at or past all that is wanted. A shard never seen is before everything."""
    return all(positions.get(shard, -1) >= lsn for shard, lsn in wanted.items())


class Reader:
    """Opens snapshots that are far enough. `moved` tells it what this process has just applied."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, int] = {}
        self._changed = asyncio.Event()

    def moved(self, shard: str, lsn: int) -> None:
        """A batch of `shard` was applied up to `lsn`."""
        self._known[shard] = lsn
        self._changed.set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def snapshot(
        self, wanted: Mapping[str, int], *, wait_s: float = WAIT_S, use: Use = "read"
    ) -> AsyncIterator[tuple[asyncpg.Connection, Positions]]:
        """A snapshot with its positions, at or past `wanted`. Raises PositionNotReached after `wait_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            async with self._database.snapshot(use) as connection:
                positions = {row["shard"]: row["lsn"] for row in await connection.fetch(SQL["positions"])}
                if reached(positions, wanted):
                    yield connection, shown(positions)
                    return
            left_s = deadline - loop.time()
            if left_s <= 0:
                behind = ", ".join(f"{shard} is at {lsn_text(positions.get(shard, 0))}" for shard in wanted)
                raise PositionNotReached(f"after {wait_s:g} s: {behind}")
            await self._wait(wanted, min(RECHECK_S, left_s))

    async def _wait(self, wanted: Mapping[str, int], timeout_s: float) -> None:
        """Until this process has applied what is wanted, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not reached(self._known, wanted):
                    await self._changed.wait()
