"""The memory of a router with 10,000 payments in flight.

    python -m loadtest.bench.inflight [--count 10000]

The stand-in for Stripe is frozen, as if Stripe didn't answer, and one router accepts payments until it has as many in flight
as it may have. Then Stripe answers again, and all of them have to be settled. Prints one JSON object; exits with 1 when the
router's resident memory was more than it may be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request
from typing import Any

import psutil
import uvloop

from loadtest.bench.accept import CONNECTIONS, frozen, rows
from loadtest.bench.own_cluster import Failed, Running, cluster, machine, payment_requests
from loadtest.bench.sender import send

RSS_MAX_MIB = 300.0
SETTLE_S = 300.0


def metric(port: int, name: str) -> float:
    """A metric without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


def measure(running: Running, count: int) -> dict[str, Any]:
    """Fill one router, look, and let it empty itself."""
    status = running.status
    pids = {process["name"]: process["pid"] for process in status["processes"]}
    port = next(process["port"] for process in status["processes"] if process["name"] == "router-1")
    router = psutil.Process(pids["router-1"])
    rss_before = router.memory_info().rss
    requests = payment_requests(running.keys(count), status["api_key"], wait_s=0)
    with frozen(pids["stripe"]):
        sent = uvloop.run(send(requests, [port], connections=CONNECTIONS))
        in_flight = metric(port, "oncepay_router_in_flight")
        rss = router.memory_info().rss
    if sent.statuses != {202: count} or in_flight != count:
        raise Failed(f"{in_flight:.0f} in flight after {sent.statuses}")
    began_s = time.monotonic()
    while (left := metric(port, "oncepay_router_in_flight")) and time.monotonic() < began_s + SETTLE_S:
        time.sleep(0.5)
    settled = asyncio.run(rows(status["shards"][0]["dsn"], "oncepay.payments where status = 'succeeded'"))
    if left or settled != count:
        raise Failed(f"{left:.0f} are still in flight after {SETTLE_S:.0f} s, {settled} are settled")
    return {
        "rss_mib": round(rss / 2**20, 1),
        "rss_before_mib": round(rss_before / 2**20, 1),
        "kib_each": round((rss - rss_before) / 1024 / count, 1),
        "in_flight": int(in_flight),
        "settled_after_s": round(time.monotonic() - began_s, 1),
        "rss_afterwards_mib": round(router.memory_info().rss / 2**20, 1),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="payments in flight (default: %(default)s)")
    options = parser.parse_args()
    with cluster("bench-inflight", "--shards", "s0", "--only", "etcd,nodes,stripe,router,keygen") as running:
        found = measure(running, options.count)
    print(json.dumps(found, indent=2))
    if found["rss_mib"] > RSS_MAX_MIB:
        raise SystemExit(f"that is more than {RSS_MAX_MIB:g} MiB")


if __name__ == "__main__":
    main()
