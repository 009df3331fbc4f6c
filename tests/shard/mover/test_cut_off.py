"""A move that is cut off between two of its writes, or whose process stands still there: it goes on, and one shard owns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from oncepay.errors import EtcdUnavailable, ShardUnavailable
from oncepay.etcd import Etcd, Put
from oncepay.moves import Goal, Move
from oncepay.shardmap import MAP_KEY
from shard.mover.changes import Changes
from shard.mover.errors import MoveStopped, MoveTaken, StreamLost
from shard.mover.handover import Handover
from shard.mover.records import Hold
from shard.mover.remove import Remover
from shard.mover.run import Journey
from shard.mover.stream import Stream
from tests.shard.mover.conftest import SOURCE, TARGET, World
from tests.shard.mover.test_lost_stream import lose
from tests.shard.mover.test_one_owner import owners

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(120)]


class Killed(Exception):
    """The process ended here."""


async def ready(world: World) -> tuple[Move, list[str]]:
    keys = [world.key() for _ in range(4)]
    await asyncio.gather(*(world.pay(key) for key in keys))
    move = await world.plan(pause_limit_s=20)
    return await world.moving.run(move.id, "ready"), keys


def saved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The states that are written to records from now on."""
    states: list[str] = []
    save = Hold.save

    async def watched(hold: Hold, **fields: object) -> None:
        await save(hold, **fields)
        if "state" in fields:
            states.append(str(fields["state"]))

    monkeypatch.setattr(Hold, "save", watched)
    return states


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Callable[[], Exception]) -> None:
    """The first call of a method raises instead."""
    method, left = getattr(owner, name), [error]

    async def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        if left:
            raise left.pop()()
        return await method(self, *arguments, **options)

    monkeypatch.setattr(owner, name, failing)


async def whole(world: World, keys: list[str], owner: str) -> None:
    assert await owners(world) == [owner]
    assert await world.owner() == owner
    assert {(await world.client.get(key)).status for key in keys} == {"succeeded"}
    assert (await world.pay(world.key())).status == "succeeded"


async def test_etcd_is_away_when_the_map_is_to_be_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target has the range then: a record that says `ready` would have the range fenced, and given back, once more."""
    move, keys = await ready(world)
    states = saved(monkeypatch)
    txn, left = Etcd.txn, [1, 1]

    async def failing(etcd: Etcd, compares: Any, puts: Any = (), *rest: Any, **options: Any) -> Any:
        if left and any(isinstance(put, Put) and put.key == MAP_KEY for put in puts):
            left.pop()
            raise EtcdUnavailable("etcdserver: no leader")
        return await txn(etcd, compares, puts, *rest, **options)

    monkeypatch.setattr(Etcd, "txn", failing)
    switched = await world.moving.run(move.id, "reversible")
    assert not left
    assert switched.state == "reversible"
    assert "ready" not in states
    await whole(world, keys, TARGET)


async def test_a_failover_between_verification_and_take_has_all_compared_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a leader sent that has lost its shard since may never have been on its quorum."""
    move, keys = await ready(world)
    states = saved(monkeypatch)
    applied, left = Stream.applied, [1]

    async def failed_over(stream: Stream, position: int, timeout_s: float) -> None:
        await applied(stream, position, timeout_s)
        if left and states and states[-1] == "drain":
            left.pop()
            assert hold
            assert hold[0].move.verified
            older = hold[0].move.verified.source_timeline - 1
            hold[0].move = replace(hold[0].move, verified=replace(hold[0].move.verified, source_timeline=older))

    hold: list[Hold] = []
    handover = Handover.run

    async def run(self: Handover) -> float:
        hold[:] = [self._hold]
        return await handover(self)

    monkeypatch.setattr(Handover, "run", run)
    monkeypatch.setattr(Stream, "applied", failed_over)
    switched = await world.moving.run(move.id, "reversible")
    assert not left
    assert states[:5] == ["fence", "drain", "switch", "ready", "verify"]
    assert move.verified
    assert switched.verified
    assert switched.verified.at_ms > move.verified.at_ms
    await whole(world, keys, TARGET)


async def test_a_process_that_stood_still_before_it_told_the_map_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have told it, and have rolled the move back since."""
    move, keys = await ready(world)
    conclude, here, go_on, left = Handover.conclude, asyncio.Event(), asyncio.Event(), [1]

    async def frozen(self: Handover, began_s: float | None) -> float:
        if left:
            left.pop()
            await self._hold._lease.revoke()  # it can't be kept alive
            here.set()
            await go_on.wait()
        return await conclude(self, began_s)

    monkeypatch.setattr(Handover, "conclude", frozen)
    first = asyncio.create_task(world.moving.run(move.id, "reversible"))
    await here.wait()
    assert (await world.moving.run(move.id, "reversible")).state == "reversible"
    assert (await world.moving.run(move.id, "rolled_back")).state == "rolled_back"
    go_on.set()
    with pytest.raises(MoveTaken):
        await first
    await whole(world, keys, SOURCE)


async def test_a_copy_back_that_was_cut_off_begins_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the source's old rows are gone: what is copied then would meet them."""
    move, keys = await ready(world)
    await world.moving.run(move.id, "reversible")
    await lose(world, TARGET, f"oncepay_back_{move.id}")
    since = [world.key() for _ in range(3)]
    await asyncio.gather(*(world.pay(key) for key in since))
    once(monkeypatch, Remover, "remove", Killed)
    with pytest.raises(Killed):
        await world.moving.run(move.id, "rolled_back")
    back = await world.moving.run(move.id, "rolled_back")
    assert back.state == "rolled_back"
    await whole(world, [*keys, *since], SOURCE)
    assert await world.left_over(move) == []


