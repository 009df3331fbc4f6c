"""Which port is whose: every listener of a local cluster is within 70 ports from its base."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from deploy.local.errors import PortTaken

DEFAULT_BASE = 8080
SPAN = 70
MAX_SHARDS = 6
NODES_PER_SHARD = 3
ETCD_MEMBERS = 3
WORKERS_PER_SHARD = 2


class Port(NamedTuple):
    """A listener's port and what it is for."""

    number: int
    purpose: str


@dataclass(frozen=True)
class Ports:
    """The ports of the cluster whose first port is `base`. Counts from zero: `replica`, `member`, `shard`, `node`."""

    base: int = DEFAULT_BASE

    def __post_init__(self) -> None:
        if not 1024 <= self.base <= 65536 - SPAN:
            raise ValueError(f"the port base must be within 1024 and {65536 - SPAN}, not {self.base}")

    @property
    def router(self) -> int:
        """Shared by all routers (SO_REUSEPORT)."""
        return self.base

    @property
    def keygen(self) -> int:
        """Shared by all keygens (SO_REUSEPORT)."""
        return self.base + 1

    @property
    def aggregator(self) -> int:
        return self.base + 2

    @property
    def console(self) -> int:
        return self.base + 3

    @property
    def stripe(self) -> int:
        return self.base + 10

    @property
    def tipalti(self) -> int:
        return self.base + 11

    def router_own(self, replica: int) -> int:
        return self.base + 12 + _within(replica, 2)

    def keygen_own(self, replica: int) -> int:
        return self.base + 14 + _within(replica, 2)

    def worker(self, shard: int, replica: int) -> int:
        """Workers of the first three shards have 16 to 21, those of the others 4 to 9."""
        first = 16 if _within(shard, MAX_SHARDS) < 3 else 4 - 2 * 3
        return self.base + first + WORKERS_PER_SHARD * shard + _within(replica, WORKERS_PER_SHARD)

    def etcd_client(self, member: int) -> int:
        return self.base + 22 + _within(member, ETCD_MEMBERS)

    def etcd_peer(self, member: int) -> int:
        return self.base + 25 + _within(member, ETCD_MEMBERS)

    @property
    def aggregator_postgres(self) -> int:
        return self.base + 28

    def postgres(self, shard: int, node: int) -> int:
        return self.base + 30 + 6 * _within(shard, MAX_SHARDS) + _within(node, NODES_PER_SHARD)

    def patroni(self, shard: int, node: int) -> int:
        return self.base + 33 + 6 * _within(shard, MAX_SHARDS) + _within(node, NODES_PER_SHARD)


def _within(index: int, bound: int) -> int:
    if not 0 <= index < bound:
        raise ValueError(f"no port for number {index}: there are {bound}")
    return index


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether one could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Who listens on the port, as far as this user may know."""
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        connections = []
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or connection.laddr.port != port:
            continue
        if connection.pid is None:
            break
        try:
            return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
        except psutil.Error:
            return f"pid {connection.pid}"
    return "another process"


def check_free(ports: Iterable[Port]) -> None:
    """Raises PortTaken, naming each taken port, what it is for and who holds it."""
    unique = sorted(set(ports))
    taken = [port for port in unique if not is_free(port.number)]
    if not taken:
        return
    lines = [f"port {port.number} ({port.purpose}) is taken by {holder(port.number)}" for port in taken]
    raise PortTaken("; ".join(lines) + ". Stop it, or choose other ports with ONCEPAY_PORT_BASE.")


_ours: set[int] = set()
"""The ports that this process has claimed."""


@cache
def _claims() -> int:
    """A file of this user, of which a process locks byte `n` while port `n` is its own. Open until the process ends: closing
    any descriptor of it would drop the locks (POSIX, fcntl)."""
    path = os.path.join(tempfile.gettempdir(), f"oncepay-ports-{os.getuid()}")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def claim(first: int, count: int = 1) -> bool:
    """Whether `count` ports from `first` are free and from now on this process's, among those who ask here.

    Between the look at a port and the moment when its server listens, seconds later, another process that looks finds it free
    too. A claim ends with its process. Fork doesn't pass it on.
    """
    ports = range(first, first + count)
    if not _ours.isdisjoint(ports):
        return False
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except OSError:
        return False
    if not all(is_free(port) for port in ports):
        fcntl.lockf(_claims(), fcntl.LOCK_UN, count, first)
        return False
    _ours.update(ports)
    return True


SINGLE_PORTS = range(12_000, 20_000)
BASES = range(20_000, 32_000 - SPAN, SPAN)


def free_port() -> int:
    """A port that no other caller gets while this process lives, out of another range than the bases'. Raises PortTaken.

    It lies below the range from which the kernel takes ports for outgoing connections: else a client that keeps trying to
    reach a stopped server can be given that very port, and the server can't start again.
    """
    return _first_claimed(SINGLE_PORTS, 1)


def free_base() -> int:
    """A base whose whole span is free and this process's, below the ports that the kernel hands out. Raises PortTaken."""
    return _first_claimed(BASES, SPAN)


def _first_claimed(among: range, count: int) -> int:
    import random

    for first in random.sample(among, len(among)):
        if claim(first, count):
            return first
    raise PortTaken(f"no {count} free ports in a row between {among.start} and {among.stop}")
