"""What a fault needs hands for: looking at a shard, freezing and killing its processes, keeping them down, and mending that."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import psutil

from deploy.local.cluster import Cluster, Hooks
from deploy.local.errors import ClusterError
from deploy.local.etcd import EtcdAway, Gateway
from deploy.local.health import NodeState, Probe, at_once, probe_patroni
from deploy.local.network import Network, Way
from deploy.local.parts import node_names
from deploy.patroni import FEED_SLOT

LOOK_S = 0.1
LEADER_S = 40.0
DOWN_S = 40.0
CALL_S = 10.0


class FaultFailed(ClusterError):
    """A fault can't be made here, or what should follow from it didn't."""

    slug = "fault-failed"


class View(NamedTuple):
    """A shard at one moment: the leader and the voters that etcd names, and what each node's Patroni says."""

    leader: str | None
    voters: tuple[str, ...]
    nodes: dict[str, NodeState]

    def is_whole(self, names: Sequence[str]) -> bool:
        """Whether the leader leads, and all others stream from it, count for its quorum and may be elected."""
        leader = self.nodes.get(self.leader or "")
        if leader is None or leader.role != "primary" or not leader.running:
            return False
        others = set(names) - {self.leader}
        if set(leader.quorum_standbys) != others or set(self.voters) != others:
            return False
        followers = [self.nodes[name] for name in others if name in self.nodes]
        return len(followers) == len(others) and all(
            node.running and node.streaming and node.timeline == leader.timeline for node in followers
        )


