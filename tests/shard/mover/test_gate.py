"""A backlog is brought in spells: what holds the stream between them, and what ends that."""

from __future__ import annotations

import asyncio
import time

import pytest

from oncepay.errors import OutcomeUnknown
from oncepay.moves import Move
from shard.mover.gate import LOOK_BACK_S, OPEN_S, Gate
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
    """A stream that is `lag` bytes behind."""

    def __init__(self) -> None:
        self.lag = 10_000_000
        self.giver = self

    async def position(self) -> int:
        return 50_000_000

    async def progress(self) -> int:
        return 50_000_000 - self.lag


async def test_a_backlog_that_does_not_shrink_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, slept, held = [1000.0], [0.0], []

    async def sleep(seconds: float) -> None:
        now_s[0] += seconds
        slept[0] += seconds

    async def shut(_: Gate, seconds: float) -> None:
        held.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Gate, "shut", shut)
    stream = _Backlog()
    gate = Gate(stream)  # type: ignore[arg-type]
    rounds = round(4 * LOOK_BACK_S / (OPEN_S * (1 + REST)))
    for _ in range(rounds):
        stream.lag -= 1000
        await gate.turn()
    assert len(held) == rounds
    for _ in range(rounds):
        stream.lag += 1000
        await gate.turn()
    assert gate.given_up
    assert len(held) < 1.6 * rounds
