"""A worker that waits for its shard's leader, and its seat meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from oncepay.errors import ShardUnavailable
from oncepay.settings import Settings
from shard.store.leader import Node
from shard.worker.errors import StandDown
from shard.worker.worker import Worker
from tests.shard.worker.harness import SHARD, OneLeader


class FakeSeat:
    """A seat that another process can take. `told`: that it is gone has come through."""

    def __init__(self) -> None:
        self.mine = True
        self.told = asyncio.Event()

    async def held(self) -> bool:
        return self.mine

    async def lost(self) -> None:
        await self.told.wait()


class FakeShards:
    """A shard whose leader is away. As with the real one, a write that waits for it goes on when it is canceled."""

    def __init__(self) -> None:
        self.leaders = OneLeader(None)
        self.taken: list[str] = []
        self.asked = asyncio.Event()

    async def start(self) -> None:
        self.asked.set()

    def batcher(self, shard: str) -> Any:
        return SimpleNamespace(take_epoch=lambda name: asyncio.shield(asyncio.create_task(self._take(name))))

    async def _take(self, name: str) -> int:
        try:
            await self.leaders.wait(SHARD, 0.2)
        except TimeoutError:
            raise ShardUnavailable("no leader") from None
        self.taken.append(name)
        return len(self.taken)


@pytest.mark.parametrize("told", [True, False])
async def test_a_worker_that_lost_its_seat_while_it_waited_for_the_leader_takes_no_epoch(told: bool) -> None:
    """It would throw the one out that has the seat now. Told of the loss or not: it looks before it takes the epoch."""
    seat, shards, none = FakeSeat(), FakeShards(), SimpleNamespace()
    settings: Any = Settings()
    parts: Any = (shards, none, none, none, none, seat, none)
    running = asyncio.create_task(Worker(SHARD, "worker-s0-1", settings, *parts).run())
    await shards.asked.wait()
    seat.mine = False
    if told:
        seat.told.set()
        await asyncio.wait([running], timeout=5)
    shards.leaders.move(Node("s0-n0", "127.0.0.1", 1))
    await asyncio.wait([running], timeout=5)
    assert shards.taken == []
    with pytest.raises(ExceptionGroup) as group:
        await running
    assert group.value.subgroup(StandDown) is not None
