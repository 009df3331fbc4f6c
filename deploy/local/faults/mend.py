"""Undoing whatever a fault left that was killed before it could undo itself."""

from __future__ import annotations

import contextlib
from typing import TypedDict

import psutil

from deploy.local.cluster import Cluster
from deploy.local.ports import NODES_PER_SHARD
from deploy.node import SMALL_DISK_FILE


class Mended(TypedDict):
    """How many processes stood still, and which weren't running."""

    thawed: int
    started: list[str]


def mend(cluster: Cluster) -> Mended:
    """Thaw, start, join networks that were cut, and forget small disks: a node's own data come back when it is next started.

    Raises NotRunning.
    """
    thawed = 0
    for pid in cluster.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            thawed += process.status() == psutil.STATUS_STOPPED
            process.resume()
    memory, network = cluster.layout.memory(), cluster.network
    if memory is not None and network is not None:
        for shard in memory.numbers.values():
            for node in range(NODES_PER_SHARD):
                network.join(shard, node)
    for marker in cluster.layout.nodes.glob(f"*/{SMALL_DISK_FILE}"):
        marker.unlink()
    supervisor = cluster.supervisor()
    stopped = [name for name, state in supervisor.states().items() if state.pid == 0]
    supervisor.start(stopped)
    return {"thawed": thawed, "started": stopped}
