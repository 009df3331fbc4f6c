"""Each fault of a shard under payments: none acknowledged is lost or doubled, nobody is answered backwards, writes go on.

The buyers are outside (`loadtest.recorder`). The bounds are what docs/durability.md promises; a busy machine gets twice that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import asyncpg
import pytest

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.faults import FAULTS, Fault, Hands, inflict
from loadtest.recorder import Recorder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

SHARD = "s0"
SLACK = 2.0
AROUND = 30
"""Payments before and after."""
ONCE = "select key, count(*) from oncepay.payments where key = any ($1) group by key"
BOOKED_ONCE = "select key, count(*) from oncepay.entries where key = any ($1) and kind = 'payment' group by key"


class Seen(NamedTuple):
    """What the buyers saw of a fault."""

    fault: Fault
    recorder: Recorder
    times: dict[str, float]

    def gap_s(self) -> float:
        return self.recorder.gap_s(self.times["begun"])

    def slowest_s(self) -> float:
        return self.recorder.slowest_s(self.times["begun"])


Suffer = Callable[[str], Awaitable[Seen]]


@pytest.fixture
def suffer(cluster: Cluster) -> Suffer:
    """Breaks something under payments, and checks all that holds for every fault."""

    async def run(name: str) -> Seen:
        hands = Hands(cluster, SHARD, hooks(cluster))
        await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", 120, 0.5)
        status = await asyncio.to_thread(cluster.status)
        ranges = next(shard.ranges for shard in status.shards if shard.name == SHARD)
        fault = FAULTS[name](hands)
        async with Recorder(status.urls["router"], status.api_key, ranges) as recorder:
            await recorder.more(AROUND)
            times = await asyncio.to_thread(inflict, fault)
            await recorder.more(AROUND)
            await recorder.stop()
            assert await recorder.check() == []
        await assert_once(cluster, list(recorder.told))
        return Seen(fault, recorder, times)

    return run


async def assert_once(cluster: Cluster, keys: list[str]) -> None:
    """Each is one row of the shard, and was booked once."""
    status = await asyncio.to_thread(cluster.status)
    connection = await asyncpg.connect(next(shard.dsn for shard in status.shards if shard.name == SHARD))
    try:
        for query in (ONCE, BOOKED_ONCE):
            rows = await connection.fetch(query, keys)
            assert {row["key"]: row["count"] for row in rows} == dict.fromkeys(keys, 1)
    finally:
        await connection.close()


async def test_the_leaders_postgres_is_killed(suffer: Suffer) -> None:
    """The quick sample of these; the others take longer."""
    seen = await suffer("kill-postgres")
    assert seen.gap_s() < 8.0 * SLACK


@pytest.mark.faults
@pytest.mark.parametrize("name", ["kill-patroni", "freeze-patroni", "freeze-patroni-slow-voter"])
async def test_the_leaders_patroni_is_gone_and_its_postgres_dies_in_time(suffer: Suffer, name: str) -> None:
    """That it lives on when another leads is a failure of the fault itself."""
    seen = await suffer(name)
    assert not seen.fault.postmaster.is_running()  # type: ignore[attr-defined]
    assert seen.gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_the_whole_node_is_killed(suffer: Suffer) -> None:
    assert (await suffer("kill-node")).gap_s() < 25.0 * SLACK


@pytest.mark.faults
async def test_the_leader_freezes_and_thaws_when_another_leads(suffer: Suffer) -> None:
    assert (await suffer("freeze-node")).gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_one_standby_is_lost_and_writes_go_on(suffer: Suffer) -> None:
    seen = await suffer("lose-standby")
    assert seen.recorder.refused(seen.times["begun"]) == 0
    assert max(seen.gap_s(), seen.slowest_s()) < 1.0 * SLACK


@pytest.mark.faults
async def test_with_both_standbys_frozen_nothing_is_acknowledged(suffer: Suffer) -> None:
    seen = await suffer("freeze-standbys")
    first_s, last_s = seen.times["broken"] + 0.5, seen.times["undone"] - 0.1
    told = [answer for answer in seen.recorder.answers if answer.told and first_s < answer.at_s < last_s]
    assert last_s - first_s > 5
    assert told == []


@pytest.mark.faults
async def test_both_standbys_freeze_and_then_the_leader_is_killed(suffer: Suffer) -> None:
    seen = await suffer("freeze-standbys-kill-leader")
    assert seen.fault.commits_waited  # type: ignore[attr-defined]
    assert seen.gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_a_planned_switchover_is_only_slower(suffer: Suffer) -> None:
    seen = await suffer("switchover")
    assert seen.recorder.refused(seen.times["begun"]) == 0
    assert seen.slowest_s() < 8.0 * SLACK


@pytest.mark.faults
async def test_one_member_of_etcd_is_down_and_nothing_happens(suffer: Suffer) -> None:
    seen = await suffer("kill-etcd-member")
    assert seen.recorder.refused(seen.times["begun"]) == 0
    assert seen.gap_s() < 2.0 * SLACK


@pytest.mark.faults
async def test_all_of_etcd_is_down_for_longer_than_a_lease_and_leaders_lead_on(suffer: Suffer) -> None:
    seen = await suffer("kill-etcd")
    assert seen.times["undone"] - seen.times["broken"] > 20
    assert seen.recorder.refused(seen.times["begun"]) == 0
    assert seen.gap_s() < 8.0 * SLACK


@pytest.mark.faults
async def test_the_leaders_disk_is_full(suffer: Suffer) -> None:
    """Patroni doesn't see that; the node's wrapper does, and gives way."""
    assert (await suffer("full-disk")).gap_s() < 30.0 * SLACK


@pytest.mark.faults
@pytest.mark.parametrize("name", ["corrupt-page", "torn-wal"])
async def test_a_standbys_files_are_damaged_and_nobody_notices(suffer: Suffer, name: str) -> None:
    seen = await suffer(name)
    assert seen.recorder.refused(seen.times["begun"]) == 0
    assert seen.gap_s() < 2.0 * SLACK


@pytest.mark.faults
async def test_everything_is_restarted_at_once(suffer: Suffer) -> None:
    assert (await suffer("restart-everything")).gap_s() < 120
