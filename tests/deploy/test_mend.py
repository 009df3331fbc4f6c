"""`oncepay chaos heal`: nodes that were cut off are joined, whatever the numbers of their shards are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

from deploy.local.faults.mend import mend
from deploy.local.layout import Memory


def test_the_nodes_of_all_shards_are_joined() -> None:
    memory = Memory(9000, ("s0", "s1", "s2"), ("nodes",), netns=True).without_shard("s1")
    network, supervisor = Mock(), Mock()
    supervisor.states.return_value = {}
    cluster: Any = SimpleNamespace(
        layout=SimpleNamespace(memory=lambda: memory, nodes=Path("/nowhere")),
        network=network, pids=list, supervisor=lambda: supervisor,
    )  # fmt: skip
    mend(cluster)
    assert network.join.mock_calls == [call(number, node) for number in (0, 2) for node in range(3)]
