"""Undoing whatever a fault left that was killed before it could undo itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypedDict

import psutil

from deploy.local.cluster import Cluster
from deploy.local.parts import node_names
from deploy.local.ports import NODES_PER_SHARD
from deploy.local.supervisor import SupervisorAway
from deploy.node import SMALL_DISK_FILE


class Mended(TypedDict):
    """How many processes stood still, and which weren't running."""

    thawed: int
    started: list[str]


class Wanting(Mended):
    """Also the nodes whose network would be joined again, whether it is cut or not, and those that would forget a small disk."""

    joins: list[str]
    disks: list[str]


def _frozen(cluster: Cluster) -> list[psutil.Process]:
    """The cluster's processes that stand still."""
    found = []
    for pid in cluster.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_STOPPED:
                found.append(process)
    return found


def _small_disks(cluster: Cluster) -> list[Path]:
    return sorted(cluster.layout.nodes.glob(f"*/{SMALL_DISK_FILE}"))


def mend(cluster: Cluster) -> Mended:
    """Thaw, start, join networks that were cut, and forget small disks: a node's own data come back when it is next started.

    Raises NotRunning.
    """
    thawed = 0
    for process in _frozen(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
            thawed += 1
    memory, network = cluster.layout.memory(), cluster.network
    if memory is not None and network is not None:
        for shard in memory.numbers.values():
            for node in range(NODES_PER_SHARD):
                network.join(shard, node)
    for marker in _small_disks(cluster):
        marker.unlink()
    supervisor = cluster.supervisor()
    stopped = [name for name, state in supervisor.states().items() if state.pid == 0]
    supervisor.start(stopped)
    return {"thawed": thawed, "started": stopped}


def would_mend(cluster: Cluster) -> Wanting:
    """What `mend` would do. A supervisor that stands still can't say what it would start. Raises NotRunning."""
    supervisor, memory = cluster.supervisor(), cluster.layout.memory()
    joins = [node for shard in memory.shards for node in node_names(shard)] if memory is not None and memory.netns else []
    stopped: list[str] = []
    with contextlib.suppress(SupervisorAway):
        stopped = [name for name, state in supervisor.states().items() if state.pid == 0]
    disks = [marker.parent.name for marker in _small_disks(cluster)]
    return {"thawed": len(_frozen(cluster)), "started": stopped, "joins": joins, "disks": disks}
