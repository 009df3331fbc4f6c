"""How far the aggregator is behind the shards while payments are settled at a steady pace.

    python -m loadtest.bench behind [--per-s 200] [--seconds 30] [--home .oncepay]

Every 10 ms it is noted how far the log of one shard is, and how far the aggregator has applied it. Behind is the age of the
oldest part of the log that isn't applied, and 0 when all is. Prints one JSON object; exits with 1 when the 99th percentile is
more than it may be, or a payment wasn't settled. `--home` takes the cluster that runs there, else one of its own is started.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import time
from pathlib import Path
from typing import Any

import asyncpg

from loadtest.bench.accept import superuser_dsn
from loadtest.bench.own_cluster import Failed, Running, cluster, machine, payment_requests
from loadtest.bench.sender import Sent, send

BEHIND_MAX_MS = 500.0
EVERY_S = 0.01
SETTLE_IN_S = 3
"""Connections are opened and plans made for so long, and not counted."""
CONNECTIONS = 400


class Watch:
    """Samples both positions until it is stopped."""

    def __init__(self, shard_dsn: str, aggregator_dsn: str, shard: str) -> None:
        self._dsns = (shard_dsn, aggregator_dsn)
        self._shard = shard
        self._ends: list[tuple[float, int]] = []
        self._applied: list[tuple[float, int]] = []

    async def run(self, stop: asyncio.Event) -> None:
        end = self._sample(self._dsns[0], "select (pg_current_wal_flush_lsn() - '0/0')::bigint", self._ends, stop)
        position = "select (lsn - '0/0')::bigint from oncepay.watermarks where shard = $1"
        await asyncio.gather(end, self._sample(self._dsns[1], position, self._applied, stop, self._shard))

    async def _sample(self, dsn: str, query: str, into: list[tuple[float, int]], stop: asyncio.Event, *arguments: object) -> None:
        connection = await asyncpg.connect(dsn)
        try:
            while not stop.is_set():
                asked_s = time.monotonic()
                into.append((asked_s, int(await connection.fetchval(query, *arguments) or 0)))
                await asyncio.sleep(max(0.0, asked_s + EVERY_S - time.monotonic()))
        finally:
            await connection.close()

    def behind_ms(self, since_s: float) -> list[float]:
        """Ascending, from `since_s` on. A position is as old as the sample before the one that was first past it."""
        ends = [end for _, end in self._ends]
        found = []
        for at_s, applied in self._applied:
            first = bisect.bisect_right(ends, applied)
            if at_s >= since_s:
                behind_s = at_s - self._ends[max(first - 1, 0)][0] if first < len(ends) else 0.0
                found.append(max(0.0, behind_s) * 1000)
        return sorted(found)


async def measure(running: Running, per_s: float, seconds: float) -> dict[str, Any]:
    status = running.status
    count = round(per_s * (seconds + SETTLE_IN_S))
    requests = payment_requests(running.keys(count), status["api_key"], wait_s=30)
    watch, stop = Watch(superuser_dsn(running), status["aggregator_dsn"], status["shards"][0]["name"]), asyncio.Event()
    watching = asyncio.create_task(watch.run(stop))
    began_s = time.monotonic()
    sent: Sent = await send(requests, [running.port("router")], connections=CONNECTIONS, rate_per_s=per_s)
    stop.set()
    await watching
    if sent.statuses.get(201, 0) != count:
        raise Failed(f"not all were settled: {sent.statuses}")
    found = watch.behind_ms(began_s + SETTLE_IN_S)
    percentiles = {f"p{percent}_ms": round(found[int(len(found) * percent / 100)], 1) for percent in (50, 99)}
    return {
        "settled_per_s": round(sent.per_s, 1),
        "samples": len(found),
        **percentiles,
        "max_ms": round(found[-1], 1),
        "payment_p50_ms": round(sent.percentile_ms(50), 1),
        "payment_p99_ms": round(sent.percentile_ms(99), 1),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-s", type=float, default=200, help="payments a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="how long (default: %(default)s)")
    parser.add_argument("--home", type=Path, help="the home of a cluster that runs already")
    options = parser.parse_args()
    with cluster("bench-behind", "--shards", "s0", attached=options.home) as running:
        found = asyncio.run(measure(running, options.per_s, options.seconds))
    print(json.dumps(found, indent=2))
    if found["p99_ms"] > BEHIND_MAX_MS:
        raise SystemExit(f"the aggregator is more than {BEHIND_MAX_MS:g} ms behind at the 99th percentile")


if __name__ == "__main__":
    main()
