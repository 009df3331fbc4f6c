"""How many payments a second are accepted: row on the quorum, answered 202; against the usual way and against a bare handler.

    python -m loadtest.bench.accept [--rounds 5] [--count 6000]

One shard of three nodes, two routers, 256 connections in a closed loop, issued keys, API keys checked, `Prefer: wait=0`. The
rivals are two processes each and write one row a request on the same three nodes, so with the same durability: `usual` is
FastAPI with SQLAlchemy and a transaction a request, `bare` is aiohttp with group commit and no rule at all. All take turns in
every round, and ratios are made within a round. At half of the peak requests then come at a constant pace.

The stand-in for Stripe is frozen, as if Stripe didn't answer: what is accepted is driven no further than its first call, so
that this measures acceptance. Between rounds the routers are killed, so that none comes to its bound of payments in flight.

Beside payments a second there is the processor time of one payment in all that takes part (service, Postgres, client): on a
machine that does other work too, its ratios are the steadier ones.

Prints one JSON object; exits with 1 when that is less than it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import psutil
import uvloop

from loadtest.bench.idle import costs
from loadtest.bench.own_cluster import Failed, Running, cluster, machine, payment_requests
from loadtest.bench.rivals.common import DSN_ENV
from loadtest.bench.sender import Sent, send

CONNECTIONS = 256
WARM_UP = 600
PACED_S = 4.0
RIVALS = ("usual", "bare")
PROCESSES = 2
READY_S = 30.0
TIMES_USUAL_MIN = 6.0
OF_BARE_MIN = 0.6
P99_MAX_MS = 100.0
TABLE = (Path(__file__).parent / "rivals" / "table.sql").read_text(encoding="utf-8")


def superuser_dsn(running: Running) -> str:
    """Of the shard's leader."""
    shard = running.status["shards"][0]
    port = next(node["port"] for node in shard["nodes"] if node["name"] == shard["leader"])
    postgres = running.settings.postgres
    return f"postgresql://{postgres.superuser}:{postgres.superuser_password}@127.0.0.1:{port}/{postgres.database}"


