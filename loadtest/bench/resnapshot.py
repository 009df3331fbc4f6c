"""How long `oncepay aggregator rebuild` takes over what the feed has brought, as an operator runs it.

    python -m loadtest.bench.resnapshot [--payments 200000] [--times 1]

One shard of three nodes. A few payments are settled through the routers, as clients do it, and the others are put beside them by
SQL (`grow.sql`); the worker's feed brings all of them to the aggregator, which is measured too. Then all that is derived is made
anew by the command. Prints one JSON object; exits with 1 when the entries come slower than ten million in eight minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from loadtest.bench.accept import rows, superuser_dsn
from loadtest.bench.backlog import processor_s
from loadtest.bench.growth import grow, log_end
from loadtest.bench.own_cluster import Running, cluster, machine, oncepay
from loadtest.bench.rebuilt import ENTRIES_OF_MAX, SECONDS_MAX
from loadtest.bench.settle import round_of
from oncepay.feed import parse_lsn

FIRST = 300
CONNECTIONS = 32
BEHIND_MAX_BYTES = 512 << 20
BROUGHT_S = 3_600.0
"""How long the feed may take for all rows."""


def booked(running: Running) -> int:
    """How many entries the aggregator has, as they were booked."""
    return asyncio.run(rows(running.settings.aggregator_dsn, "oncepay.entries"))


def brought(running: Running, dsn: str) -> float:
    """Wait until the aggregator has all that the shard has; how many seconds it took."""
    end = asyncio.run(log_end(dsn))
    began_s = time.monotonic()
    while time.monotonic() - began_s < BROUGHT_S:
        [feed] = oncepay(running.environment, "aggregator", "status")[1]["feeds"]
        if parse_lsn(feed["position"]) >= end:
            return time.monotonic() - began_s
        time.sleep(1)
    raise SystemExit(f"the feed is at {feed['position']} after {BROUGHT_S:.0f} s")


def rebuild(running: Running) -> dict[str, Any]:
    """Run the command once, and see that all is there afterwards."""
    workers = [each["name"] for each in running.status["processes"] if each["name"].startswith("worker")]
    before, spent, began_s = booked(running), processor_s(running, *workers), time.monotonic()
    code, answer = oncepay(running.environment, "aggregator", "rebuild")
    seconds = time.monotonic() - began_s
    if code:
        raise SystemExit(f"the rebuild failed: {answer}")
    if booked(running) != before:
        raise SystemExit(f"{before:,} entries before, {booked(running):,} after")
    used = {name: now_s - spent[name] for name, now_s in processor_s(running, *workers).items()}
    return {
        "entries": before,
        "seconds": round(seconds, 1),
        "entries_per_s": round(before / seconds),
        "processor_s": {name: round(each_s, 1) for name, each_s in used.items()},
    }


def measured(running: Running, asked: argparse.Namespace) -> dict[str, Any]:
    """Fill the shard, wait for the feed, rebuild."""
    dsn = superuser_dsn(running)
    round_of(running, FIRST, CONNECTIONS, 0)
    planted_s = asyncio.run(grow(dsn, asked.payments, behind_max_bytes=BEHIND_MAX_BYTES))
    brought_s = brought(running, dsn)
    found = {"planting_s": round(planted_s, 1), "feed_after_it_s": round(brought_s, 1)}
    return {**found, "rebuilds": [rebuild(running) for _ in range(asked.times)], "machine": machine()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payments", type=int, default=200_000, help="how many are put beside them (default: %(default)s)")
    parser.add_argument("--buffers", default="4GB", help="the cache of the aggregator's Postgres (default: %(default)s)")
    parser.add_argument("--times", type=int, default=1, help="how often (default: %(default)s)")
    parser.add_argument("--attached", type=Path, help="the home of a cluster that runs already, and has its payments")
    return parser.parse_args()


def main() -> int:
    asked = options()
    with cluster("bench-resnapshot", "--shards", "s0", attached=asked.attached, aggregator_buffers=asked.buffers) as running:
        if asked.attached:
            found: dict[str, Any] = {"rebuilds": [rebuild(running) for _ in range(asked.times)], "machine": machine()}
        else:
            found = measured(running, asked)
    print(json.dumps(found, indent=2))
    return 1 if any(each["entries_per_s"] < ENTRIES_OF_MAX / SECONDS_MAX for each in found["rebuilds"]) else 0


if __name__ == "__main__":
    sys.exit(main())
