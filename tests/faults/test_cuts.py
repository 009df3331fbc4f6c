"""The leader cut off by its network, both ways and one way: each node has a network namespace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.network import why_not
from deploy.local.ports import free_base
from tests.faults.course import SLACK, suffer
from tests.needs import needs

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.timeout(420),
    needs(not why_not(), "root, ip and nsenter"),
]


@pytest.fixture(scope="module")
def apart(cluster_folder: Path) -> Iterator[Cluster]:
    """A cluster with one shard, whose nodes have networks of their own."""
    made = Cluster(cluster_folder / "apart", free_base(), ["s0"], netns=True)
    made.up(hooks=hooks(made))
    try:
        yield made
    finally:
        made.down(purge=True)


@pytest.mark.parametrize("name", ["cut-leader", "cut-leader-out", "cut-leader-in"])
async def test_the_leader_is_cut_off_and_another_leads(apart: Cluster, name: str) -> None:
    assert (await suffer(apart, name)).gap_s() < 30.0 * SLACK
