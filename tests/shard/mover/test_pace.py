"""How fast a move goes at most."""

from __future__ import annotations

import asyncio
import time

import pytest

from shard.mover.pace import CHUNK_ROWS_MIN, REST, REST_MAX_S, Pace, expected_s


async def test_rows_are_never_taken_sooner_than_the_rate_allows() -> None:
    began_s = time.monotonic()
    pace = Pace(1_000)
    for _ in range(5):
        await pace.after(300)
    assert time.monotonic() - began_s >= 1.5


async def test_what_takes_long_is_followed_by_a_longer_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not above its rate, and no more than two fifths of the time: a machine that is busy is left alone."""
    pace = Pace(1_000_000)
    for worked_s in (0.02, 0.1):
        await asyncio.sleep(worked_s)
        began_s = time.monotonic()
        await pace.after(1)
        assert time.monotonic() - began_s >= REST * worked_s * 0.99
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    pace._resumed_s -= 60.0  # as after waiting for standbys
    await pace.after(1)
    assert slept == [REST_MAX_S]


async def test_without_a_rate_nobody_waits() -> None:
    pace = Pace(0)
    assert pace.chunk(20_000) == 20_000
    for _ in range(10_000):
        await pace.after(1_000_000)


@pytest.mark.parametrize(("rate", "rows"), [(1, CHUNK_ROWS_MIN), (8_000, 1_000), (1_000_000, 20_000)])
def test_a_slow_move_takes_smaller_chunks(rate: int, rows: int) -> None:
    assert Pace(rate).chunk(20_000) == rows


@pytest.mark.parametrize(("rate", "seconds"), [(0, 5.0), (1_000, 100.0), (16_000, 5.0 * (1 + REST))])
def test_an_estimate_counts_the_rests(rate: int, seconds: float) -> None:
    assert expected_s(100_000, rate, 20_000) == seconds
