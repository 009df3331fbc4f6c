"""How fast a backlog of ledger entries is applied, and how fast the four main answers are afterwards.

    python -m loadtest.bench.derived [--entries 1000000] [--sellers 10000] [--shards 1] [--requests 400]

An aggregator with its Postgres, and nothing that feeds it but this: batches of FEED_ROWS_MAX rows, as a worker sends them when it
has fallen behind (loadtest/bench/backlog.py). Then revenue by day, balance, orders and the statement of sellers and buyers at
random, one request after the other, over HTTP. Prints one JSON object; exits with 1 when an answer takes longer at the median
than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time

import aiohttp
import msgspec

from loadtest.bench.backlog import Shape, apply_all
from loadtest.bench.own_cluster import Running, cluster, machine

MEDIAN_MAX_MS = 20.0


async def ask(running: Running, sellers: int, requests: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each of the main answers, of sellers and buyers at random."""
    status = running.status
    chance, found = random.Random(7), dict[str, dict[str, float]]()
    paths = {
        "revenue": "/v1/sellers/seller-{seller}/revenue?currency=usd&interval=day",
        "balance": "/v1/sellers/seller-{seller}/balance",
        "orders": "/v1/buyers/buyer-{buyer}/orders",
        "statement": "/v1/sellers/seller-{seller}/statement?currency=usd",
    }
    async with aiohttp.ClientSession(
        status["urls"]["aggregator"], headers={"Authorization": f"Bearer {status['api_key']}"}
    ) as http:
        for name, path in paths.items():
            times = []
            for _ in range(requests):
                asked = path.format(seller=chance.randrange(sellers), buyer=chance.randrange(sellers * 2))
                began_s = time.perf_counter()
                async with http.get(asked) as answer:
                    body = await answer.read()
                times.append((time.perf_counter() - began_s) * 1000)
                if answer.status != 200:
                    raise SystemExit(f"{asked}: {answer.status} {msgspec.json.decode(body)}")
            times.sort()
            found[name] = {"median_ms": round(statistics.median(times), 2), "p99_ms": round(times[int(len(times) * 0.99) - 1], 2)}
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="how many entries (default: %(default)s)")
    parser.add_argument("--buffers", default="4GB", help="the cache of the aggregator's Postgres (default: %(default)s)")
    parser.add_argument("--sellers", type=int, default=10_000, help="how many sellers (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="how many shards' backlogs at once (default: %(default)s)")
    parser.add_argument("--apart", action="store_true", help="each entry and link in a row of its own, as in earlier versions")
    parser.add_argument(
        "--versions", type=int, choices=(1, 2, 3), default=3, help="rows of each payment in the log (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=400, help="how often each answer is asked for (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    asked = options()
    shape = Shape(asked.entries, asked.sellers, asked.shards, asked.versions, asked.apart)
    with cluster(
        "bench-derived", "--shards", "s0", "--only", "etcd,aggregator-db,aggregator", aggregator_buffers=asked.buffers
    ) as running:
        applied = asyncio.run(apply_all(running, shape))
        loaded = machine()
        answers = asyncio.run(ask(running, asked.sellers, asked.requests))
    print(json.dumps({"machine": loaded, "shape": shape._asdict(), "applied": applied.shown(), "answers": answers}, indent=2))
    return 1 if any(each["median_ms"] > MEDIAN_MAX_MS for each in answers.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
