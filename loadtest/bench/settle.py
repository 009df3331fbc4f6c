"""What a settled payment costs: processor time in each kind of process, and how many are settled a second.

    python -m loadtest.bench.settle [--count 6000] [--rounds 3] [--home .oncepay]

A payment is created and confirmed at the stand-in for Stripe, its row goes over the quorum three times, it is answered with
201, and Stripe's webhooks for it come in. Processor time is what the kernel accounted to the processes from before the
first request until the last webhook was answered; the stand-in and the client are not part of the sum. Prints one JSON
object; exits with 1 when it takes more than it may. `--home` takes the cluster that runs there, else one of its own with one
shard is started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

import uvloop

from loadtest.bench.idle import costs
from loadtest.bench.own_cluster import Failed, Running, cluster, machine, payment_requests
from loadtest.bench.sender import Sent, send

CPU_MAX_MS = 1.5
PER_S_MIN = 300.0
QUIET_S = 10.0
"""How long the last webhooks may take after the last answer."""
SINGLE = ("router", "Postgres of node")
"""What every payment goes through: routers, and the shard's three Postgres nodes."""


def webhooks(running: Running) -> float:
    """Webhooks that the routers have answered."""
    total = 0.0
    for process in running.status["processes"]:
        if process["name"].startswith("router"):
            with urllib.request.urlopen(f"http://127.0.0.1:{process['port']}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("oncepay_router_webhooks_total{"))
    return total


def wait_quiet(running: Running) -> None:
    """Until no more webhooks come in."""
    deadline_s, before = time.monotonic() + QUIET_S, -1.0
    while (now := webhooks(running)) != before and time.monotonic() < deadline_s:
        before = now
        time.sleep(0.5)


def round_of(running: Running, count: int, connections: int, first: int) -> dict[str, Any]:
    """Settle `count` payments, and look at what that cost."""
    requests = payment_requests(running.keys(count), running.status["api_key"], wait_s=30, first=first)
    wait_quiet(running)
    had = webhooks(running)
    before = costs(running.home, with_memory=False)
    sent: Sent = uvloop.run(send(requests, [running.port("router")], connections=connections))
    wait_quiet(running)
    after = costs(running.home, with_memory=False)
    if sent.statuses.get(201, 0) != count:
        raise Failed(f"not all were settled: {sent.statuses}")
    cpu_ms = {kind: 1000 * (cost.cpu_s - before[kind].cpu_s) / count for kind, cost in after.items() if kind in before}
    ours = {kind: ms for kind, ms in cpu_ms.items() if kind not in {"stripe", "tipalti"}}
    return {
        "per_s": round(sent.per_s, 1),
        "p50_ms": round(sent.percentile_ms(50), 1),
        "p99_ms": round(sent.percentile_ms(99), 1),
        "webhooks": webhooks(running) - had,
        "cpu_ms": round(sum(ours.values()), 3),
        "cpu_ms_path": round(sum(ours[kind] for kind in SINGLE), 3),
        "cpu_ms_by_kind": {kind: round(ms, 3) for kind, ms in sorted(cpu_ms.items(), key=lambda item: -item[1]) if ms >= 0.001},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000, help="payments a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians count (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=512, help="payments at once (default: %(default)s)")
    parser.add_argument("--home", type=Path, help="the home of a cluster that runs already")
    options = parser.parse_args()
    asyncio.set_event_loop_policy(None)
    with cluster("bench-settle", "--shards", "s0", attached=options.home) as running:
        round_of(running, 500, options.connections, 0)  # connections are opened, plans are made
        rounds = [round_of(running, options.count, options.connections, n * options.count) for n in range(options.rounds)]
    found = {
        "cpu_ms": statistics.median(each["cpu_ms"] for each in rounds),
        "cpu_ms_path": statistics.median(each["cpu_ms_path"] for each in rounds),
        "per_s": statistics.median(each["per_s"] for each in rounds),
        "rounds": rounds,
        "machine": machine(),
    }
    print(json.dumps(found, indent=2))
    if found["cpu_ms"] > CPU_MAX_MS or found["per_s"] < PER_S_MIN:
        raise SystemExit(f"that is more than {CPU_MAX_MS} ms, or fewer than {PER_S_MIN:g} a second")


if __name__ == "__main__":
    main()
