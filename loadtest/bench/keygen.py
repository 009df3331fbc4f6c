"""How fast one key service process issues keys, against two other ways to do it; and what it takes at rest.

    python -m loadtest.bench.keygen [--seconds 2] [--rounds 5]

Prints one JSON object. The other ways are a bare aiohttp handler that answers with a fresh UUID 7, and a Postgres table of
prepared keys taken with FOR UPDATE SKIP LOCKED behind the same handler; neither checks an API key, the key service does.
Each is a closed loop of 32 connections. The ways take turns, round by round, since other work on the machine comes and goes;
figures are medians of the rounds, ratios the medians of the rounds' ratios. Exit code 1 when one is below what is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import psutil
import uvloop
from msgspec import structs

from deploy.local.ports import free_port
from loadtest.bench.http_load import load
from loadtest.processes import Child, EtcdMembers, keygen, postgres, running, until_answers, write_settings
from oncepay.apikeys import ApiKey, digest, new_key
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings, Settings

WARM_UP_S = 0.3
SETTLE_S = 2.0
HUNDRED = 100
WRITES_S = 15.0
PREPARED_A_SECOND = 250_000
"""More than a table can give: it must not run out."""
TAKEOVER_BLOCK_KEYS = 200_000
"""Twice what a replica takes of a block at its start: the dead one leaves something to take over."""
TAKEOVER_DEMAND = 1_000
TAKEOVER_WAIT_S = 30.0

SINGLES_RATIO_LEAST = 0.8
HUNDREDS_KEYS_PER_S_LEAST = 300_000
TABLE_RATIO_LEAST = 4.0
ETCD_WRITES_PER_S_MOST = 1.0
TAKEOVER_S_MOST = 10.0


class Way(NamedTuple):
    """One way to get keys."""

    name: str
    child: Child
    port: int
    headers: dict[str, str]


class Measured(NamedTuple):
    """One way's answers for a while."""

    keys_per_s: float
    cpu_us_per_request: float
    p50_ms: float
    p99_ms: float

    def rounded(self) -> dict[str, float]:
        return {
            "keys_per_s": round(self.keys_per_s),
            "cpu_us_per_request": round(self.cpu_us_per_request, 1),
            "p50_ms": round(self.p50_ms, 2),
            "p99_ms": round(self.p99_ms, 2),
        }


async def measure(way: Way, count: int, seconds: float) -> Measured:
    """Keys a second by `count`, after a short warm-up; CPU is the handler process's own."""
    body = {"count": count}
    await load(way.port, "/v1/keys", body, seconds=WARM_UP_S, status=201, headers=way.headers)
    watched = psutil.Process(way.child.pid)
    before = watched.cpu_times()
    found = await load(way.port, "/v1/keys", body, seconds=seconds, status=201, headers=way.headers)
    after = watched.cpu_times()
    assert found.failed == 0, f"{way.name}: {found.failed} requests failed"
    cpu_s = after.user + after.system - before.user - before.system
    return Measured(found.per_s * count, 1e6 * cpu_s / found.done, found.percentile_ms(50), found.percentile_ms(99))


async def rounds(ways: list[Way], count: int, seconds: float, number: int) -> dict[str, list[Measured]]:
    """Each way once a round, in an order that moves on from round to round."""
    found: dict[str, list[Measured]] = {way.name: [] for way in ways}
    for turn in range(number):
        at = turn % len(ways)
        for way in ways[at:] + ways[:at]:
            found[way.name].append(await measure(way, count, seconds))
            print(f"{way.name} by {count}: {found[way.name][-1].keys_per_s:,.0f} keys/s", file=sys.stderr)
    return found


