"""How fast a move goes at most."""

from __future__ import annotations

import time

import pytest

from shard.mover.pace import CHUNK_ROWS_MIN, Pace


async def test_rows_are_never_taken_sooner_than_the_rate_allows() -> None:
    began_s = time.monotonic()
    pace = Pace(1_000)
    for _ in range(5):
        await pace.after(300)
    assert time.monotonic() - began_s >= 1.5


async def test_without_a_rate_nobody_waits() -> None:
    pace = Pace(0)
    assert pace.chunk(20_000) == 20_000
    for _ in range(10_000):
        await pace.after(1_000_000)


@pytest.mark.parametrize(("rate", "rows"), [(1, CHUNK_ROWS_MIN), (8_000, 2_000), (1_000_000, 20_000)])
def test_a_slow_move_takes_smaller_chunks(rate: int, rows: int) -> None:
    assert Pace(rate).chunk(20_000) == rows
