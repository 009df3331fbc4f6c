"""The processes of a local cluster: their names, command lines, ports and health checks, all as plain values."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deploy import patroni, programs
from deploy.local.layout import Layout
from deploy.local.network import Network
from deploy.local.ports import ETCD_MEMBERS, NODES_PER_SHARD, WORKERS_PER_SHARD, Port, Ports
from deploy.local.secrets import Passwords
from deploy.os_user import OsUser
from oncepay.settings import Settings

Group = Literal["etcd", "data", "services"]
"""In the order in which they are left running when the cluster stops: services end first, etcd last."""

ALL_PARTS = ("etcd", "nodes", "aggregator-db", "stripe", "tipalti", "keygen", "router", "worker", "aggregator", "console")
MODULES = {
    "stripe": "sandbox.stripe.__main__",
    "tipalti": "sandbox.tipalti.__main__",
    "keygen": "keygen.__main__",
    "router": "router.__main__",
    "worker": "shard.worker.__main__",
    "aggregator": "aggregator.__main__",
    "console": "console.__main__",
}
"""What a part runs. A part whose module is not there is left out."""
STATELESS_REPLICAS = 2
NODE_STOP_S = 25
SERVICE_STOP_S = 20
BUFFERS_ENV = "ONCEPAY_NODE_SHARED_BUFFERS"
LOG_ENV = "ONCEPAY_NODE_MAX_WAL_SIZE"
"""The cache of each node's Postgres, where a laptop's doesn't fit."""
ETCD_HEARTBEAT_MS = 250
ETCD_ELECTION_MS = 1500
"""Fewer heartbeats for a quiet laptop. A new leader is there within 3 s, well within what Patroni waits for etcd."""
ETCD_STOP_S = 2
"""Its last leader waits 7 s for a successor that is stopping too. By then nobody writes, and it may be killed."""


@dataclass(frozen=True)
class Health:
    """How to see that a process does its work: `/readyz` and the like, Patroni's REST API, or a Postgres greeting."""

    kind: Literal["http", "patroni", "postgres"]
    port: int
    path: str = "/readyz"
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Program:
    """One supervised process. `port` is the one that status shows; `listens` are all that it needs.

    `shard` is empty for what belongs to no shard; `directory` is the working directory, None for the home's `run`.
    """

    name: str
    part: str
    group: Group
    command: tuple[str, ...]
    port: int
    listens: tuple[Port, ...]
    health: Health
    shard: str = ""
    directory: Path | None = None
    autostart: bool = True
    stop_signal: str = "TERM"
    stop_s: int = SERVICE_STOP_S
    environment: dict[str, str] = field(default_factory=dict)


def node_names(shard: str) -> list[str]:
    return [f"{shard}-{number}" for number in range(1, NODES_PER_SHARD + 1)]


def is_there(part: str) -> bool:
    """Whether the program of that part is installed."""
    module = MODULES.get(part)
    if module is None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def default_parts() -> tuple[str, ...]:
    return tuple(part for part in ALL_PARTS if is_there(part))


