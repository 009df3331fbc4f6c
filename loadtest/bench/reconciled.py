"""How long a reconciliation takes against Stripe's stand-in, and how much memory it needs.

    python -m loadtest.bench.reconciled [--transactions 1000000] [--sellers 10000]

An aggregator with its Postgres gets the entries of as many payments (loadtest/bench/backlog.py) by a rebuild; the stand-in gets
their balance transactions, written into its state file. One of every thousand has another amount there, and has to be found.
Prints one JSON object; exits with 1 when the run takes longer than ten minutes a million, doesn't find exactly these, or when
the aggregator's memory grows by more than MEMORY_MAX_MIB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil

from loadtest.bench.backlog import STRIPE_FEE, Shape, at_us, gross, key_of, processor_s, transaction_id
from loadtest.bench.own_cluster import Running, cluster, machine
from loadtest.bench.rebuilt import rebuild

SECONDS_MAX = 600.0
"""For a million transactions."""
MEMORY_MAX_MIB = 100.0
LOOK_S = 0.5
PLANTED_EVERY = 1000
PACK = msgspec.msgpack.Encoder().encode
INSERT = """
insert into balance_transactions (ord, created, data, source, type, currency, net, available_on) values (?, ?, ?, ?, ?, ?, ?, ?)
"""


@contextlib.contextmanager
def stand_in(running: Running, state: Path) -> Iterator[None]:
    """The stand-in at the address that the settings name, with its state in a file, until the end."""
    port = running.settings.stripe.base_url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "sandbox.stripe", "--port", port, "--state", str(state)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("listening on "):
            raise SystemExit("the stand-in didn't start")
        yield
    finally:
        process.terminate()
        process.wait(30)


def fill(state: Path, count: int) -> int:
    """Write the balance transactions of `count` payments into the stand-in's state; how many of them differ."""
    planted = 0

    def rows() -> Iterator[tuple[Any, ...]]:
        nonlocal planted
        for number in range(count):
            created_s, amount = at_us(number) // 1_000_000, gross(number)
            if number % PLANTED_EVERY == PLANTED_EVERY // 2:
                planted += 1
                amount += 1
            source = f"ch_3{key_of(number)[4:28]}"
            data = PACK(
                [transaction_id(number + 1), created_s, amount, "usd", "charge", "charge", created_s, STRIPE_FEE,
                 "Stripe processing fees", source, None]
            )  # fmt: skip
            yield number + 1, created_s, data, source, "charge", "usd", amount - STRIPE_FEE, created_s

    with contextlib.closing(sqlite3.connect(state)) as connection, connection:
        connection.executemany(INSERT, rows())
    return planted


async def reconcile(running: Running, count: int) -> dict[str, Any]:
    """Ask for a run over all of it, and wait for its end."""
    status = running.status
    process = psutil.Process(next(each["pid"] for each in status["processes"] if each["name"] == "aggregator"))
    days = [dt.datetime.fromtimestamp(at_us(number) / 1e6, dt.UTC).date().isoformat() for number in (0, count - 1)]
    before, most, spent = process.memory_info().rss, 0, processor_s(running)
    headers = {"Authorization": f"Bearer {status['api_key']}"}
    began_s = time.perf_counter()
    async with aiohttp.ClientSession(status["urls"]["aggregator"], headers=headers) as http:
        async with http.post("/v1/reconciliations", json={"from": days[0], "to": days[1], "grace_s": 0}) as answer:
            begun = await answer.json()
        if answer.status != 202:
            raise SystemExit(f"no reconciliation began: {begun}")
        run: dict[str, Any] = {"state": "running"}
        while run["state"] == "running":
            await asyncio.sleep(LOOK_S)
            most = max(most, process.memory_info().rss)
            async with http.get(f"/v1/reconciliations/{begun['id']}") as answer:
                run = await answer.json()
    return {
        "state": run["state"],
        "problem": run["problem"],
        "seconds": round(time.perf_counter() - began_s, 1),
        "checked": run["checked"],
        "differences": run["kinds"],
        "processor_s": {name: round(now_s - spent[name], 1) for name, now_s in processor_s(running).items()},
        "rss_before_mib": round(before / 2**20, 1),
        "rss_most_mib": round(most / 2**20, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transactions", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--buffers", default="4GB", help="the cache of the aggregator's Postgres (default: %(default)s)")
    parser.add_argument("--sellers", type=int, default=10_000, help="of how many sellers (default: %(default)s)")
    asked = parser.parse_args()
    shape = Shape(asked.transactions * 2, asked.sellers, versions=1)
    with cluster(
        "bench-reconciled", "--shards", "s0", "--only", "etcd,aggregator-db,aggregator", aggregator_buffers=asked.buffers
    ) as running:
        rebuilt = asyncio.run(rebuild(running, shape))
        state = running.home / "state" / "bench-stripe"
        with stand_in(running, state):
            pass  # it makes its tables
        planted = fill(state, asked.transactions)
        with stand_in(running, state):
            found = asyncio.run(reconcile(running, asked.transactions))
    wanted = {"net_differs": planted} if planted else {}
    print(json.dumps({"machine": machine(), "planted": planted, "rebuilt": rebuilt, "reconciled": found}, indent=2))
    late = found["seconds"] > SECONDS_MAX * max(asked.transactions, 100_000) / 1_000_000
    grown = found["rss_most_mib"] - found["rss_before_mib"] > MEMORY_MAX_MIB
    return 1 if found["state"] != "done" or found["differences"] != wanted or late or grown else 0


if __name__ == "__main__":
    sys.exit(main())
