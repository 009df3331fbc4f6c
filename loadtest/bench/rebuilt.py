"""How long it takes to rebuild what is derived of a shard, and how fast the four main answers are afterwards.

    python -m loadtest.bench.rebuilt [--entries 1000000] [--sellers 100000] [--times 1]

An aggregator with its Postgres gets the tables of a shard in batches, as workers of earlier versions sent them (`resnapshot.py`
measures what they do now); backlog.py makes the rows before, into a file: on a real cluster the shard's node does that. With
`--times 2` it happens again over what is there. Prints one JSON object; exits with 1 when a rebuild takes longer than eight
minutes for each ten million entries, or an answer longer than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from msgspec.structs import replace

from loadtest.bench.backlog import ENTRIES_EACH, START_LSN, Shape, batches, processor_s
from loadtest.bench.derived import MEDIAN_MAX_MS, ask
from loadtest.bench.own_cluster import Running, cluster, machine
from oncepay.feed import REBUILD_END, FeedBatch, RebuildHead, encode_batch, encode_head, framed

SECONDS_MAX = 480.0
"""For ENTRIES_OF_MAX entries."""
ENTRIES_OF_MAX = 10_000_000
ALL_SLOTS = ((0, 65_535),)


CHUNK = 256 * 1024


def make(shape: Shape, place: Path) -> float:
    """Write the body of a rebuild: head, batches, end; all rows are at the position of the rebuild. How many seconds it took."""
    began_s, lsn = time.process_time(), START_LSN + 100 * shape.payments
    with place.open("wb") as body:
        body.write(framed(encode_head(RebuildHead("s0", "bench", 1, lsn, ALL_SLOTS))))
        for batch in batches(shape):
            body.write(framed(encode_batch(_at_the_end(batch, lsn))))
        body.write(REBUILD_END)
    return time.process_time() - began_s


async def sent(place: Path) -> AsyncIterator[bytes]:
    """The file in chunks."""
    with place.open("rb") as body:
        while chunk := body.read(CHUNK):
            yield chunk


def _at_the_end(batch: FeedBatch, lsn: int) -> FeedBatch:
    payments = tuple(replace(row, lsn=lsn) for row in batch.payments)
    entries = tuple(replace(row, lsn=lsn) for row in batch.entries)
    links = tuple(replace(row, lsn=lsn) for row in batch.links)
    return FeedBatch(batch.shard, batch.incarnation, 1, 0, lsn, payments, entries, links)


async def rebuild(running: Running, shape: Shape) -> dict[str, Any]:
    """Send one rebuild, and wait for its answer."""
    place = running.home / "state" / "bench-rebuild"
    making_s = make(shape, place)
    url = f"http://127.0.0.1:{running.port('aggregator')}/v1/feed/s0/rebuild"
    headers = {"Authorization": f"Bearer {running.settings.internal_token}"}
    timeout = aiohttp.ClientTimeout(total=None)
    began_s, spent = time.perf_counter(), processor_s(running)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as http, http.post(url, data=sent(place)) as answer:
        told = await answer.text()
    seconds = time.perf_counter() - began_s
    if answer.status != 200:
        raise SystemExit(f"the rebuild was refused: {answer.status} {told}")
    body_bytes = place.stat().st_size
    place.unlink()
    entries = shape.payments * ENTRIES_EACH
    return {
        "entries": entries,
        "seconds": round(seconds, 1),
        "entries_per_s": round(entries / seconds),
        "body_bytes": body_bytes,
        "processor_s": {
            "making the body": round(making_s, 1),
            **{name: round(now_s - spent[name], 1) for name, now_s in processor_s(running).items()},
        },
        "machine": machine(),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="how many entries (default: %(default)s)")
    parser.add_argument("--buffers", default="4GB", help="the cache of the aggregator's Postgres (default: %(default)s)")
    parser.add_argument("--sellers", type=int, default=100_000, help="how many sellers (default: %(default)s)")
    parser.add_argument("--apart", action="store_true", help="each entry and link in a row of its own, as in earlier versions")
    parser.add_argument("--times", type=int, default=1, help="how often (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=400, help="how often each answer is asked for (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    asked = options()
    shape = Shape(asked.entries, asked.sellers, versions=1, apart=asked.apart)
    with cluster(
        "bench-rebuilt", "--shards", "s0", "--only", "etcd,aggregator-db,aggregator", aggregator_buffers=asked.buffers
    ) as running:
        found = [asyncio.run(rebuild(running, shape)) for _ in range(asked.times)]
        answers = asyncio.run(ask(running, asked.sellers, asked.requests))
    print(json.dumps({"shape": shape._asdict(), "rebuilds": found, "answers": answers}, indent=2))
    late = any(each["seconds"] > SECONDS_MAX * each["entries"] / ENTRIES_OF_MAX for each in found)
    return 1 if late or any(each["median_ms"] > MEDIAN_MAX_MS for each in answers.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
