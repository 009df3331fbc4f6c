"""Comparing what has changed in a range where payments never stop."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from shard.mover.changes import Changes
from shard.mover.compare import Comparer, Key
from shard.mover.stream import Stream


class Busy:
    """A giver whose log grows by a change whenever it is looked at, and a comparison that finds all equal."""

    name = "busy"

    def __init__(self) -> None:
        self.end = 100
        self.forgotten = 0
        self.compared: list[Key] = []

    async def position(self) -> int:
        return self.end

    async def read(self, _query: str, *_arguments: object) -> list[Any]:
        self.forgotten = self.end
        return []

    async def keys(self, keys: list[Key]) -> list[str]:
        self.compared += keys
        return []


async def test_a_comparison_ends_while_payments_go_on() -> None:
    """It never did: each look found what had come during the one before, and the switch of a busy range never began."""
    busy = Busy()
    stream = cast(Stream, type("OfBusy", (), {"name": "busy", "giver": busy})())
    changes = Changes(stream, ())

    async def peek() -> tuple[set[Key], int]:
        await asyncio.sleep(0)
        key, upto = (busy.end % 7, str(busy.end)), busy.end
        busy.end += 10
        return {key}, upto

    changes._peek = peek  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        count, found = await changes.compare(cast(Comparer, busy))
    assert (count, found) == (1, [])
    assert len(busy.compared) == 1
