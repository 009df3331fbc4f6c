"""Asking each process whether it does its work. Many at once, each within a short bound; no answer means no."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from deploy.local.parts import Health, Program

PROBE_TIMEOUT_S = 0.7
MAX_PROBES_AT_ONCE = 32
STARTING_UP = b"57P03"
"""Postgres' SQLSTATE cannot_connect_now."""

T = TypeVar("T")
R = TypeVar("R")


class NodeState(NamedTuple):
    """What a node's Patroni says of its Postgres. `lsn` is a position in bytes, None while there is none to tell."""

    running: bool
    role: str
    timeline: int
    streaming: bool
    lsn: int | None
    quorum_standbys: tuple[str, ...]


class Probe(NamedTuple):
    """What one check found."""

    healthy: bool
    node: NodeState | None = None
    why: str = ""
    """What it found wrong."""


def get_json(port: int, path: str, timeout_s: float = PROBE_TIMEOUT_S, host: str = "127.0.0.1") -> tuple[int, object]:
    """Status and parsed body of a GET. Raises OSError or ValueError."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        try:
            return response.status, json.loads(body)
        except ValueError:
            return response.status, None
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error}") from error
    finally:
        connection.close()


def probe_http(port: int, path: str) -> Probe:
    """Healthy means status 200."""
    try:
        status, _ = get_json(port, path)
    except (OSError, ValueError):
        return Probe(False)
    return Probe(status == 200)


def probe_postgres(port: int) -> Probe:
    """Healthy means that Postgres would take a connection; none is made, and no role is needed."""
    parameters = b"user\0probe\0database\0postgres\0\0"
    startup = struct.pack("!ii", 8 + len(parameters), 3 << 16) + parameters
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(startup)
            answer = connection.recv(512)
    except OSError:
        return Probe(False)
    return Probe(bool(answer) and STARTING_UP not in answer)


def probe_patroni(port: int, host: str = "127.0.0.1") -> Probe:
    """Healthy means that Patroni answers and its Postgres runs, and streams when it is a standby."""
    try:
        status, body = get_json(port, "/patroni", host=host)
    except (OSError, ValueError) as error:
        return Probe(False, why=f"GET /patroni: {error!r}")
    if status != 200 or not isinstance(body, dict):
        return Probe(False, why=f"GET /patroni: status {status}")
    node = node_state(body)
    return Probe(node.running and (node.role == "primary" or node.streaming), node, f"Patroni says {body}")


def node_state(body: dict[str, object]) -> NodeState:
    """Read Patroni's answer to `GET /patroni`."""
    xlog = body.get("xlog")
    positions = xlog if isinstance(xlog, dict) else {}
    lsn = positions.get("location", positions.get("received_location"))
    timeline = body.get("timeline")
    senders = body.get("replication")
    return NodeState(
        running=body.get("state") == "running",
        role=str(body.get("role", "")),
        timeline=timeline if isinstance(timeline, int) else 0,
        streaming=body.get("replication_state") == "streaming",
        lsn=lsn if isinstance(lsn, int) else None,
        quorum_standbys=tuple(
            str(sender["application_name"])
            for sender in (senders if isinstance(senders, list) else [])
            if sender.get("sync_state") == "quorum" and sender.get("state") == "streaming"
        ),
    )


def probe(health: Health) -> Probe:
    """Do the check."""
    if health.kind == "patroni":
        return probe_patroni(health.port, health.host)
    if health.kind == "postgres":
        return probe_postgres(health.port)
    return probe_http(health.port, health.path)


def probe_all(programs: Iterable[Program]) -> dict[str, Probe]:
    """All checks at once, by process name."""
    chosen = list(programs)
    return dict(zip((program.name for program in chosen), at_once(probe, [each.health for each in chosen]), strict=True))


def at_once(call: Callable[[T], R], arguments: list[T]) -> list[R]:
    """Call for each argument, in threads."""
    if not arguments:
        return []
    with ThreadPoolExecutor(min(len(arguments), MAX_PROBES_AT_ONCE)) as pool:
        return list(pool.map(call, arguments))
