"""A backlog is replayed without waiting for the taker's quorum: what a failover erases of it is found, and nothing is compared
before all of it is on the quorum."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from oncepay.feed import parse_lsn
from oncepay.moves import Move
from shard.mover.stream import Stream
from tests.shard.mover.conftest import SOURCE, TARGET, World, eventually
from tests.shard.store.trouble import frozen, kill_postmaster, receivers

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(180)]


class _Held:
    """A move that has let its stream come, and does nothing more until it may."""

    def __init__(self) -> None:
        self.enabled = asyncio.Event()
        self.go = asyncio.Event()


@asynccontextmanager
async def replaying(world: World, move: Move, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[_Held, asyncio.Task[Move]]]:
    """The move on its way to `ready`, held right after its stream was enabled."""
    held, enable = _Held(), Stream.enable

    async def enabled(stream: Stream) -> None:
        await enable(stream)
        held.enabled.set()
        await held.go.wait()

    monkeypatch.setattr(Stream, "enable", enabled)
    moving = asyncio.create_task(world.moving.run(move.id, "ready"))
    try:
        async with asyncio.timeout(60):
            await held.enabled.wait()
        monkeypatch.setattr(Stream, "enable", enable)
        yield held, moving
    finally:
        held.go.set()
        await asyncio.wait([moving], timeout=60)


async def standby_receivers(world: World) -> tuple[str, list[str]]:
    leader = world.moving.leaders.current(TARGET)
    assert leader is not None
    return leader.name, [f"{TARGET}-{n}" for n in (1, 2, 3) if f"{TARGET}-{n}" != leader.name]


async def replayed(world: World, key: str) -> None:
    """Return when the target's leader shows the payment."""
    at_taker = await world.session(TARGET)
    try:

        async def shown() -> bool:
            return bool(await at_taker.fetchval("select count(*) from oncepay.payments where key = $1", key))

        await eventually(shown, "the taker has replayed it")
    finally:
        await at_taker.close()


async def test_nothing_is_compared_before_the_quorum_has_what_was_replayed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.pay(world.key())
    move = await world.plan()
    async with replaying(world, move, monkeypatch) as (held, moving):
        _, standbys = await standby_receivers(world)
        late = world.key()
        with frozen(await receivers(world.cluster, standbys)):
            assert (await world.pay(late)).status == "succeeded"
            await replayed(world, late)
            held.go.set()
            done, _ = await asyncio.wait([moving], timeout=3)
            assert not done
            now = next(each for each in await world.moving.records.all() if each.id == move.id)
            assert now.state == "catch_up"
        assert (await asyncio.wait_for(moving, 90)).state == "ready"
    at_taker = await world.session(TARGET)
    try:
        name = f"oncepay_move_{move.id}"
        assert await at_taker.fetchval("select subsynccommit from pg_subscription where subname = $1", name) == "on"
    finally:
        await at_taker.close()


async def test_what_a_failover_erases_of_a_backlog_is_copied_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: the slot has confirmed what the target's new leader never had, so that the stream doesn't bring it again."""
    await world.pay(world.key())
    move = await world.plan()
    async with replaying(world, move, monkeypatch) as (held, moving):
        leader, standbys = await standby_receivers(world)
        late = world.key()
        at_giver = await world.session(SOURCE)
        try:
            receiving = await receivers(world.cluster, standbys)
            with frozen(receiving):
                assert (await world.pay(late)).status == "succeeded"
                await replayed(world, late)
                position = parse_lsn(await at_giver.fetchval("select pg_current_wal_lsn()::text"))

                async def confirmed() -> bool:
                    await at_giver.execute("update oncepay.move_marks set beat = beat + 1")
                    query = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = $1"
                    return parse_lsn(await at_giver.fetchval(query, f"oncepay_move_{move.id}")) >= position

                await eventually(confirmed, "the slot has confirmed it")
                kill_postmaster(world.cluster, leader)
                for process in receiving:
                    process.terminate()  # what their sockets hold yet would be read and kept
        finally:
            await at_giver.close()
        held.go.set()
        ready = await asyncio.wait_for(moving, 120)
    assert (ready.state, ready.attempt) == ("ready", 2)
    assert await world.rows(TARGET) == await world.rows(SOURCE)
