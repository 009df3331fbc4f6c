"""What a settled payment takes on disk, and whether payments cost the same on a shard that has many.

    python -m loadtest.bench.growth [--rows 500000] [--count 4000] [--rounds 3] [--buffers 4GB]

One shard of three nodes. 10,000 payments are settled through the routers, as clients do it; the size of the shard's tables with
their indexes, divided by them, is what a settled payment takes. Then a checkpoint is made, more are settled, and what each costs
is measured: processor time of routers, Postgres and etcd. Then `--rows` settled payments like these are put beside them by SQL
(`grow.sql`), and the same is measured again at three moments of the time between two checkpoints: right after one, when the log
gets most pages whole, and when MOMENTS more payments have come since.

Large shards take long to fill, and a machine that others use changes its speed meanwhile: ratios are of what a payment costs
to what it costs the stand-in for Stripe in the same round, whose work doesn't depend on the shard. Prints one JSON object; exits
with 1 when a payment takes more disk, or costs more on the large shard, than it may.
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
RATIO_MAX = 1.1
"""Of the processor time of a payment on the large shard, to that on the small one, over the moments of a checkpoint's time."""
MOMENTS = (0, 100_000, 300_000)
"""Payments since the checkpoint; at 300 a second there are half a million between two."""
AT_ONCE = 20_000
LOADERS = 2
LOG_MAX = "6GB"
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


async def grow(dsn: str, rows: int, *, first: int = 0, behind_max_bytes: int = 0, vacuum: bool = True) -> float:
    """Put settled payments there, numbered from `first` on; how many seconds it took.

    With `behind_max_bytes` no feed gets further behind the log: a slot that keeps too much of it is lost.
    """
    began_s, done, starts = time.monotonic(), 0, iter(range(first, first + rows, AT_ONCE))

    async def load() -> None:
        nonlocal done
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute("set synchronous_commit = local")
            for start in starts:
                while behind_max_bytes and await connection.fetchval(BEHIND) > behind_max_bytes:  # noqa: ASYNC110
                    await asyncio.sleep(0.5)
                count = min(AT_ONCE, first + rows - start)
                await connection.execute(GROW.replace("$1", str(count)).replace("$2", str(start)))
                done += count
                left_s = (time.monotonic() - began_s) / done * (rows - done)
                print(f"{done:,} of {rows:,} rows, {left_s:.0f} s left", file=sys.stderr, flush=True)
        finally:
            await connection.close()

    await asyncio.gather(*(load() for _ in range(LOADERS)))
    if vacuum:  # else autovacuum does it while payments are measured
        for table in ("payments", "entries", "balance_links"):
            await order(dsn, f"vacuum (analyze) oncepay.{table}")
    return time.monotonic() - began_s


async def order(dsn: str, *commands: str) -> None:
    """Run commands on one node."""
    connection = await asyncpg.connect(dsn)
    try:
        for command in commands:
            await connection.execute(command)
    finally:
        await connection.close()


async def give_room(running: Running, dsn: str) -> None:
    """Let the log's size make no checkpoint, and keep no second copy of it: for as long as the benchmark runs."""
    leader = dsn.partition("@")[2]
    for node in running.status["shards"][0]["nodes"]:
        here = dsn.replace(leader, f"127.0.0.1:{node['port']}/{leader.partition('/')[2]}")
        await order(here, f"alter system set max_wal_size = '{LOG_MAX}'", "alter system set archive_command = '/bin/true'")
        await order(here, "select pg_reload_conf()")


async def log_end(dsn: str) -> int:
    """How many bytes the shard's log has had until now."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("select (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint"))
    finally:
        await connection.close()


def cost(running: Running, dsn: str, count: int, rounds: int, first: int) -> dict[str, Any]:
    """Medians of what a payment costs, and the bytes that it writes to the leader's log."""
    began = asyncio.run(log_end(dsn))
    found = [round_of(running, count, CONNECTIONS, first + n * count) for n in range(rounds)]
    names = ("cpu_ms", "cpu_ms_path", "per_s", "p50_ms", "p99_ms")
    medians: dict[str, Any] = {name: statistics.median(each[name] for each in found) for name in names}
    medians["log_bytes"] = round((asyncio.run(log_end(dsn)) - began) / (count * rounds))
    for kind in ("Postgres of node", "router", "stripe"):
        medians[f"cpu_ms_{kind.split()[0].lower()}"] = statistics.median(each["cpu_ms_by_kind"][kind] for each in found)
    return medians


def ratios(large: dict[str, Any], small: dict[str, Any]) -> dict[str, float]:
    """What a payment costs on the large shard to what it costs on the small one, each by what the stand-in takes for it."""
    speed = large["cpu_ms_stripe"] / small["cpu_ms_stripe"]
    return {name: round(large[name] / small[name] / speed, 3) for name in ("cpu_ms", "cpu_ms_router", "cpu_ms_postgres")}


def measure(running: Running, rows: int, count: int, rounds: int) -> dict[str, Any]:
    dsn = superuser_dsn(running)
    asyncio.run(give_room(running, dsn))
    round_of(running, SMALL, CONNECTIONS, 0)
    disk = on_disk(dsn)
    asyncio.run(order(dsn, "checkpoint"))
    small = cost(running, dsn, count, rounds, SMALL)
    took_s = asyncio.run(grow(dsn, rows))
    asyncio.run(order(dsn, "checkpoint"))
    large: dict[int, dict[str, Any]] = {}
    planted = 0
    for number, moment in enumerate(MOMENTS):
        since = planted + number * count * rounds
        planted += max(0, moment - since)
        asyncio.run(grow(dsn, max(0, moment - since), first=rows + planted, vacuum=False))
        large[moment] = cost(running, dsn, count, rounds, (number + 2) * SMALL)
    each = {moment: ratios(found, small) for moment, found in large.items()}
    return {
        "bytes_each": disk["bytes_each"],
        "disk_small": disk,
        "disk_large": on_disk(dsn),
        "small": small,
        "large": large,
        "rows_added": rows,
        "rows_added_in_s": round(took_s),
        "ratios": each,
        "cpu_ratio": round(statistics.mean(found["cpu_ms"] for found in each.values()), 3),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="payments that are put there by SQL (default: %(default)s)")
    parser.add_argument("--count", type=int, default=4000, help="payments a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians count (default: %(default)s)")
    parser.add_argument("--buffers", default="1GB", help="the cache of each node's Postgres (default: %(default)s)")
    options = parser.parse_args()
    parts = ("--shards", "s0", "--only", "etcd,nodes,stripe,router,keygen")
    with cluster("bench-growth", *parts, node_buffers=options.buffers) as running:
        found = measure(running, options.rows, options.count, options.rounds)
    print(json.dumps(found, indent=2))
    if found["bytes_each"] > BYTES_MAX or found["cpu_ratio"] > RATIO_MAX:
        raise SystemExit(f"more than {BYTES_MAX} bytes, or {RATIO_MAX} times the processor time")


if __name__ == "__main__":
    main()
