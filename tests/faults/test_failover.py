"""Each fault of a shard under payments: none acknowledged is lost or doubled, nobody is answered backwards, writes go on.

The buyers are outside (`loadtest.recorder`). The bounds are what docs/durability.md promises.
"""

from __future__ import annotations

import pytest

from deploy.local import Cluster
from shard.store.store import HOLD_S
from tests.faults.course import SLACK, suffer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]


@pytest.mark.faults
async def test_the_leaders_postgres_is_killed(cluster: Cluster) -> None:
    """The quick sample of these; the others take longer."""
    seen = await suffer(cluster, "kill-postgres")
    assert seen.gap_s() < 8.0 * SLACK


@pytest.mark.faults
@pytest.mark.parametrize("name", ["kill-patroni", "freeze-patroni", "freeze-patroni-slow-voter"])
async def test_the_leaders_patroni_is_gone_and_its_postgres_dies_in_time(cluster: Cluster, name: str) -> None:
    """That it lives on when another leads is a failure of the fault itself."""
    seen = await suffer(cluster, name)
    assert not seen.fault.postmaster.is_running()  # type: ignore[attr-defined]
    assert seen.gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_the_whole_node_is_killed(cluster: Cluster) -> None:
    assert (await suffer(cluster, "kill-node")).gap_s() < 25.0 * SLACK


@pytest.mark.faults
async def test_the_leader_freezes_and_thaws_when_another_leads(cluster: Cluster) -> None:
    assert (await suffer(cluster, "freeze-node")).gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_one_standby_is_lost_and_writes_go_on(cluster: Cluster) -> None:
    seen = await suffer(cluster, "lose-standby")
    assert seen.refused() == 0
    assert max(seen.gap_s(), seen.slowest_s()) < 1.0 * SLACK


@pytest.mark.faults
async def test_with_both_standbys_frozen_nothing_is_acknowledged(cluster: Cluster) -> None:
    seen = await suffer(cluster, "freeze-standbys")
    first_s, last_s = seen.times["broken"] + 0.5, seen.times["undone"] - 0.1
    told = [answer for answer in seen.recorder.answers if answer.told and first_s < answer.at_s < last_s]
    assert last_s - first_s > 5
    assert told == []


@pytest.mark.faults
async def test_who_is_held_for_too_long_is_told_when_to_come_again(cluster: Cluster) -> None:
    """503 with `Retry-After` at the hold's bound; any other refusal would be a violation. Nobody waits for longer.

    Twice the bound: buyers that wait for a settlement when it begins make their next call only when that was held, too.
    """
    seen = await suffer(cluster, "freeze-standbys", hold_s=2 * HOLD_S + 10)
    refused = [answer for answer in seen.recorder.since(seen.times["begun"]) if not answer.told]
    assert {answer.status for answer in refused} == {503}
    assert all(answer.took_s > HOLD_S - 5 for answer in refused)
    assert seen.slowest_s() < HOLD_S + 6 * SLACK


@pytest.mark.faults
async def test_both_standbys_freeze_and_then_the_leader_is_killed(cluster: Cluster) -> None:
    seen = await suffer(cluster, "freeze-standbys-kill-leader")
    assert seen.fault.commits_waited  # type: ignore[attr-defined]
    assert seen.gap_s() < 30.0 * SLACK


@pytest.mark.faults
async def test_a_planned_switchover_is_only_slower(cluster: Cluster) -> None:
    seen = await suffer(cluster, "switchover")
    assert seen.refused() == 0
    assert seen.slowest_s() < 8.0 * SLACK


@pytest.mark.faults
async def test_one_member_of_etcd_is_down_and_nothing_happens(cluster: Cluster) -> None:
    seen = await suffer(cluster, "kill-etcd-member")
    assert seen.refused() == 0
    assert seen.gap_s() < 2.0 * SLACK


@pytest.mark.faults
async def test_all_of_etcd_is_down_for_longer_than_a_lease_and_leaders_lead_on(cluster: Cluster) -> None:
    seen = await suffer(cluster, "kill-etcd")
    assert seen.times["undone"] - seen.times["broken"] > 20
    assert seen.refused() == 0
    assert seen.gap_s() < 8.0 * SLACK


@pytest.mark.faults
async def test_the_leaders_disk_is_full(cluster: Cluster) -> None:
    """Patroni doesn't see that; the node's wrapper does, and gives way."""
    assert (await suffer(cluster, "full-disk")).gap_s() < 30.0 * SLACK


@pytest.mark.faults
@pytest.mark.parametrize("name", ["corrupt-page", "torn-wal"])
async def test_a_standbys_files_are_damaged_and_nobody_notices(cluster: Cluster, name: str) -> None:
    seen = await suffer(cluster, name)
    assert seen.refused() == 0
    assert seen.gap_s() < 2.0 * SLACK


@pytest.mark.faults
async def test_everything_is_restarted_at_once(cluster: Cluster) -> None:
    assert (await suffer(cluster, "restart-everything")).gap_s() < 120
