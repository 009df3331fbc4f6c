"""Whatever becomes of a hand-over, one shard has the range: the interleavings that would give it to two, or to none."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psutil
import pytest

from oncepay.moves import Move
from shard.mover.errors import PauseTooLong
from shard.mover.records import Hold
from tests.shard.mover.conftest import SOURCE, TARGET, World, eventually
from tests.shard.store.trouble import receivers

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(120)]

LIMIT_S = 1.0


async def owners(world: World) -> list[str]:
    """The shards whose databases own the range."""
    found = []
    for shard in (SOURCE, TARGET):
        session = await world.session(shard)
        try:
            query = "select count(*) from oncepay.ranges where first <= $1 and last >= $2"
            found += [shard] * await session.fetchval(query, world.first, world.last)
        finally:
            await session.close()
    return found


def before_the_take(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Awaitable[None]]) -> None:
    """Run `do` once the record says `switch`: the next thing that is sent is the take."""
    save = Hold.save

    async def watched(hold: Hold, **fields: object) -> None:
        await save(hold, **fields)
        if fields.get("state") == "switch":
            await do()

    monkeypatch.setattr(Hold, "save", watched)


async def ready(world: World) -> Move:
    await asyncio.gather(*(world.pay(world.key()) for _ in range(3)))
    move = await world.plan(pause_limit_s=LIMIT_S)
    return await world.moving.run(move.id, "ready")


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def test_a_take_that_waits_for_its_quorum_is_waited_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The take is committed at the target but not visible yet, for no standby has confirmed it, when the pause limit passes."""
    move = await ready(world)
    leader = await world.moving.leaders.wait(TARGET, 10)
    names = [node.name for node in world.moving.leaders.nodes(TARGET) if node != leader]
    frozen: list[int] = []
    thawed: list[asyncio.Task[None]] = []

    async def thaw() -> None:
        await asyncio.sleep(LIMIT_S + 2)
        send(frozen, signal.SIGCONT)

    async def freeze() -> None:
        frozen.extend(process.pid for process in await receivers(world.cluster, names))
        send(frozen, signal.SIGSTOP)
        thawed.append(asyncio.create_task(thaw()))

    before_the_take(monkeypatch, freeze)
    try:
        switched = await world.moving.run(move.id, "reversible")
    finally:
        send(frozen, signal.SIGCONT)
        await asyncio.gather(*thawed)
    assert switched.state == "reversible"
    assert await owners(world) == [TARGET]
    assert await world.owner() == TARGET
    assert (await world.pay(world.key())).status == "succeeded"


async def test_a_take_that_is_read_late_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The take lies in the socket of a backend that stands still, while the source takes the range back."""
    move = await ready(world)
    session = await world.session(TARGET)
    stopped: list[int] = []

    async def stop() -> None:
        query = "select pid from pg_stat_activity where application_name = $1"
        stopped.extend(row["pid"] for row in await session.fetch(query, f"oncepay-mover {move.id}"))
        send(stopped, signal.SIGSTOP)

    before_the_take(monkeypatch, stop)
    try:
        with pytest.raises(PauseTooLong):
            await world.moving.run(move.id, "reversible")
        assert await owners(world) == [SOURCE]
        send(stopped, signal.SIGCONT)

        async def gone() -> bool:
            query = "select count(*) from pg_stat_activity where pid = any ($1::integer[])"
            return bool(await session.fetchval(query, stopped) == 0)

        await eventually(gone, "the backend has read the take, and its session is over")
    finally:
        send(stopped, signal.SIGCONT)
        await session.close()
    assert stopped
    assert not any(psutil.pid_exists(pid) for pid in stopped)
    assert await owners(world) == [SOURCE]
    kept, _ = await world.moving.records.get(move.id)
    assert (kept.state, kept.drain_lsn) == ("ready", ""), "the position was of a hand-over that never was"
    assert (await world.pay(world.key())).status == "succeeded"
