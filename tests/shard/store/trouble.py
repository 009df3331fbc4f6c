"""What is done to a shard in these tests: receivers and whole nodes frozen, connections cut, and how to see that all is well.

Whatever is frozen is thawed when its `with` ends.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import NamedTuple, Self

import asyncpg
import psutil
from msgspec.structs import replace

from deploy.local import Cluster
from oncepay.etcd import Etcd
from shard.store.leader import Node
from shard.store.store import Shards

SHARD = "s0"
NODES = tuple(f"{SHARD}-{n}" for n in (1, 2, 3))


async def eventually(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 15.0) -> None:
    """Return when `condition` holds; it is something outside that tells of no event (a table, a process)."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not: {what}"
        await asyncio.sleep(0.02)


async def stay_open(calls: Sequence[asyncio.Task[object]], for_s: float) -> None:
    """Assert that none of the calls is answered within `for_s`."""
    done, _ = await asyncio.wait(calls, timeout=for_s)
    assert not done, [task.exception() or task.result() for task in done]


def leader_node(store: Shards) -> Node:
    node = store.leaders.current(SHARD)
    assert node is not None
    return node


def standbys(leader: str) -> list[str]:
    return [name for name in NODES if name != leader]


async def superuser(cluster: Cluster, node: Node) -> asyncpg.Connection:
    postgres = cluster.settings.postgres
    return await asyncpg.connect(
        host=node.host, port=node.port, user=postgres.superuser, password=postgres.superuser_password, database=postgres.database
    )


@asynccontextmanager
async def superuser_on(cluster: Cluster, node: Node) -> AsyncIterator[asyncpg.Connection]:
    """A session that is dropped at the end, whatever became of its node."""
    connection = await superuser(cluster, node)
    try:
        yield connection
    finally:
        connection.terminate()


@asynccontextmanager
async def opened(
    cluster: Cluster, actor: str, cls: type[Shards] = Shards, role: str = "router", etcd_at: str = ""
) -> AsyncIterator[Shards]:
    """One more store, as another process has it. `etcd_at`: the only endpoint of etcd that it knows."""
    settings = cluster.settings
    passwords = {"router": settings.postgres.router_password, "worker": settings.postgres.worker_password}
    async with Etcd(replace(settings.etcd, endpoints=(etcd_at,)) if etcd_at else settings.etcd) as etcd:
        shards = cls(etcd, settings, role=f"oncepay_{role}", password=passwords[role], actor=actor)
        await shards.start()
        try:
            yield shards
        finally:
            await shards.stop()


def _voters(store: Shards) -> list[str]:
    """The standbys that Patroni would elect from now."""
    found = store.leaders._mirror.get(f"{SHARD}/sync")
    return str(json.loads(found.value).get("sync_standby") or "").split(",") if found else []


async def until_whole(cluster: Cluster, store: Shards, timeout_s: float = 60.0) -> None:
    """Return when the shard has a leader, and both others stream from it, count for its quorum and may follow it."""

    async def whole() -> bool:
        node = store.leaders.current(SHARD)
        if node is None or set(_voters(store)) != set(standbys(node.name)):
            return False
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            async with superuser_on(cluster, node) as session:
                return bool(
                    await session.fetchval(
                        "select not pg_is_in_recovery() and count(*) filter (where state = 'streaming' and sync_state = 'quorum'"
                        " and application_name = any ($1)) = 2 from pg_stat_replication",
                        standbys(node.name),
                    )
                )
        return False

    await eventually(whole, "the shard is whole again", timeout_s)


def _receivers(cluster: Cluster, nodes: Sequence[str]) -> list[psutil.Process]:
    found = []
    for node in nodes:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(cluster.postmaster_pid(node)).children()
            found += [child for child in children if "walreceiver" in " ".join(child.cmdline())]
    return found


async def receivers(cluster: Cluster, nodes: Sequence[str]) -> list[psutil.Process]:
    """The processes with which those standbys receive the leader's log, as soon as each has one."""
    await eventually(lambda: len(_receivers(cluster, nodes)) == len(nodes), f"{nodes} receive")
    return _receivers(cluster, nodes)


