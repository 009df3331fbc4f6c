"""What runs: the object that `oncepay status --output json` prints."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import msgspec

from deploy import processes
from deploy.local import secrets, shard_map
from deploy.local.etcd import EtcdAway, Gateway
from deploy.local.health import PROBE_TIMEOUT_S, NodeState, Probe, probe_all
from deploy.local.parts import Plan, Program, node_names
from deploy.local.supervisor import ProcessState


class ProcessStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """`pid` is null when the process isn't running; `port` is the one of its own."""

    name: str
    pid: int | None
    healthy: bool
    port: int | None = None


class NodeStatus(msgspec.Struct, frozen=True):
    """`pid` is the postmaster's. `role` is `primary`, `replica` or `unknown`; `lag_bytes` is null when not known."""

    name: str
    pid: int | None
    patroni_pid: int | None
    port: int
    role: str
    lag_bytes: int | None
    host: str = "127.0.0.1"


class ShardStatus(msgspec.Struct, frozen=True):
    """`leader` and `dsn` are null while there is no leader; `dsn` is for reading only. `restored`: it was made from a backup, and
    nothing works for it."""

    name: str
    ranges: list[shard_map.Range]
    leader: str | None
    nodes: list[NodeStatus]
    dsn: str | None
    restored: bool = False


class EtcdStatus(msgspec.Struct, frozen=True):
    """One member; `port` is for clients."""

    name: str
    pid: int | None
    port: int


class Status(msgspec.Struct, frozen=True):
    """The whole cluster. `urls` are origins without a slash at the end. While it is `stopping` no pids are told."""

    urls: dict[str, str]
    api_key: str
    processes: list[ProcessStatus]
    shards: list[ShardStatus]
    aggregator_dsn: str
    etcd: list[EtcdStatus]
    stopping: bool = False

    @property
    def healthy(self) -> bool:
        """Whether every process does its work and every shard has a leader."""
        return all(each.healthy for each in self.processes) and all(shard.leader for shard in self.shards)


def leader_of(nodes: dict[str, NodeState]) -> str | None:
    """The primary among a shard's nodes. Of two, for a deposed one may not know it yet, that of the later timeline."""
    primaries = [(state.timeline, name) for name, state in nodes.items() if state.running and state.role == "primary"]
    return max(primaries)[1] if primaries else None


def _read_map(plan: Plan) -> dict[str, list[shard_map.Range]]:
    gateway = Gateway(plan.settings.etcd.endpoints, PROBE_TIMEOUT_S / 2)
    key = f"{plan.settings.etcd.prefix}/map"
    for serializable in (False, True):
        try:
            text = gateway.get(key, serializable=serializable)
            return shard_map.parse_map(text) if text else {}
        except EtcdAway:
            continue
        except ValueError:
            break
    return {}


def _patroni_pid(plan: Plan, node: str, wrapper: int) -> int | None:
    try:
        pid = int((plan.layout.node(node) / "patroni.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return pid if wrapper and processes.is_alive(pid) and processes.parent(pid) == wrapper else None


def _shard(
    plan: Plan, shard: str, probes: dict[str, Probe], states: dict[str, ProcessState], ranges: list[shard_map.Range]
) -> ShardStatus:
    names = node_names(shard)
    known = {name: node for name in names if (node := probes[f"node-{name}"].node) is not None}
    leader = leader_of(known)
    end = known[leader].lsn if leader else None
    number = plan.number(shard)
    nodes = []
    for n, name in enumerate(names):
        state = known.get(name)
        lag = max(0, end - state.lsn) if end is not None and state is not None and state.lsn is not None else None
        wrapper = states.get(f"node-{name}")
        nodes.append(
            NodeStatus(
                name=name,
                pid=processes.postmaster_pid(str(plan.layout.node(name) / "data")),
                patroni_pid=_patroni_pid(plan, name, wrapper.pid if wrapper else 0),
                port=plan.ports.postgres(number, n),
                role=state.role if state else "unknown",
                lag_bytes=lag,
                host=plan.node_host(number, n),
            )
        )
    postgres = plan.settings.postgres
    dsn = None
    if leader is not None:
        n = names.index(leader)
        port, host = plan.ports.postgres(number, n), plan.node_host(number, n)
        dsn = secrets.postgres_dsn("oncepay_reader", postgres.reader_password, port, postgres.database, host)
    return ShardStatus(name=shard, ranges=ranges, leader=leader, nodes=nodes, dsn=dsn, restored=shard in plan.restored)


def _urls(plan: Plan, programs: list[Program]) -> dict[str, str]:
    ports = plan.ports
    origins = {
        "router": ports.router,
        "keygen": ports.keygen,
        "aggregator": ports.aggregator,
        "console": ports.console,
        "stripe": ports.stripe,
        "tipalti": ports.tipalti,
    }
    running = {program.part for program in programs}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in origins.items() if name in running}
    if not plan.uses_stand_in:
        urls["stripe"] = plan.settings.stripe.base_url
    return urls


def collect(plan: Plan, states: dict[str, ProcessState], *, stopping: bool = False) -> Status:
    """Ask everything, at once, and put the answers together."""
    programs = plan.programs()
    with ThreadPoolExecutor(1) as pool:
        ranges_read = pool.submit(_read_map, plan)
        probes = probe_all(programs)
        ranges = ranges_read.result()
    pids = {program.name: states[program.name].pid or None if program.name in states else None for program in programs}
    postgres = plan.settings.postgres
    return Status(
        urls=_urls(plan, programs),
        api_key=plan.passwords.api_key,
        processes=[
            ProcessStatus(
                name=program.name,
                pid=pids[program.name],
                healthy=pids[program.name] is not None and probes[program.name].healthy,
                port=program.port,
            )
            for program in programs
        ],
        shards=[_shard(plan, shard, probes, states, ranges.get(shard, [])) for shard in plan.shards]
        if "nodes" in plan.parts
        else [],
        aggregator_dsn=secrets.postgres_dsn(
            "oncepay_reader", postgres.reader_password, plan.ports.aggregator_postgres, postgres.database
        ),
        etcd=[EtcdStatus(program.name, pids[program.name], program.port) for program in programs if program.part == "etcd"],
        stopping=stopping,
    )


def render(status: Status) -> str:
    """The status as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(status), indent=2).decode() + os.linesep