class Hands:
    """One shard of a running local cluster, and the whole of it where a fault is wider."""

    def __init__(self, cluster: Cluster, shard: str, hooks: Hooks | None = None) -> None:
        self.cluster = cluster
        self.shard = shard
        self.hooks = hooks
        memory = cluster.layout.memory()
        if memory is None or shard not in memory.shards:
            raise FaultFailed(f"there is no shard {shard} in {cluster.home}")
        self._number = memory.numbers[shard]
        self.names = node_names(shard)
        self._settings = cluster.settings
        self._ports = cluster.ports
        self._hosts = [cluster.node_host(shard, name) for name in self.names]
        self._prefix = f"{self._settings.etcd.prefix}/patroni/{shard}"

    # Looking

    def leader_in_etcd(self) -> str | None:
        """The leader as etcd names it. Raises EtcdAway."""
        return Gateway(self._settings.etcd.endpoints).get(f"{self._prefix}/leader")

    def make_leader_in_etcd(self, node: str) -> None:
        """Write that the node owns the leader's lease, without an end, while no node runs. Raises EtcdAway."""
        Gateway(self._settings.etcd.endpoints).put(f"{self._prefix}/leader", node)

    def view(self) -> View:
        """The shard now. Without etcd there is neither leader nor voter in it."""
        gateway = Gateway(self._settings.etcd.endpoints)
        leader, voters = None, ()
        with contextlib.suppress(EtcdAway):
            leader = gateway.get(f"{self._prefix}/leader")
            text = gateway.get(f"{self._prefix}/sync")
            standbys = json.loads(text).get("sync_standby") if text else None
            voters = tuple(standbys.split(",")) if standbys else ()
        found = dict(zip(self.names, at_once(self._probe, self.names), strict=True))
        return View(leader, voters, {name: probe.node for name, probe in found.items() if probe.node is not None})

    def _probe(self, node: str) -> Probe:
        number = self.names.index(node)
        return probe_patroni(self._ports.patroni(self._number, number), self.host(node))

    def host(self, node: str) -> str:
        """The node's address."""
        return self._hosts[self.names.index(node)]

    def leader(self, within_s: float = LEADER_S) -> str:
        """The leader, as soon as etcd names one. Raises FaultFailed."""
        found: list[str] = []

        def is_there() -> bool:
            with contextlib.suppress(EtcdAway):
                found[:] = [name] if (name := self.leader_in_etcd()) else []
            return bool(found)

        self.until(is_there, f"shard {self.shard} has a leader", within_s)
        return found[0]

    def another_leads(self, than: str) -> bool:
        """Whether etcd names another leader, and that one has been promoted."""
        with contextlib.suppress(EtcdAway):
            now = self.leader_in_etcd()
            if now not in (None, than):
                probe = self._probe(str(now))
                return probe.node is not None and probe.node.role == "primary" and probe.node.running
        return False

    def standbys(self) -> list[str]:
        """All nodes but the leader."""
        leader = self.leader()
        return [name for name in self.names if name != leader]

    def is_whole(self) -> bool:
        """Whether this shard is whole, every process of the cluster does its work, and the feed is read."""
        view = self.view()
        return view.is_whole(self.names) and self.cluster.status().healthy and self._feeds(str(view.leader))

    def _feeds(self, leader: str) -> bool:
        """Whether the worker reads the leader's slot, where there is a worker."""
        import psycopg2

        if not any(each.startswith(f"worker-{self.shard}") for each in self.cluster.supervisor().states()):
            return True
        with contextlib.suppress(psycopg2.Error):
            return bool(self.query(leader, "select 1 from pg_replication_slots where slot_name = %s and active", FEED_SLOT))
        return False

    def until(self, check: Callable[[], bool], what: str, within_s: float, look_s: float = LOOK_S) -> None:
        """Return when `check` holds; nobody tells of it. Raises FaultFailed."""
        deadline_s = time.monotonic() + within_s
        while not check():
            if time.monotonic() > deadline_s:
                raise FaultFailed(f"after {within_s:g} s still not: {what}")
            time.sleep(look_s)

    def cut(self, node: str, way: Way) -> None:
        """Cut the node's network. Raises FaultFailed where nodes have none of their own."""
        self._network().cut(self._number, self.names.index(node), way)

    def join(self, node: str) -> None:
        """Take back every cut of the node's network."""
        self._network().join(self._number, self.names.index(node))

    def _network(self) -> Network:
        network = self.cluster.network
        if network is None:
            raise FaultFailed("nodes can be cut off only where each has a network namespace: start with `oncepay up --netns`")
        return network

    # Processes

    def patroni_pid(self, node: str) -> int:
        """Raises FaultFailed when it doesn't run."""
        try:
            pid = int((self.cluster.layout.node(node) / "patroni.pid").read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise FaultFailed(f"{node} has no Patroni") from error
        if not psutil.pid_exists(pid):
            raise FaultFailed(f"{node} has no Patroni now")
        return pid

    def postmaster_pid(self, node: str) -> int:
        """Raises FaultFailed when there is none."""
        pid = self.cluster.postmaster_pid(node) or next(
            (each.pid for each in self.tree(f"node-{node}") if _is_postmaster(each)), None
        )
        if pid is None:
            raise FaultFailed(f"{node} has no Postgres now")
        return pid

    def tree(self, program: str) -> list[psutil.Process]:
        """A supervised process and all below it, parents first: of a node its wrapper, Patroni and all of Postgres."""
        state = self.cluster.supervisor().states().get(program)
        if state is None:
            raise FaultFailed(f"there is no process {program}")
        try:
            head = psutil.Process(state.pid) if state.pid else None
            return [head, *head.children(recursive=True)] if head is not None else []
        except psutil.NoSuchProcess:
            return []

    def freeze(self, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
        """Stop them as they stand; those that were there still."""
        return [process for process in processes if _send(process, signal.SIGSTOP)]

    def thaw(self, processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            _send(process, signal.SIGCONT)

    def take_down(self, programs: Sequence[str]) -> None:
        """Kill them with all that is below them, at once, and keep them down, as machines that lost their power."""
        victims = [process for program in programs for process in self.tree(program)]
        self.freeze(victims)  # so that none has time for a last word
        self.cluster.supervisor().stop(programs, wait=False)
        for process in victims:
            _send(process, signal.SIGKILL)
        gone, alive = psutil.wait_procs(victims, timeout=CALL_S)
        if alive:
            raise FaultFailed(f"some of {', '.join(programs)} can't be killed: {alive}")
        del gone

    def bring_up(self, programs: Sequence[str]) -> None:
        """Start what was taken down."""
        supervisor = self.cluster.supervisor()

        def are_down() -> bool:
            states = supervisor.states()
            return all(states[name].pid == 0 and states[name].state != "STOPPING" for name in programs)

        self.until(are_down, f"{', '.join(programs)} are down", DOWN_S)
        supervisor.start(programs)

    # Asking

    def patroni(self, node: str, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """A call of the node's Patroni: status and text of its answer. Raises OSError."""
        credential = self.cluster.patroni_rest_credential()
        token = b64encode(f"{credential.username}:{credential.password}".encode()).decode()
        port = self._ports.patroni(self._number, self.names.index(node))
        connection = http.client.HTTPConnection(self.host(node), port, timeout=60)
        try:
            headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body or {}), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer of {node}'s Patroni: {error}") from error
        finally:
            connection.close()

    def query(self, node: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Rows of a query of the superuser on that node. Raises psycopg2.Error."""
        import psycopg2

        postgres = self._settings.postgres
        connection = psycopg2.connect(
            host=self.host(node),
            port=self._ports.postgres(self._number, self.names.index(node)),
            user=postgres.superuser,
            password=postgres.superuser_password,
            dbname=postgres.database,
            connect_timeout=int(CALL_S),
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, arguments)
                return list(cursor.fetchall()) if cursor.description is not None else []
        finally:
            connection.close()


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _is_postmaster(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return bool(command) and command[0].endswith("/postgres") and "-D" in command
    return False