def node_processes(cluster: Cluster, node: str) -> list[psutil.Process]:
    """All of a node: its wrapper, Patroni, the postmaster and all of Postgres' other processes, parents first."""
    wrapper = psutil.Process(cluster.supervisor().states()[f"node-{node}"].pid)
    return [wrapper, *wrapper.children(recursive=True)]


@contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """The processes stand still, as on a machine that hangs."""
    stopped: list[psutil.Process] = []
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
            stopped.append(process)
        yield
    finally:
        thaw(stopped)


def thaw(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def kill_postmaster(cluster: Cluster, node: str) -> None:
    postmaster = cluster.postmaster_pid(node)
    assert postmaster is not None
    os.kill(postmaster, signal.SIGKILL)


class Waiting(NamedTuple):
    """A commit that waits for a standby: its backend, and since when that statement runs."""

    pid: int
    since: datetime.datetime


async def waiting_commit(session: asyncpg.Connection, actor: str) -> Waiting:
    """The longest waiting commit of `actor`, as soon as there is one."""
    query = (
        "select pid, query_start from pg_stat_activity where wait_event = 'SyncRep' and application_name = $1"
        " order by query_start limit 1"
    )
    async with asyncio.timeout(10):
        while (row := await session.fetchrow(query, actor)) is None:
            await asyncio.sleep(0.01)
    return Waiting(row["pid"], row["query_start"])


async def shown(session: asyncpg.Connection, key: str) -> int:
    """How many rows of that key a plain query shows on this node."""
    return int(await session.fetchval("select count(*) from oncepay.payments where key = $1", key))


async def shown_soon(session: asyncpg.Connection, key: str) -> None:
    async def found() -> bool:
        return await shown(session, key) > 0

    await eventually(found, f"{key} is visible")


class Proxy:
    """Carries TCP to one server, and cuts connections without a word.

    A connection that is sent `marker` by the client is cut before that reaches the server (`request`), or when the server
    answers, before that reaches the client (`answer`). Each armed cut happens once.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._marker = b""
        self._at = ""
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        for task in list(self._tasks):
            task.cancel()

    def close(self) -> None:
        """Cut all connections, and take no more."""
        assert self._server is not None
        self._server.close()
        self.cut()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def arm(self, marker: str, at: str) -> None:
        """Cut the next connection that is sent `marker`, at its `request` or its `answer`."""
        self._marker, self._at = marker.encode(), at

    def cut(self) -> None:
        """Cut all connections now."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        pair = (writer, server_writer)
        self._writers.update(pair)
        marked = asyncio.Event()
        for source, sink, is_client in ((reader, server_writer, True), (server_reader, writer, False)):
            task = asyncio.create_task(self._carry(source, sink, pair, marked, is_client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        marked: asyncio.Event,
        is_client: bool,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                if is_client and self._marker and self._marker in data:
                    self._marker = b""
                    marked.set()
                if marked.is_set() and is_client is (self._at == "request"):
                    self.cuts += 1
                    break
                sink.write(data)
                await sink.drain()
        for writer in pair:
            writer.transport.abort()
            self._writers.discard(writer)


class Proxied(Shards):
    """A store that reaches the leader through a proxy."""

    proxy: Proxy | None = None

    async def connect(self, host: str, port: int) -> asyncpg.Connection:
        if self.proxy is None:
            return await super().connect(host, port)
        return await super().connect("127.0.0.1", self.proxy.port)


@asynccontextmanager
async def proxied(cluster: Cluster, actor: str, role: str = "router") -> AsyncIterator[tuple[Proxied, Proxy]]:
    """A store on the leader of s0 through a proxy of its own. Don't change the leader meanwhile."""
    async with opened(cluster, actor, Proxied, role) as store:
        assert isinstance(store, Proxied)
        node = leader_node(store)
        async with Proxy(node.host, node.port) as proxy:
            store.proxy = proxy
            yield store, proxy
