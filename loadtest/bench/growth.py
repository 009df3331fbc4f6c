"""What a settled payment takes on disk, and whether payments cost the same on a shard that has many.

    python -m loadtest.bench.growth [--rows 500000] [--count 4000] [--rounds 3]

One shard of three nodes. 10,000 payments are settled through the routers, as clients do it; the size of the shard's tables with
their indexes, divided by them, is what a settled payment takes. Then more are settled, and what each costs is measured: processor
time of routers and of Postgres. Then `--rows` settled payments like these are put beside them by SQL (`grow.sql`), and the same
is measured again. Prints one JSON object; exits with 1 when a payment takes more disk, or costs more on the large shard, than it
may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg

from loadtest.bench.accept import superuser_dsn
from loadtest.bench.own_cluster import Running, cluster, machine
from loadtest.bench.settle import round_of

SMALL = 10_000
CONNECTIONS = 128
BYTES_MAX = 1_200
RATIO_MAX = 1.25
"""Of the processor time of a payment on the large shard, to that on the small one. Caches alone make some difference."""
AT_ONCE = 20_000
GROW = (Path(__file__).parent / "grow.sql").read_text(encoding="utf-8")
BEHIND = """
select coalesce(max(pg_current_wal_lsn() - confirmed_flush_lsn), 0)::bigint from pg_replication_slots
where slot_type = 'logical' and not temporary
"""
SIZES = """
select c.relname as name, pg_table_size(c.oid) as bytes from pg_class c
where c.relnamespace = 'oncepay'::regnamespace and c.relkind in ('r', 'i')
"""


async def sizes(dsn: str) -> tuple[int, dict[str, int]]:
    """Payments, and bytes of each table and index of the shard."""
    connection = await asyncpg.connect(dsn)
    try:
        count = int(await connection.fetchval("select count(*) from oncepay.payments where status = 'succeeded'"))
        return count, {row["name"]: row["bytes"] for row in await connection.fetch(SIZES)}
    finally:
        await connection.close()


def on_disk(dsn: str) -> dict[str, Any]:
    """Bytes of a settled payment, in all and by table and index."""
    count, found = asyncio.run(sizes(dsn))
    each = {name: round(size / count, 1) for name, size in sorted(found.items(), key=lambda item: -item[1])}
    return {
        "payments": count,
        "bytes_each": round(sum(found.values()) / count),
        "by_relation": {n: b for n, b in each.items() if b >= 1},
    }


async def grow(dsn: str, rows: int, *, behind_max_bytes: int = 0) -> float:
    """Put settled payments there; how many seconds it took. With `behind_max_bytes` no feed gets further behind the log: a slot
    that keeps too much of it is lost."""
    connection = await asyncpg.connect(dsn)
    began_s = time.monotonic()
    try:
        await connection.execute("set synchronous_commit = local")
        for first in range(0, rows, AT_ONCE):
            while behind_max_bytes and await connection.fetchval(BEHIND) > behind_max_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
            await connection.execute(GROW.replace("$1", str(min(AT_ONCE, rows - first))).replace("$2", str(first)))
            left_s = (time.monotonic() - began_s) / (first + AT_ONCE) * max(0, rows - first - AT_ONCE)
            print(f"{min(first + AT_ONCE, rows):,} of {rows:,} rows, {left_s:.0f} s left", file=sys.stderr, flush=True)
        for table in ("payments", "entries", "balance_links"):
            await connection.execute(f"vacuum (analyze) oncepay.{table}")  # else autovacuum does it while payments are measured
    finally:
        await connection.close()
    return time.monotonic() - began_s


async def log_end(dsn: str) -> int:
    """How many bytes the shard's log has had until now."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("select (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint"))
    finally:
        await connection.close()


def cost(running: Running, dsn: str, count: int, rounds: int, first: int) -> dict[str, Any]:
    """Medians of what a payment costs, and the bytes that it writes to the leader's log."""
    round_of(running, 500, CONNECTIONS, first)
    began = asyncio.run(log_end(dsn))
    found = [round_of(running, count, CONNECTIONS, first + n * count) for n in range(rounds)]
    names = ("cpu_ms", "cpu_ms_path", "per_s", "p50_ms", "p99_ms")
    medians: dict[str, Any] = {name: statistics.median(each[name] for each in found) for name in names}
    medians["log_bytes"] = round((asyncio.run(log_end(dsn)) - began) / (count * rounds))
    medians["cpu_ms_postgres"] = statistics.median(each["cpu_ms_by_kind"]["Postgres of node"] for each in found)
    return medians


def measure(running: Running, rows: int, count: int, rounds: int) -> dict[str, Any]:
    dsn = superuser_dsn(running)
    round_of(running, SMALL, CONNECTIONS, 0)
    disk = on_disk(dsn)
    small = cost(running, dsn, count, rounds, SMALL)
    took_s = asyncio.run(grow(dsn, rows))
    large = cost(running, dsn, count, rounds, 2 * SMALL)
    return {
        "bytes_each": disk["bytes_each"],
        "disk_small": disk,
        "disk_large": on_disk(dsn),
        "small": small,
        "large": large,
        "rows_added": rows,
        "rows_added_in_s": round(took_s),
        "cpu_ratio": round(large["cpu_ms"] / small["cpu_ms"], 3),
        "cpu_ratio_postgres": round(large["cpu_ms_postgres"] / small["cpu_ms_postgres"], 3),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="payments that are put there by SQL (default: %(default)s)")
    parser.add_argument("--count", type=int, default=4000, help="payments a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians count (default: %(default)s)")
    options = parser.parse_args()
    with cluster("bench-growth", "--shards", "s0", "--only", "etcd,nodes,stripe,router,keygen") as running:
        found = measure(running, options.rows, options.count, options.rounds)
    print(json.dumps(found, indent=2))
    if found["bytes_each"] > BYTES_MAX or found["cpu_ratio"] > RATIO_MAX:
        raise SystemExit(f"more than {BYTES_MAX} bytes, or {RATIO_MAX} times the processor time")


if __name__ == "__main__":
    main()