@dataclass(frozen=True)
class Plan:
    """What the programs of one cluster are made from."""

    layout: Layout
    ports: Ports
    shards: tuple[str, ...]
    parts: tuple[str, ...]
    settings: Settings
    passwords: Passwords
    os_user: OsUser
    network: Network | None = None

    numbers: dict[str, int] = field(default_factory=dict)
    """Those shards' numbers that aren't their places in `shards`."""
    restored: tuple[str, ...] = ()
    """Shards that were made from a backup: until they are accepted nothing works for them."""
    first_nodes: tuple[str, ...] = ()
    """Nodes that have to lead before the others of their shards are started; nobody else remembers who may."""
    restores: dict[str, dict[str, str]] = field(default_factory=dict)
    """Plans (`deploy/restore.py`) of the shards that are made from a backup now."""

    def number(self, shard: str) -> int:
        """The shard's number, from which its ports follow."""
        return self.numbers.get(shard, self.shards.index(shard))

    def node_host(self, shard_number: int, number: int) -> str:
        """The address of a node; shards and nodes are counted from zero."""
        return self.network.address(shard_number, number) if self.network else "127.0.0.1"

    def node_hosts(self, shard: str) -> list[str]:
        """The addresses of a shard's nodes, in their order."""
        return [self.node_host(self.number(shard), number) for number in range(NODES_PER_SHARD)]

    @property
    def uses_stand_in(self) -> bool:
        return self.settings.stripe.base_url.startswith("http://127.0.0.1:")

    def programs(self) -> list[Program]:
        """All processes of the chosen parts, in the order in which they are shown."""
        makers = {
            "etcd": self._etcd,
            "nodes": self._nodes,
            "aggregator-db": self._aggregator_db,
            "stripe": self._stripe,
            "tipalti": self._tipalti,
            "keygen": self._keygens,
            "router": self._routers,
            "worker": self._workers,
            "aggregator": self._aggregator,
            "console": self._console,
        }
        chosen = [part for part in ALL_PARTS if part in self.parts and (part != "stripe" or self.uses_stand_in)]
        return [program for part in chosen for program in makers[part]()]

    def _etcd(self) -> Iterator[Program]:
        binary = str(programs.etcd_binary())
        members = {f"etcd-{n + 1}": n for n in range(ETCD_MEMBERS)}
        initial = ",".join(f"{name}=http://127.0.0.1:{self.ports.etcd_peer(n)}" for name, n in members.items())
        for name, n in members.items():
            client, peer = self.ports.etcd_client(n), self.ports.etcd_peer(n)
            client_url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
            listen_urls = [client_url, f"http://{self.network.host}:{client}"] if self.network else [client_url]
            command = [binary, f"--name={name}", f"--data-dir={self.layout.etcd(name)}", "--log-level=warn"]
            command += [f"--listen-client-urls={','.join(listen_urls)}", f"--advertise-client-urls={listen_urls[-1]}"]
            command += [f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"]
            command += [f"--initial-cluster={initial}", f"--initial-cluster-token={self.ports.base}"]
            command += ["--initial-cluster-state=new", "--snapshot-count=10000", "--max-wals=3", "--max-snapshots=3"]
            command += ["--auto-compaction-mode=periodic", "--auto-compaction-retention=1h"]
            command += [f"--heartbeat-interval={ETCD_HEARTBEAT_MS}", f"--election-timeout={ETCD_ELECTION_MS}"]
            yield Program(
                name=name,
                part="etcd",
                group="etcd",
                command=tuple(command),
                port=client,
                listens=(Port(client, f"{name}, clients"), Port(peer, f"{name}, peers")),
                health=Health("http", client, "/health"),
                stop_s=ETCD_STOP_S,
                environment={"GOMAXPROCS": "1"},  # an idle etcd with more threads wakes up more often
            )

    def _nodes(self) -> Iterator[Program]:
        """They are started when etcd is ready: a Patroni that comes too early waits for 5 s before it asks again."""
        for shard in self.shards:
            shard_number = self.number(shard)
            for number, node in enumerate(node_names(shard)):
                folder = self.layout.node(node)
                postgres, rest = self.ports.postgres(shard_number, number), self.ports.patroni(shard_number, number)
                run_patroni = [*self.os_user.prefix, *programs.patroni_command(folder / "patroni.yml")]
                wrapper = _light_python("deploy.node", str(folder), str(patroni.WATCHDOG_TIMEOUT_S))
                enter = self.network.enter(shard_number, number) if self.network else []
                name = f"node-{node}"
                yield Program(
                    name=name,
                    part="nodes",
                    group="data",
                    command=(*enter, *wrapper, *run_patroni),
                    port=postgres,
                    listens=(Port(postgres, f"{name}, Postgres"), Port(rest, f"{name}, Patroni")),
                    health=Health("patroni", rest, host=self.node_host(shard_number, number)),
                    shard=shard,
                    directory=folder,
                    autostart="etcd" not in self.parts,
                    stop_s=NODE_STOP_S,
                )

    def _aggregator_db(self) -> Iterator[Program]:
        port = self.ports.aggregator_postgres
        arguments = [str(self.layout.aggregator_db), str(programs.postgres_bin()), str(port), self.settings.postgres.database]
        yield Program(
            name="aggregator-db",
            part="aggregator-db",
            group="data",
            command=(*_light_python("deploy.postgres", *arguments), *self.os_user.prefix),
            port=port,
            listens=(Port(port, "aggregator-db, Postgres"),),
            health=Health("postgres", port),
            directory=self.layout.aggregator_db,
            stop_signal="INT",
        )

    def _stripe(self) -> Iterator[Program]:
        yield self._stand_in("stripe", self.ports.stripe)

    def _tipalti(self) -> Iterator[Program]:
        yield self._stand_in("tipalti", self.ports.tipalti)

    def _stand_in(self, name: str, port: int) -> Program:
        state = str(self.layout.state / name)
        return Program(
            name=name,
            part=name,
            group="services",
            command=(sys.executable, "-m", f"sandbox.{name}", "--port", str(port), "--state", state),
            port=port,
            listens=(Port(port, f"the stand-in for {name.capitalize()}"),),
            health=Health("http", port, "/_control/faults"),
        )

    def _service(
        self, name: str, part: str, module: str, own: int, options: Sequence[str], shared: int = 0, shard: str = ""
    ) -> Program:
        command = [sys.executable, "-m", module, "--config", str(self.layout.settings), "--name", name, *options]
        listens = [Port(own, name)]
        if shared:
            listens.append(Port(shared, f"the {part}s' shared port"))
        # A router needs the webhook's secret, which the stand-in tells when it is up.
        autostart = part != "router" or not self.uses_stand_in or "stripe" not in self.parts
        return Program(
            name=name,
            part=part,
            group="services",
            command=tuple(command),
            port=own,
            listens=tuple(listens),
            health=Health("http", own),
            shard=shard,
            autostart=autostart,
        )

    def _keygens(self) -> Iterator[Program]:
        for n in range(STATELESS_REPLICAS):
            shared, own = self.ports.keygen, self.ports.keygen_own(n)
            yield self._service(
                f"keygen-{n + 1}", "keygen", "keygen", own, ["--port", str(shared), "--own-port", str(own)], shared
            )

    def _routers(self) -> Iterator[Program]:
        for n in range(STATELESS_REPLICAS):
            shared, own = self.ports.router, self.ports.router_own(n)
            yield self._service(
                f"router-{n + 1}", "router", "router", own, ["--port", str(shared), "--own-port", str(own)], shared
            )

    def _workers(self) -> Iterator[Program]:
        """Two a shard: one is active, the other stands by. A shard that was restored from a backup gets none."""
        for shard in self.shards:
            if shard in self.restored:
                continue
            for replica in range(WORKERS_PER_SHARD):
                own, name = self.ports.worker(self.number(shard), replica), f"worker-{shard}-{replica + 1}"
                yield self._service(name, "worker", "shard.worker", own, ["--shard", shard, "--own-port", str(own)], shard=shard)

    def _aggregator(self) -> Iterator[Program]:
        own = self.ports.aggregator
        yield self._service("aggregator", "aggregator", "aggregator", own, ["--port", str(own)])

    def _console(self) -> Iterator[Program]:
        own = self.ports.console
        yield self._service("console", "console", "console", own, ["--port", str(own)])

    def node_config(self, shard: str, node: str) -> patroni.Node:
        """What goes into that node's Patroni configuration."""
        shard_number, number = self.number(shard), node_names(shard).index(node)
        folder = self.layout.node(node)
        client_ports = [endpoint.rpartition(":")[2] for endpoint in self.settings.etcd.endpoints]
        etcd_hosts = (
            tuple(f"{self.network.host}:{port}" for port in client_ports) if self.network else self.settings.etcd.endpoints
        )
        return patroni.Node(
            name=node,
            scope=shard,
            host=self.node_host(shard_number, number),
            postgres_port=self.ports.postgres(shard_number, number),
            rest_port=self.ports.patroni(shard_number, number),
            data_dir=folder / "data",
            pgpass=folder / "pgpass",
            watchdog=folder / "watchdog",
            bin_dir=programs.postgres_bin(),
            superuser=patroni.Credential(self.settings.postgres.superuser, self.passwords.superuser),
            replication=patroni.Credential("oncepay_replication", self.passwords.replication),
            rest=patroni.Credential("oncepay", self.passwords.patroni_rest),
            etcd_hosts=etcd_hosts,
            namespace=f"{self.settings.etcd.prefix}/patroni/",
            database=self.settings.postgres.database,
            client_network=self.network.subnet if self.network else "127.0.0.1/32",
            archive=self.layout.backups(shard) / "wal",
            tuning=patroni.Tuning(
                os.environ.get(BUFFERS_ENV) or patroni.Tuning.shared_buffers,
                os.environ.get(LOG_ENV) or patroni.Tuning.max_wal_size,
            ),
            restore=folder / "restore.json" if shard in self.restores else None,
        )


def _light_python(module: str, *arguments: str) -> list[str]:
    """A Python without site packages: a wrapper stays in memory for as long as what it wraps."""
    return [sys.executable, "-S", "-m", module, *arguments]


def project_root() -> Path:
    """The folder that `deploy` is imported from; a Python without site packages must be told."""
    return Path(programs.__file__).resolve().parent.parent
