"""Ending what a cluster left running when its supervisor was killed."""

from __future__ import annotations

import os
import signal

from deploy import processes
from deploy.local.layout import Layout

GRACE_S = 10.0
"""How long leftovers may take to stop by themselves before they are killed."""


def _ancestors() -> set[int]:
    """This process and those that it runs under: never to be signalled."""
    found = set()
    pid = os.getpid()
    while pid > 1 and pid not in found:
        found.add(pid)
        pid = processes.parent(pid)
    return found


def _is_data_of(home: str, directory: str) -> bool:
    """Whether it is a data directory of the cluster in `home`."""
    parts = directory.removeprefix(home + os.sep).split(os.sep)
    return directory.startswith(home + os.sep) and parts[-1] == "data" and parts[0] in ("nodes", "aggregator-db")


class Leftovers:
    """The processes of the cluster in one home; with `below` also of clusters in its sub-folders, and of deleted ones there."""

    def __init__(self, layout: Layout, *, below: bool = False) -> None:
        self._home = str(layout.home)
        self._below = below
        homes = layout.homes() if below else [layout]
        self._homes = {str(each.home) for each in homes}
        # A Postgres is told by where its data lies, so that has to be a cluster's, or gone.
        self._data = {str(each.home) for each in homes if not each.home.exists() or each.holds_cluster()}
        self._spared = _ancestors()

    def matches(self, pid: int) -> bool:
        """Whether the process belongs to the cluster."""
        if pid in self._spared:
            return False
        return self._is_marked(pid) or self._is_postgres(pid)

    def _is_marked(self, pid: int) -> bool:
        home = processes.variable(pid, processes.CLUSTER_ENV)
        if home is None or home in self._homes:
            return home is not None
        return self._below and home.startswith(self._home + os.sep) and not os.path.lexists(home)

    def _is_postgres(self, pid: int) -> bool:
        directory = processes.working_dir(pid)
        return any(_is_data_of(home, directory) for home in self._data) and processes.is_postgres_of(pid, directory)

    def find(self) -> list[int]:
        return processes.find(self.matches)

    def kill(self) -> bool:
        """Kill all of them at once; False when some can't be."""
        return processes.end(self.matches)

    def end(self) -> bool:
        """Let them stop by themselves, all but etcd, which the others need for that; then kill what is left."""
        heads = set(self._heads())
        if heads:
            processes.end(lambda pid: pid in heads and self.matches(pid), number=signal.SIGTERM, wait_s=GRACE_S)
        return self.kill()

    def _heads(self) -> list[int]:
        """Those that were started by none of the others, without etcd."""
        found = set(self.find())
        return [
            pid
            for pid in found
            if processes.parent(pid) not in found
            and not (processes.variable(pid, processes.PROCESS_ENV) or "").startswith("etcd")
        ]