def summary(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Medians by way, and the key service's share of each other way's keys."""
    ours = found["keygen"]
    result: dict[str, Any] = {name: Measured(*map(median, zip(*all_of, strict=True))).rounded() for name, all_of in found.items()}
    for name, others in found.items():
        if name != "keygen":
            ratios = [mine.keys_per_s / other.keys_per_s for mine, other in zip(ours, others, strict=True)]
            result[f"to_{name}"] = round(median(ratios), 2)
    return result


def metric(port: int, name: str) -> float:
    """A metric without labels of the process at that port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise ValueError(f"there is no metric {name}")


async def etcd_writes_per_s(way: Way) -> float:
    """Writes of the key service to etcd while keys are taken by the hundred without a pause."""
    before = metric(way.port, "oncepay_keys_etcd_writes_total")
    await load(way.port, "/v1/keys", {"count": HUNDRED}, seconds=WRITES_S, status=201, headers=way.headers)
    return (metric(way.port, "oncepay_keys_etcd_writes_total") - before) / WRITES_S


async def takeover_s(folder: Path, etcd: EtcdSettings) -> float:
    """From kill -9 of a replica until another one issues from its block, while keys are asked for.

    In a pool of its own, of small blocks.
    """
    settings = Settings(etcd=structs.replace(etcd, prefix="/takeover"), auth=False)
    config = write_settings(folder / "takeover.toml", settings)
    options = ("--block-keys", str(TAKEOVER_BLOCK_KEYS), "--ahead-s", "1")
    with ExitStack() as stack:
        killed, other = free_port(), free_port()
        first = stack.enter_context(running(keygen(folder, config, "keygen-killed", killed, *options)))
        stack.enter_context(running(keygen(folder, config, "keygen-other", other, *options)))
        for port in (killed, other):
            await asyncio.to_thread(until_answers, f"http://127.0.0.1:{port}/readyz")
        first.kill()
        killed_at = time.monotonic()
        body = {"count": TAKEOVER_DEMAND}
        while time.monotonic() < killed_at + TAKEOVER_WAIT_S:
            await load(other, "/v1/keys", body, seconds=0.1, status=201, connections=1)
            if await asyncio.to_thread(metric, other, "oncepay_keys_takeovers_total"):
                return time.monotonic() - killed_at
        raise TimeoutError(f"no block was taken over in {TAKEOVER_WAIT_S} s")


def import_ms() -> float:
    """Wall time of importing the service in a fresh interpreter, over that of an empty one; the best of three."""

    def run_s(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    return round(1000 * (min(run_s("import keygen.service") for _ in range(3)) - min(run_s("pass") for _ in range(3))))


async def bench(stack: ExitStack, folder: Path, dsn: str, seconds: float, number: int) -> dict[str, Any]:
    etcd = stack.enter_context(EtcdMembers(folder))
    config = write_settings(folder / "oncepay.toml", Settings(etcd=etcd.settings))
    api_key = new_key()
    async with Etcd(etcd.settings) as client:
        await client.put(f"apikeys/{digest(api_key)}", msgspec.json.encode(ApiKey("bench")))
    ours, bare, table = (free_port() for _ in range(3))
    began = time.monotonic()
    service = stack.enter_context(running(keygen(folder, config, "keygen", ours)))
    await asyncio.to_thread(until_answers, f"http://127.0.0.1:{ours}/readyz")
    ready_s = time.monotonic() - began
    await asyncio.sleep(SETTLE_S)
    memory = psutil.Process(service.pid).memory_full_info()

    prepared = str(round(PREPARED_A_SECOND * (seconds + WARM_UP_S) * number))
    python = (sys.executable, "-m")
    bare_child = Child("bare", *python, "loadtest.bench.bare", "--port", str(bare))
    options = ("--port", str(table), "--dsn", dsn, "--prepare", prepared)
    table_child = Child("table", *python, "loadtest.bench.table", *options, log=folder / "table.log")
    ways = [
        Way("keygen", service, ours, {"Authorization": f"Bearer {api_key}"}),
        Way("bare", stack.enter_context(running(bare_child)), bare, {}),
        Way("table", stack.enter_context(running(table_child)), table, {}),
    ]
    for way in ways:
        await asyncio.to_thread(until_answers, f"http://127.0.0.1:{way.port}/", 120)

    singles = summary(await rounds(ways, 1, seconds, number))
    hundreds = summary(await rounds(ways, HUNDRED, seconds, number))
    writes_per_s = await etcd_writes_per_s(ways[0])

    for way in ways:
        way.child.stop()
    taken_over_s = await takeover_s(folder, etcd.settings)
    return {
        "singles": singles,
        "hundreds": hundreds,
        "etcd_writes_per_s_by_hundreds": round(writes_per_s, 2),
        "takeover_s": round(taken_over_s, 1),
        "idle_rss_mib": round(memory.rss / 2**20, 1),
        "idle_pss_mib": round(memory.pss / 2**20, 1),
        "ready_s": round(ready_s, 2),
        "import_ms": import_ms(),
        "cores": os.cpu_count(),
    }


def promises(found: dict[str, Any]) -> dict[str, bool]:
    """What is promised of the key service, and whether this run has it."""
    singles, hundreds = found["singles"], found["hundreds"]
    return {
        f"singles at {SINGLES_RATIO_LEAST:g} of the bare handler's": singles["to_bare"] >= SINGLES_RATIO_LEAST,
        f"{HUNDREDS_KEYS_PER_S_LEAST:,} keys/s by the hundred": hundreds["keygen"]["keys_per_s"] >= HUNDREDS_KEYS_PER_S_LEAST,
        f"{TABLE_RATIO_LEAST:g} times the table, singly": singles["to_table"] >= TABLE_RATIO_LEAST,
        f"{TABLE_RATIO_LEAST:g} times the table, by the hundred": hundreds["to_table"] >= TABLE_RATIO_LEAST,
        "less than one write to etcd a second": found["etcd_writes_per_s_by_hundreds"] < ETCD_WRITES_PER_S_MOST,
        f"a dead replica's block taken over within {TAKEOVER_S_MOST:g} s": found["takeover_s"] <= TAKEOVER_S_MOST,
    }


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each measurement takes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (default: %(default)s)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-keygen-")))
        folder.chmod(0o755)
        dsn = stack.enter_context(postgres(folder / "postgres"))
        found = uvloop.run(bench(stack, folder, dsn, options.seconds, options.rounds))
    holds = promises(found)
    print(json.dumps(found | {"promises": holds}, indent=2))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