async def rows(dsn: str, table: str) -> int:
    """How many rows a table has (or a table with a condition)."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(f"select count(*) from {table}"))
    finally:
        await connection.close()


async def make_table(dsn: str, name: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(TABLE.replace("{name}", name))
    finally:
        await connection.close()


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that answers nobody meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def rival(name: str, dsn: str) -> Iterator[tuple[int, list[int]]]:
    """A rival's processes, ready on the port that they share: that port, and their pids."""
    asyncio.run(make_table(dsn, name))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", f"loadtest.bench.rivals.{name}", "--port", str(port)]
    processes = [subprocess.Popen(command, env={**os.environ, DSN_ENV: dsn}) for _ in range(PROCESSES)]
    try:
        until_listening(port)
        yield port, [process.pid for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(READY_S)


def until_listening(port: int) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise Failed(f"nothing listens on {port}")


def fresh_routers(running: Running) -> None:
    """Kill the routers, and return when their successors are ready."""
    routers = [process for process in running.status["processes"] if process["name"].startswith("router")]
    for process in routers:
        os.kill(process["pid"], signal.SIGKILL)
    for process in routers:
        until_ready(process["port"])


def until_ready(port: int) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return
        time.sleep(0.1)
    raise Failed(f"the router on {port} is not ready")


class Ran(NamedTuple):
    """A run, and the processor time of one payment in it."""

    sent: Sent
    cpu_ms: float


class Contest:
    """The three, and what they did. `pids` are the rivals' processes."""

    def __init__(self, running: Running, dsn: str, ports: dict[str, int], pids: list[int]) -> None:
        self.running = running
        self.dsn = dsn
        self.ports = ports
        self.rivals = [psutil.Process(pid) for pid in pids]
        self.api_key = running.status["api_key"]
        self.tables = {name: "oncepay.payments" if name == "oncepay" else f"rivals.{name}" for name in ports}
        self.sent = 0

    def requests(self, count: int) -> list[bytes]:
        self.sent += count
        return payment_requests(self.running.keys(count), self.api_key, wait_s=0, first=self.sent)

    def cpu_s(self) -> float:
        """Processor time until now of the cluster, the rivals and this process."""
        times = [process.cpu_times() for process in [*self.rivals, psutil.Process()]]
        cluster_s = sum(cost.cpu_s for cost in costs(self.running.home, with_memory=False).values())
        return cluster_s + sum(each.user + each.system for each in times)

    def run(self, name: str, count: int, rate_per_s: float | None = None) -> Ran:
        """One run of one of them. Raises Failed unless each request was answered 202 and is a row."""
        if name == "oncepay":
            fresh_routers(self.running)
        before = asyncio.run(rows(self.dsn, self.tables[name]))
        port = self.ports[name]
        uvloop.run(send(self.requests(WARM_UP), [port], connections=CONNECTIONS))
        requests = self.requests(count)
        began_s = self.cpu_s()
        sent = uvloop.run(send(requests, [port], connections=CONNECTIONS, rate_per_s=rate_per_s))
        cpu_s = self.cpu_s() - began_s
        if sent.statuses != {202: count} or asyncio.run(rows(self.dsn, self.tables[name])) != before + WARM_UP + count:
            raise Failed(f"{name} answered {sent.statuses}")
        return Ran(sent, 1000 * cpu_s / count)


def medians(values: dict[str, list[float]], digits: int = 0) -> dict[str, float]:
    """Of each list."""
    return {name: round(statistics.median(each), digits) for name, each in values.items()}


def ratio(these: list[float], those: list[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(this / that for this, that in zip(these, those, strict=True)), 3)


def contest(running: Running, rounds: int, count: int) -> dict[str, Any]:
    """All rounds, then the paced runs."""
    dsn = superuser_dsn(running)
    with rival("usual", dsn) as (usual, usual_pids), rival("bare", dsn) as (bare, bare_pids):
        ports = {"oncepay": running.port("router"), "usual": usual, "bare": bare}
        three = Contest(running, dsn, ports, usual_pids + bare_pids)
        found: dict[str, list[float]] = {name: [] for name in ports}
        cpu_ms: dict[str, list[float]] = {name: [] for name in ports}
        for number in range(rounds):
            names = list(ports)
            for name in names[number % 3 :] + names[: number % 3]:
                ran = three.run(name, count if name != "usual" else count // 4)
                found[name].append(ran.sent.per_s)
                cpu_ms[name].append(ran.cpu_ms)
        peak_per_s = statistics.median(found["oncepay"])
        paced = [three.run("oncepay", int(PACED_S * peak_per_s / 2), peak_per_s / 2).sent for _ in range(rounds)]
    return {
        "per_s": medians(found),
        "times_usual": ratio(found["oncepay"], found["usual"]),
        "of_bare": ratio(found["oncepay"], found["bare"]),
        "cpu_ms": medians(cpu_ms, 3),
        "times_usual_by_cpu": ratio(cpu_ms["usual"], cpu_ms["oncepay"]),
        "of_bare_by_cpu": ratio(cpu_ms["bare"], cpu_ms["oncepay"]),
        "half_of_peak": {
            "per_s": round(peak_per_s / 2),
            "p50_ms": round(statistics.median(each.percentile_ms(50) for each in paced), 1),
            "p99_ms": round(statistics.median(each.percentile_ms(99) for each in paced), 1),
        },
        "rounds": {name: [round(value) for value in values] for name, values in found.items()},
        "rounds_cpu_ms": {name: [round(value, 3) for value in values] for name, values in cpu_ms.items()},
        "rounds_p99_ms": [round(each.percentile_ms(99), 1) for each in paced],
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians count (default: %(default)s)")
    parser.add_argument("--count", type=int, default=6000, help="payments a round (default: %(default)s)")
    options = parser.parse_args()
    with cluster("bench-accept", "--shards", "s0", "--only", "etcd,nodes,stripe,router,keygen") as running:
        stripe = next(process["pid"] for process in running.status["processes"] if process["name"] == "stripe")
        with frozen(stripe):
            found = contest(running, options.rounds, options.count)
    print(json.dumps(found, indent=2))
    slow = found["half_of_peak"]["p99_ms"] > P99_MAX_MS
    if found["times_usual"] < TIMES_USUAL_MIN or found["of_bare"] < OF_BARE_MIN or slow:
        raise SystemExit(
            f"less than {TIMES_USUAL_MIN:g} times the usual, {OF_BARE_MIN:.0%} of bare, or p99 over {P99_MAX_MS:g} ms"
        )


if __name__ == "__main__":
    main()
