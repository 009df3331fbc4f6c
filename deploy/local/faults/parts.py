"""Faults of what is not a shard: etcd's members and the services."""

from __future__ import annotations

import http.client
import json
import os
import signal

from deploy.local.faults.base import Fault
from deploy.local.faults.hands import FaultFailed, Hands
from deploy.patroni import TTL_S


def etcd_leader(endpoints: dict[str, str]) -> str:
    """The name of the member that leads, of `{name: endpoint}`; the first one when none says so."""
    for name, endpoint in endpoints.items():
        connection = http.client.HTTPConnection(endpoint, timeout=2)
        try:
            connection.request("POST", "/v3/maintenance/status", "{}", {"Content-Type": "application/json"})
            status = json.loads(connection.getresponse().read())
            if status.get("leader") == status["header"]["member_id"]:
                return name
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            continue
        finally:
            connection.close()
    return next(iter(endpoints))


class _EtcdDown(Fault):
    def members(self) -> list[str]:
        raise NotImplementedError

    def begin(self) -> None:
        self._down = self.members()
        self.target = ", ".join(self._down)
        self.hands.take_down(self._down)

    def undo(self) -> None:
        if self.target:
            self.hands.bring_up(self._down)


class KillEtcdMember(_EtcdDown):
    name = "kill-etcd-member"
    does = "kills the member of etcd that leads it, and keeps it down: nothing happens to payments"
    undoes = "starts the member again"
    hold_s = 10.0
    gap_s = 2.0
    slowest_s = 4.0

    def members(self) -> list[str]:
        status = self.hands.cluster.status()
        return [etcd_leader({member.name: f"127.0.0.1:{member.port}" for member in status.etcd if member.pid})]


class KillEtcd(_EtcdDown):
    name = "kill-etcd"
    does = f"kills all of etcd, for longer than a leader's lease ({TTL_S} s): leaders stay leaders while all their members answer"
    undoes = "starts etcd again"
    hold_s = TTL_S + 10.0
    gap_s = 8.0

    def members(self) -> list[str]:
        return [member.name for member in self.hands.cluster.status().etcd]


class _KillProcess(Fault):
    """SIGKILL to one supervised process."""

    prefix = ""

    def begin(self) -> None:
        prefix = self.prefix_of(self.hands)
        running = [each for each in self.hands.cluster.status().processes if each.pid]
        found = [each for each in running if each.name == prefix] or [each for each in running if each.name.startswith(prefix)]
        if not found:
            raise FaultFailed(f"there is no {self.prefix} to kill")
        self.target, pid = found[0].name, found[0].pid
        assert pid is not None
        self._pid = pid
        os.kill(pid, signal.SIGKILL)

    def prefix_of(self, hands: Hands) -> str:
        del hands
        return self.prefix

    def is_done(self) -> bool:
        return self.hands.cluster.supervisor().states()[self.target].pid not in (0, self._pid)


class KillRouter(_KillProcess):
    name = "kill-router"
    prefix = "router-"
    does = "kills one router: its connections break, and its payments are driven on by the worker"


class KillKeygen(_KillProcess):
    name = "kill-keygen"
    prefix = "keygen-"
    does = "kills one key service: the other one takes its block over"


class KillAggregator(_KillProcess):
    name = "kill-aggregator"
    prefix = "aggregator"
    does = "kills the aggregator: derived data stand still until it is back"


class KillWorker(_KillProcess):
    name = "kill-worker"
    does = "kills the shard's active worker: the feed and the polls stand still until another one is active"

    def prefix_of(self, hands: Hands) -> str:
        """The active worker's whole name; any worker's when none says that it is active."""
        own = f"worker-{hands.shard}-"
        active = f'oncepay_worker_active{{shard="{hands.shard}"}} 1'
        for process in hands.cluster.status().processes:
            if process.name.startswith(own) and process.port and active in _metrics(process.port):
                return process.name
        return own


def _metrics(port: int) -> str:
    """A process's metrics as text; empty when it doesn't answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