async def test_what_remembers_changes_has_lost_its_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range may be ready for days: then all is compared once more."""
    move, keys = await ready(world)
    states = saved(monkeypatch)
    slot, name = Stream.slot, f"oncepay_move_{move.id}_check"
    session = await world.session(SOURCE)
    query = "select xmin is null, restart_lsn::text from pg_replication_slots where slot_name = $1"
    before = await session.fetchrow(query, name)
    lost = before["restart_lsn"]

    async def invalid(self: Stream, of: str = "") -> Any:
        if of == name and (row := await session.fetchrow(query, name)) and row["restart_lsn"] == lost:
            raise StreamLost(f"slot {name} has lost its log")
        return await slot(self, of)

    monkeypatch.setattr(Stream, "slot", invalid)
    await world.pay(world.key())  # so that a new slot begins later
    try:
        switched = await world.moving.run(move.id, "reversible")
    finally:
        await session.close()
    assert switched.state == "reversible"
    assert states[0] == "verify"
    await whole(world, keys, TARGET)


async def test_a_copy_whose_process_stands_still_is_taken_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session waits for rows, and holds what every transaction of a move holds."""
    await world.pay(world.key())
    move = await world.plan()
    once(monkeypatch, Journey, "_verify", Killed)
    with pytest.raises(Killed):
        await world.moving.run(move.id, "ready")
    found, _ = await world.moving.records.get(move.id)
    session = await world.session(TARGET)
    try:
        await session.execute("select set_config('application_name', $1, false)", f"oncepay_copy_{move.id}")
        transaction = session.transaction()
        await transaction.start()
        epoch = await session.fetchval("select epoch from oncepay.moves where id = $1", move.id)
        await session.fetchval("select oncepay.assert_move($1, $2)", move.id, epoch)
        async with asyncio.timeout(30):
            assert (await world.moving.run(move.id, "ready")).state == "ready"
        assert session.is_closed() or await closed(session)
    finally:
        session.terminate()
    assert found.state == "verify"


async def closed(session: Any) -> bool:
    try:
        await session.fetchval("select 1")
    except Exception:
        return True
    return False


@pytest.mark.parametrize("goal", ["aborted", "reversible", "ready"])
async def test_a_record_from_before_the_switch_loses_nothing(world: World, goal: Goal) -> None:
    """A restored etcd knows a move as it was: the target has the range since, and the stream back is all that leads home."""
    move, keys = await ready(world)
    if goal == "ready":
        move = replace(move, state="verify")
    switched = await world.moving.run(move.id, "reversible")
    since = [world.key() for _ in range(2)]
    await asyncio.gather(*(world.pay(key) for key in since))
    await world.moving.records.change(move.id, state=move.state, goal=move.goal, verified=move.verified, drain_lsn="")
    streams = await world.left_over(move)

    with pytest.raises(MoveStopped, match="the switch was through"):
        await world.moving.run(move.id, goal)
    found, _ = await world.moving.records.get(move.id)
    assert (found.state, found.goal) == ("reversible", "reversible")
    assert await world.left_over(move) == streams
    await whole(world, [*keys, *since], TARGET)
    assert (await world.moving.run(move.id, "rolled_back")).state == "rolled_back"
    await whole(world, [*keys, *since], SOURCE)
    assert switched.state == "reversible"


@pytest.mark.parametrize("error", [Killed, ShardUnavailable])
async def test_a_switch_that_was_cut_off_at_its_end_leaves_no_stream(
    world: World, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The record says `reversible` then, for days: a slot that nobody reads would keep the source's log all the while."""
    move, keys = await ready(world)
    once(monkeypatch, Stream, "drop", error)
    if error is Killed:
        with pytest.raises(Killed):
            await world.moving.run(move.id, "reversible")
        found, _ = await world.moving.records.get(move.id)
        assert found.state == "reversible"
    assert (await world.moving.run(move.id, "reversible")).state == "reversible"
    assert [each for each in await world.left_over(move) if "oncepay_move_" in each] == []
    assert f"{SOURCE}: oncepay_back_{move.id}" in await world.left_over(move)
    await whole(world, keys, TARGET)


@pytest.mark.parametrize("goal", ["rolled_back", "finished"])
async def test_a_record_from_before_the_rollback_loses_nothing(world: World, goal: Goal) -> None:
    """A restored etcd knows a move as it was: the source has the range back since, and nothing of it must go there."""
    move, keys = await ready(world)
    switched = await world.moving.run(move.id, "reversible")
    await world.moving.run(move.id, "rolled_back")
    await world.moving.records.change(move.id, state="reversible", goal="reversible", back=False, verified=switched.verified)
    if goal == "finished":
        with pytest.raises(MoveStopped, match=f"the range is on {SOURCE}"):
            await world.moving.run(move.id, goal)
    else:
        await world.moving.run(move.id, goal)
    found, _ = await world.moving.records.get(move.id)
    assert (found.state, found.goal) == ("rolled_back", "rolled_back")
    assert await world.left_over(move) == []
    assert not any((await world.rows(TARGET)).values())
    await whole(world, keys, SOURCE)


def test_a_check_slot_has_a_name_of_its_own() -> None:
    """The tests above count on it."""
    stream = Stream("oncepay_move_m1", "m1", 1, None, None, 0, 1)  # type: ignore[arg-type]
    assert Changes(stream, ()).slot == "oncepay_move_m1_check"
