"""How fast the feed works a backlog off, beside what `pg_recvlogical` writes to /dev/null of the same slot in the same run.

    python -m tests.shard.worker.bench_feed [--rows 1000000] [--rounds 3]

Prints one JSON object. One Postgres that stands alone, four changes a payment in transactions of 50 rows; the worker's own feed
and forwarder (decoding, barriers, sieve, batches over HTTP) into a process that only takes batches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import asyncpg

from deploy.programs import postgres_bin
from oncepay.feed import lsn_text, parse_lsn
from shard.worker.stream import PUBLICATION, SLOT
from tests.postgres_fixture import PostgresServer
from tests.shard.worker.harness import ShardDatabase, eventually, running_feed, settings_for, shard_database

VERSIONS = 4
ROWS_EACH = 50
BASELINE, KEPT = "baseline", "kept"
_SQL = {
    part.partition("\n")[0]: part.partition("\n")[2]
    for part in (Path(__file__).parent / "bench_backlog.sql").read_text().split("-- name: ")[1:]
}


async def backlog(shard: ShardDatabase, rows: int) -> None:
    """Make so many changes."""
    await shard.connection.execute("set synchronous_commit = off")
    for first in range(1, rows // VERSIONS + 1, ROWS_EACH):
        await shard.connection.execute(_SQL["insert"], first, first + ROWS_EACH - 1)
        for _ in range(VERSIONS - 1):
            await shard.connection.execute(_SQL["update"], first, first + ROWS_EACH - 1)


def baseline_s(shard: ShardDatabase, end: int) -> float:
    """Seconds that `pg_recvlogical` takes."""
    options = {"proto_version": "1", "publication_names": PUBLICATION, "binary": "true", "messages": "true"}
    command = [str(postgres_bin() / "pg_recvlogical"), "-h", "127.0.0.1", "-p", str(shard.server.port), "-U", "postgres"]
    command += ["-d", shard.database, "-S", BASELINE, "--start", "-n", "-f", "/dev/null", "--endpos", lsn_text(end)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    began_s = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began_s


async def feed_s(shard: ShardDatabase, start: int, end: int) -> tuple[float, float]:
    """Seconds until all was taken, and the processor seconds of the feed's process."""
    settings = settings_for(shard)
    incarnation = await shard.connection.fetchval("select incarnation from oncepay.identity")
    port = str(urlsplit(settings.aggregator_url).port)
    sink = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.shard.worker.bench_sink", port, str(start), incarnation, stdout=subprocess.PIPE
    )  # fmt: skip
    assert sink.stdout is not None
    try:
        await sink.stdout.readline()
        began_s, cpu_s = time.monotonic(), time.process_time()
        async with running_feed(shard, settings) as running:
            running.feed._on_certain = lambda transaction: None
            while parse_lsn((await sink.stdout.readline()).decode().strip()) < end:
                pass
            return time.monotonic() - began_s, time.process_time() - cpu_s
    finally:
        sink.terminate()
        await sink.wait()


async def _copy_slot(shard: ShardDatabase, source: str, copy: str) -> None:
    await shard.connection.execute("select pg_copy_logical_replication_slot($1, $2)", source, copy)


async def _drop_slot(shard: ShardDatabase, slot: str) -> bool:
    try:
        await shard.connection.execute("select pg_drop_replication_slot($1)", slot)
    except asyncpg.ObjectInUseError:
        return False
    return True


async def one_round(shard: ShardDatabase, start: int, end: int) -> tuple[float, float, float]:
    """The same backlog by pg_recvlogical and by the feed: seconds of each, and the feed's processor seconds."""
    await _copy_slot(shard, KEPT, BASELINE)
    baseline = await asyncio.to_thread(baseline_s, shard, end)
    await eventually(lambda: _drop_slot(shard, BASELINE), "the baseline's slot is free")
    await eventually(lambda: _drop_slot(shard, SLOT), "the feed's slot is free")
    await _copy_slot(shard, KEPT, SLOT)
    return baseline, *await feed_s(shard, start, end)


async def measure(rows: int, rounds: int) -> dict[str, object]:
    """The whole run."""
    with PostgresServer(parameters={"shared_buffers": "256MB", "max_wal_size": "4GB"}) as server:
        async with shard_database(server) as shard:
            start = await shard.confirmed_lsn()
            await _copy_slot(shard, SLOT, KEPT)
            await backlog(shard, rows)
            end = await shard.log_end()
            found = [await one_round(shard, start, end) for _ in range(rounds)]
    return {
        "rows": rows,
        "rounds": rounds,
        "log_mb": round((end - start) / 1e6),
        "pg_recvlogical_rows_per_s": round(rows / median(baseline for baseline, _, _ in found)),
        "feed_rows_per_s": round(rows / median(took for _, took, _ in found)),
        "feed_rows_per_cpu_s": round(rows / median(cpu for _, _, cpu in found)),
        "ratio": round(median(baseline / took for baseline, took, _ in found), 2),
        "ratios": [round(baseline / took, 2) for baseline, took, _ in found],
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="row changes of the backlog (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each works it off (default: %(default)s)")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.rows, options.rounds)), indent=2))


if __name__ == "__main__":
    main()
