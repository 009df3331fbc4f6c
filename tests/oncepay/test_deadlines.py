"""A wait ends in time, and a cancel from outside is no timeout."""

from __future__ import annotations

import asyncio

import pytest

from oncepay.deadlines import TICK_S, Deadlines


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def test_what_ends_in_time_is_returned() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    assert await Deadlines().within(5, answer()) == 42


async def test_what_raises_raises() -> None:
    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await Deadlines().within(5, fails())


async def test_what_takes_too_long_is_canceled() -> None:
    canceled = asyncio.Event()

    async def slow() -> None:
        try:
            await never()
        finally:
            canceled.set()

    began_s = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        await Deadlines().within(0.05, slow())
    assert canceled.is_set()
    assert 0.05 <= asyncio.get_running_loop().time() - began_s < 0.05 + 8 * TICK_S
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_waits_end_one_by_one_and_again_after_a_pause() -> None:
    deadlines = Deadlines()
    for _ in range(2):
        results = await asyncio.gather(*(deadlines.within(after_s, never()) for after_s in (0.01, 0.3)), return_exceptions=True)
        assert [type(result) for result in results] == [TimeoutError, TimeoutError]


async def test_the_inner_of_two_waits_ends_first() -> None:
    deadlines = Deadlines()

    async def outer() -> str:
        try:
            await deadlines.within(0.01, never())
        except TimeoutError:
            return "inner"
        return "none"

    assert await deadlines.within(5, outer()) == "inner"


async def test_a_cancel_from_outside_is_no_timeout() -> None:
    task = asyncio.create_task(Deadlines().within(5, never()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancel_together_with_the_deadline_is_a_cancel() -> None:
    deadlines = Deadlines()
    task = asyncio.create_task(deadlines.within(0.0, never()))
    await asyncio.sleep(0)
    deadlines._tick()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
