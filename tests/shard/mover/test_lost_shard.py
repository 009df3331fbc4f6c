"""A move one of whose shards is lost for good: it ends without that one, and the other one keeps what it owns."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.reshard import reshard
from deploy import members
from deploy.members import ShardMembers, Sync
from oncepay.errors import ShardUnavailable
from oncepay.moves import Goal, Move, State
from shard.mover.errors import MoveRefused
from shard.mover.lost import end_without
from shard.mover.side import Side
from tests.shard.mover.conftest import SOURCE, TARGET, World
from tests.shard.mover.test_cut_off import ready, whole

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(120)]


async def lose(world: World, monkeypatch: pytest.MonkeyPatch, move: Move, goal: Goal, lost: str) -> list[str]:
    """End the move while nothing can be asked of `lost`; what is left of it on the other shard. Then it is there again."""
    opened = Side.open

    async def gone(side: Side, *arguments: Any, **options: Any) -> Any:
        if side.shard == lost:
            raise ShardUnavailable(f"shard {lost} is lost")
        return await opened(side, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Side, "open", gone)
        ended = await end_without(world.moving, move.id, goal, lost)
    assert ended.state == goal
    left = [each for each in await world.left_over(move) if not each.startswith(lost)]
    # What the lost shard has still goes for the sake of other tests.
    await world.moving.records.change(move.id, state="reversible" if goal == "finished" else "ready")
    await world.moving.run(move.id, goal)
    return left


@pytest.mark.parametrize("lost", [SOURCE, TARGET])
async def test_before_the_switch(world: World, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    move, keys = await ready(world)
    with pytest.raises(MoveRefused, match=f"abort {move.id} --lost {lost}"):
        await end_without(world.moving, move.id, "finished", lost)
    with pytest.raises(MoveRefused, match="takes no part"):
        await end_without(world.moving, move.id, "aborted", "s9")
    assert await lose(world, monkeypatch, move, "aborted", lost) == []
    assert not any((await world.rows(TARGET)).values())
    await whole(world, keys, SOURCE)


@pytest.mark.parametrize("lost", [SOURCE, TARGET])
async def test_after_the_switch(world: World, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    move, keys = await ready(world)
    await world.moving.run(move.id, "reversible")
    with pytest.raises(MoveRefused, match=f"finish {move.id} --lost {lost}"):
        await end_without(world.moving, move.id, "aborted", lost)
    assert await lose(world, monkeypatch, move, "finished", lost) == []
    assert not any((await world.rows(SOURCE)).values())
    await whole(world, keys, TARGET)


async def cut_off(world: World, move: Move, state: State, *, taken: bool) -> None:
    """The operator process ended within the hand-over, right after the fence or the take."""
    source, target = await world.session(SOURCE), await world.session(TARGET)
    of = move.id, await source.fetchval("select epoch from oncepay.moves where id = $1", move.id), move.first, move.last
    try:
        await world.moving.records.change(move.id, state=state, map_version=(await world.map()).version + 1)
        await source.fetchval("select oncepay.fence_range($1, $2, $3, $4, 5000)", *of)
        if taken:
            await target.fetchval("select oncepay.take_range($1, $2, $3, $4, 1, null, null)", *of)
    finally:
        await source.close()
        await target.close()


async def test_a_giver_has_again_what_it_had_fenced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    move, keys = await ready(world)
    await cut_off(world, move, "drain", taken=False)
    assert await lose(world, monkeypatch, move, "aborted", TARGET) == []
    await whole(world, keys, SOURCE)


async def test_a_taker_that_has_the_range_is_told_to_the_map(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    move, keys = await ready(world)
    await cut_off(world, move, "switch", taken=True)
    assert await lose(world, monkeypatch, move, "finished", SOURCE) == []
    await whole(world, keys, TARGET)


async def test_the_command_believes_etcd(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    move = await world.plan()

    async def run(*arguments: str, code: int) -> str:
        env = {"ONCEPAY_HOME": str(world.cluster.home)}
        done = await asyncio.to_thread(CliRunner().invoke, reshard, [*arguments, move.id, "--lost", TARGET], env=env)
        assert done.exit_code == code, done.output
        return done.output

    assert "is in touch with etcd" in await run("abort", code=WRONG)

    async def nobody(_: object, shard: str) -> ShardMembers:
        return ShardMembers(shard, None, (), Sync(), initialized=True)

    monkeypatch.setattr(members, "read", nobody)
    assert f"abort {move.id} --lost {TARGET}" in await run("finish", "--dry-run", code=WRONG)
    assert "would bring" in await run("abort", "--dry-run", code=0)
    assert "aborted" in await run("abort", code=0)
    assert (await world.moving.records.get(move.id))[0].state == "aborted"
