"""Bringing a cluster up: everything is started side by side, and what must come in order waits for its turn only."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, NoReturn

import msgspec

from deploy import patroni
from deploy.local import secrets, shard_map, webhooks
from deploy.local.errors import PartFailed
from deploy.local.etcd import EtcdAway, Gateway
from deploy.local.health import NodeState, Probe, at_once, probe_all, probe_http, probe_postgres
from deploy.local.layout import Layout, Memory, write_secret
from deploy.local.parts import Plan, node_names
from deploy.local.shard_map import Range
from deploy.local.status import leader_of
from deploy.local.supervisor import Supervisor, SupervisorAway

POLL_S = 0.1
PROBE_EVERY_S = 0.3
MAX_TRIES = 8
TRY_AGAIN_S = 1.0
LOG_LINES = 20
LOG_TAIL_BYTES = 16_384
MAX_STARTS = 6
"""A process that was started this often and never became healthy is given up, after some 15 s of growing pauses."""

OnLeader = Callable[[str, str, list[Range]], None]
OnAggregator = Callable[[str], None]


@dataclass(frozen=True)
class Hooks:
    """What the caller does while the cluster comes up, from threads.

    `on_leader(shard, dsn, ranges)` is called when the shard's leader takes connections, on every `up`: it makes or
    migrates the schema. `ranges` are those of the map. `on_aggregator(dsn)` likewise. Both get a superuser's DSN.
    """

    on_leader: OnLeader | None = None
    on_aggregator: OnAggregator | None = None


class Progress(NamedTuple):
    """`name` became ready `after_s` seconds after the start; `left` are not ready yet."""

    name: str
    after_s: float
    left: tuple[str, ...]


OnProgress = Callable[[Progress], None]


class Cancelled(Exception):
    """Another step failed first."""


def log_tail(layout: Layout, process: str) -> str:
    """The last lines of a process's log."""
    try:
        with open(layout.log(process), "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-LOG_LINES:])


def has_slot(dsn: str) -> bool:
    """Whether the feed's slot is there; False too when the node can't be asked."""
    import psycopg2

    try:
        connection = psycopg2.connect(dsn, connect_timeout=2)
    except psycopg2.Error:
        return False
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", (patroni.FEED_SLOT,))
            return cursor.rowcount == 1
    except psycopg2.Error:
        return False
    finally:
        connection.close()


class BringUp:
    """One run of `up`, from the started supervisor to where all is ready; or only of the shard that is `added`."""

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        hooks: Hooks,
        on_progress: OnProgress,
        timeout_s: float,
        *,
        added: str | None = None,
    ) -> None:
        self.plan = plan
        self.layout = plan.layout
        self.memory = memory
        self.hooks = hooks
        self.on_progress = on_progress
        self.shards = plan.shards if added is None else (added,)
        self.programs = [program for program in plan.programs() if added is None or program.shard == added]
        self.supervisor = Supervisor(plan.layout)
        self.started_s = time.monotonic()
        self.timeout_s = timeout_s
        # Shards whose making was cut off, if it began: never was there a leader with a database.
        self.unmade = [shard for shard in self.shards if shard not in memory.made and {"etcd", "nodes"} <= set(plan.parts)]
        self._cancel = threading.Event()
        self._lock = threading.Lock()
        self._nodes: dict[str, NodeState] = {}

    def run(self) -> None:
        """Raises PartFailed, naming the part, with the end of its log."""
        self._until(self._supervisor_answers, "supervisor")
        for shard in self.unmade:
            for node in node_names(shard):
                shutil.rmtree(self.layout.node(node) / "data", ignore_errors=True)
        steps = self._steps()
        pool = ThreadPoolExecutor(len(steps))
        futures: list[Future[None]] = [pool.submit(step) for step in steps]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # A migration whose commit finds no quorum would hold this up; it ends when its Postgres does.
            self._cancel.set()
            pool.shutdown(wait=False)
        errors = [error for future in futures if future.done() and (error := future.exception()) is not None]
        causes = [error for error in errors if not isinstance(error, Cancelled)]
        if causes:
            raise causes[0]
        self._cancel.clear()
        self._await_steadiness()

    def _steps(self) -> list[Callable[[], None]]:
        parts = self.plan.parts
        steps: list[Callable[[], None]] = [self._watch_health]
        if "etcd" in parts:
            steps.append(self._prepare_etcd)
        if "nodes" in parts:
            steps += [partial(self._prepare_shard, shard) for shard in self.shards]
        chosen = {program.part for program in self.programs}
        if "aggregator-db" in chosen:
            steps.append(self._prepare_aggregator)
        if {"stripe", "router"} <= chosen:
            steps.append(self._prepare_routers)
        if {"tipalti", "router"} <= chosen:
            steps.append(self._prepare_tipalti)
        return steps

    def _until(self, check: Callable[[], bool], process: str, poll_s: float = POLL_S) -> None:
        """Check again and again until it holds. Raises PartFailed for `process` when the time is over."""
        while not check():
            if time.monotonic() - self.started_s > self.timeout_s:
                self._fail(process, f"not ready after {self.timeout_s:g} s")
            if self._cancel.wait(poll_s):
                raise Cancelled

    def _try(self, call: Callable[[], None], process: str) -> None:
        """Call until it succeeds, for a part may restart under it; the last error is told when it never does."""
        for left in reversed(range(MAX_TRIES)):
            try:
                return call()
            except Exception as error:
                if left == 0:
                    raise PartFailed(f"{process} can't be prepared: {error!r}") from error
            if self._cancel.wait(TRY_AGAIN_S):
                raise Cancelled
        raise AssertionError("no try is left")

    def _fail(self, process: str, why: str) -> NoReturn:
        tail = log_tail(self.layout, process)
        text = f"{process} didn't come up: {why}."
        if tail:
            text += f" The end of {self.layout.log(process)}:\n{tail}"
        raise PartFailed(text)

    def _supervisor_answers(self) -> bool:
        try:
            return self.supervisor.pid() > 0
        except SupervisorAway:
            return False

    def _prepare_etcd(self) -> None:
        """The map, the shards and the API key, each unless it is there; then the nodes, which need etcd."""
        gateway = Gateway(self.plan.settings.etcd.endpoints)
        prefix = self.plan.settings.etcd.prefix

        def put() -> None:
            gateway.put_if_absent(f"{prefix}/map", shard_map.render_map(shard_map.even_ranges(self.plan.shards)))
            for shard in self.plan.shards:
                hosts = self.plan.node_hosts(shard)
                restored = shard in self.plan.restored
                record = shard_map.shard_record(self.plan.ports, self.plan.number(shard), shard, hosts, restored=restored)
                gateway.put_if_absent(f"{prefix}/shards/{shard}", record)
            digest, api_key = secrets.api_key_record(self.plan.passwords.api_key)
            gateway.put_if_absent(f"{prefix}/apikeys/{digest}", msgspec.json.encode(api_key).decode())
            for shard in self.unmade:
                gateway.delete_prefix(f"{prefix}/patroni/{shard}/")
            for shard in self.plan.shards:
                self._put_rules(gateway, shard)

        self._until(gateway.is_decided, "etcd-1")
        self._try(put, "etcd-1")
        nodes = {program.name: program.shard for program in self.programs if program.part == "nodes"}
        first = {f"node-{node}": node.rpartition("-")[0] for node in self.plan.first_nodes}
        self.supervisor.start(name for name, shard in nodes.items() if name in first or shard not in first.values())
        for name, shard in first.items():
            self._until(partial(self._leads, shard, name), name)
        self.supervisor.start(nodes)

    def _put_rules(self, gateway: Gateway, shard: str) -> None:
        """What has changed since the shard was made: Patroni takes the rules from its configuration file only then."""
        key = f"{self.plan.settings.etcd.prefix}/patroni/{shard}/config"
        stored = gateway.get(key)
        if stored is None:
            return
        kept = json.loads(stored)
        wanted = patroni.merged(kept, patroni.dynamic(self.plan.node_config(shard, node_names(shard)[0])))
        if wanted != kept:
            gateway.put(key, json.dumps(wanted))

    def _leader_with_quorum(self, shard: str) -> str | None:
        """The shard's leader, once a standby of its quorum streams from it: only then can it commit."""
        with self._lock:
            nodes = {name: self._nodes[name] for name in node_names(shard) if name in self._nodes}
        leader = leader_of(nodes)
        return leader if leader is not None and nodes[leader].quorum_standbys else None

    def _leads(self, shard: str, process: str) -> bool:
        with self._lock:
            nodes = {name: self._nodes[name] for name in node_names(shard) if name in self._nodes}
        return f"node-{leader_of(nodes)}" == process

    def _note_nodes(self, probes: Mapping[str, Probe]) -> None:
        """Keep what the nodes' Patronis say now; what one said before it fell silent counts no longer."""
        with self._lock:
            for name, probe in probes.items():
                if probe.node is not None:
                    self._nodes[name.removeprefix("node-")] = probe.node
                else:
                    self._nodes.pop(name.removeprefix("node-"), None)

    def _prepare_shard(self, shard: str) -> None:
        self._until(lambda: self._leader_with_quorum(shard) is not None, f"node-{shard}-1")
        with self._lock:
            if shard not in self.memory.made:
                self.memory = msgspec.structs.replace(self.memory, made=(*self.memory.made, shard))
                self.layout.remember(self.memory)
        if self.hooks.on_leader is None:
            return
        gateway = Gateway(self.plan.settings.etcd.endpoints)
        names = {f"node-{node}" for node in node_names(shard)}
        owned: dict[str, list[Range]] = {}

        def has_map() -> bool:
            try:
                text = gateway.get(f"{self.plan.settings.etcd.prefix}/map")
            except EtcdAway:
                return False
            owned.update(shard_map.parse_map(text) if text else {})
            return text is not None

        self._until(has_map, "etcd-1")
        on_leader = self.hooks.on_leader

        def call() -> None:
            self._note_nodes(probe_all(program for program in self.programs if program.name in names))
            leader = self._leader_with_quorum(shard) or node_names(shard)[0]
            on_leader(shard, self._node_dsn(shard, leader), owned.get(shard, []))

        self._try(call, f"node-{shard}-1")

    def _node_dsn(self, shard: str, node: str) -> str:
        shard_number, number = self.plan.number(shard), node_names(shard).index(node)
        host = self.plan.node_host(shard_number, number)
        return self._superuser_dsn(self.plan.ports.postgres(shard_number, number), host)

    def _prepare_aggregator(self) -> None:
        port = self.plan.ports.aggregator_postgres
        self._until(lambda: probe_postgres(port).healthy, "aggregator-db")
        on_aggregator = self.hooks.on_aggregator
        if on_aggregator is not None:
            self._try(lambda: on_aggregator(self._superuser_dsn(port)), "aggregator-db")

    def _superuser_dsn(self, port: int, host: str = "127.0.0.1") -> str:
        postgres = self.plan.settings.postgres
        return secrets.postgres_dsn(postgres.superuser, postgres.superuser_password, port, postgres.database, host)

    def _prepare_routers(self) -> None:
        """Register the webhook, and start the routers, which read its secret."""
        port = self.plan.ports.stripe
        self._until(lambda: probe_http(port, "/_control/faults").healthy, "stripe")
        url = f"http://127.0.0.1:{self.plan.ports.router}/v1/webhooks/stripe"
        key = self.plan.settings.stripe.api_key
        self._try(lambda: webhooks.register(self.layout, port, key, url), "stripe")
        self.supervisor.start(program.name for program in self.programs if program.part == "router")

    def _prepare_tipalti(self) -> None:
        """Have the stand-in tell the routers what becomes of payments."""
        port = self.plan.ports.tipalti
        self._until(lambda: probe_http(port, "/_control/faults").healthy, "tipalti")
        url = f"http://127.0.0.1:{self.plan.ports.router}/v1/webhooks/tipalti"
        secret = self.plan.passwords.tipalti_notifications
        self._try(lambda: webhooks.register_notifications(port, url, secret), "tipalti")

    def _watch_health(self) -> None:
        """Until every process is healthy and every shard has its quorum; says of each when it is."""
        left = {program.name: program for program in self.programs}
        shards = {program.name: program.shard for program in self.programs if program.part == "nodes"}
        pids: dict[str, set[int]] = {name: set() for name in left}
        probes: dict[str, Probe] = {}
        while left:
            if time.monotonic() - self.started_s > self.timeout_s:
                name = next(iter(left))
                why = f"; {probes[name].why}" if probes.get(name) and probes[name].why else ""
                self._fail(name, f"not ready after {self.timeout_s:g} s (nor: {', '.join(left)}){why}")
            # A node counts once its shard has a quorum, which only the leader tells, ready or not: so all nodes are asked.
            probes = probe_all(program for program in self.programs if program.name in left or program.part == "nodes")
            states = self.supervisor.states()
            self._note_nodes(probes)
            for name, probe in probes.items():
                if name not in left:
                    continue
                pid = states[name].pid
                if pid:
                    pids[name].add(pid)
                if len(pids[name]) >= MAX_STARTS:
                    self._fail(name, f"it ended {MAX_STARTS} times")
                if pid and probe.healthy and (name not in shards or self._leader_with_quorum(shards[name])):
                    del left[name]
                    self.on_progress(Progress(name, time.monotonic() - self.started_s, tuple(left)))
            if left and self._cancel.wait(PROBE_EVERY_S):
                raise Cancelled

    def _nodes_without_slot(self) -> list[str]:
        """The processes of the nodes that lack the feed's slot, or can't be asked."""
        names = [(shard, name) for shard in self.shards for name in node_names(shard)]
        found = at_once(has_slot, [self._node_dsn(shard, name) for shard, name in names])
        return [f"node-{name}" for (_, name), there in zip(names, found, strict=True) if not there]

    def _await_steadiness(self) -> None:
        """Until everything is healthy at one time, and the feed's slot is on every node.

        Patroni starts a standby that has no copy of the slot anew, though it was ready, to give it one: also an old leader
        that was rewound.
        """
        unsteady = ["supervisor"]

        def is_steady() -> bool:
            probes = probe_all(self.programs)
            self._note_nodes(probes)
            unsteady[:] = [name for name, probe in probes.items() if not probe.healthy]
            if "nodes" in self.plan.parts:
                unsteady.extend(f"node-{shard}-1" for shard in self.shards if not self._leader_with_quorum(shard))
                if not unsteady:
                    unsteady.extend(self._nodes_without_slot())
            return not unsteady

        while not is_steady():
            if time.monotonic() - self.started_s > self.timeout_s:
                self._fail(unsteady[0], f"not ready after {self.timeout_s:g} s")
            self._cancel.wait(PROBE_EVERY_S)


def write_node_configs(plan: Plan) -> None:
    """The folders of all nodes and of the aggregator's Postgres, with what their wrappers read."""
    plan.os_user.own(plan.layout.nodes)
    for shard in plan.shards:
        for name in node_names(shard):
            folder = plan.layout.node(name)
            folder.mkdir(mode=0o700, exist_ok=True)
            plan.os_user.own(folder)
            config = folder / "patroni.yml"
            write_secret(config, patroni.render(plan.node_config(shard, name)).encode())
            plan.os_user.own(config)
            if shard in plan.restores:
                restore = folder / "restore.json"
                write_secret(restore, msgspec.json.encode(plan.restores[shard]))
                plan.os_user.own(restore)
    password = plan.layout.aggregator_db / "password"
    write_secret(password, plan.settings.postgres.superuser_password.encode() + b"\n")
    plan.os_user.own(plan.layout.aggregator_db)
    plan.os_user.own(password)
