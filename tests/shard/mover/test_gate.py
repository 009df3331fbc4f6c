"""A backlog is brought in spells: what holds the stream between them, and what ends that."""

from __future__ import annotations

import asyncio
import time

import pytest

from oncepay.errors import OutcomeUnknown
from oncepay.moves import Move
from shard.mover.gate import LOOK_BACK_S, OPEN_S, REST_MIN, Gate
from shard.mover.pace import REST
from shard.mover.stream import Stream
from tests.shard.mover.conftest import TARGET, World, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(180)]


async def streaming(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Move]:
    """A move that is ready, and its stream."""
    streams: list[Stream] = []
    enable = Stream.enable

    async def enabled(stream: Stream) -> None:
        streams.append(stream)
        await enable(stream)

    monkeypatch.setattr(Stream, "enable", enabled)
    move = await world.plan()
    assert (await world.moving.run(move.id, "ready")).state == "ready"
    return streams[-1], move


async def is_at_taker(world: World, key: str) -> bool:
    session = await world.session(TARGET)
    try:
        return bool(await session.fetchval("select count(*) from oncepay.payments where key = $1", key))
    finally:
        await session.close()


async def locked(world: World, stream: Stream) -> None:
    """Return when the mark's row is locked at the taker."""
    session = await world.session(TARGET)
    try:
        query = "select beat from oncepay.move_marks where stream = $1 for update skip locked"

        async def is_locked() -> bool:
            return await session.fetchval(query, stream.name) is None

        await eventually(is_locked, "the gate is shut")
    finally:
        await session.close()


async def test_the_stream_is_held_at_a_mark_until_the_gate_opens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = await streaming(world, monkeypatch)
    async with Gate(stream) as gate:
        shut = asyncio.create_task(gate.shut(4.0))
        await locked(world, stream)
        await stream.mark()
        key = world.key()
        await world.pay(key)
        await asyncio.sleep(1.0)
        assert not shut.done()
        assert not await is_at_taker(world, key)
        await shut
        await eventually(lambda: is_at_taker(world, key), "the stream goes on")


async def test_a_gate_whose_process_is_gone_or_frozen_is_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, _ = await streaming(world, monkeypatch)
    async with Gate(stream) as gate:
        shut = asyncio.create_task(gate.shut(60.0))  # as if it stood still: it says nothing to Postgres in that time
        await locked(world, stream)
        await stream.mark()
        key = world.key()
        await world.pay(key)
        await eventually(lambda: is_at_taker(world, key), "Postgres ends the session", 12)
        shut.cancel()
        with pytest.raises((OutcomeUnknown, asyncio.CancelledError)):
            await shut
    async with Gate(stream) as gate:
        assert gate._session is not None
        gate._session.terminate()
        with pytest.raises(OutcomeUnknown):
            await gate.shut(0.1)


class _Backlog:
    """A stream that is `behind` seconds behind."""

    def __init__(self) -> None:
        self.behind = 300.0

    async def behind_s(self) -> float:
        return self.behind


async def test_rests_are_halved_while_a_backlog_does_not_shrink_and_then_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, held = [1000.0], []

    async def sleep(seconds: float) -> None:
        now_s[0] += seconds

    async def shut(_: Gate, seconds: float) -> None:
        held.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Gate, "shut", shut)
    stream = _Backlog()
    gate = Gate(stream)  # type: ignore[arg-type]
    until_s = now_s[0] + 4 * LOOK_BACK_S
    while now_s[0] < until_s:
        stream.behind -= 0.01
        await gate.turn()
    assert set(held) == {OPEN_S * REST}, "it shrinks"
    held.clear()
    began_s = now_s[0]
    while gate.rest:
        assert now_s[0] - began_s < 8 * LOOK_BACK_S
        await gate.turn()
    steps = sorted(set(held), reverse=True)
    assert steps == [OPEN_S * REST / 2**n for n in range(len(steps))]
    assert steps[-1] <= OPEN_S * REST_MIN < steps[-2]
    held.clear()
    await gate.turn()
    assert held == []


async def test_how_far_behind_a_stream_is_does_not_depend_on_how_much_log_that_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = await streaming(world, monkeypatch)
    await stream.applied(await stream.giver.position(), 20)
    assert await stream.behind_s() < 3.0
    async with Gate(stream) as gate:
        shut = asyncio.create_task(gate.shut(4.0))
        await locked(world, stream)
        await stream.mark()
        await asyncio.sleep(2.0)
        assert 1.9 < await stream.behind_s() < 10.0
        await shut
    await stream.applied(await stream.giver.position(), 20)
    assert await stream.behind_s() < 1.5
