"""What it costs at Stripe to bring many pending payments up to date of which few changed, when no webhook comes.

    python -m tests.shard.worker.bench_polls [--payments 10000] [--changed 100]

Prints one JSON object. One shard of three nodes with its workers, on a cluster of its own; the stand-in for Stripe counts the
calls. `python -m loadtest.bench polls` calls it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

import aiohttp
import msgspec

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.ports import free_base
from oncepay.etcd import Etcd
from oncepay.settings import PollSettings, dump
from shard.store.store import Shards
from tests.shard.worker.harness import SHARD
from tests.shard.worker.test_weather import CHANGE_S, PARTS, Sky

POLL = PollSettings(first_s=1.0, max_s=20.0)
AT_ONCE = 500
STILL_S, STILL_CALLS = 10.0, 30
"""All are looked at by lists alone once Stripe gets fewer calls than this in so many seconds."""
STILL_MAX_S = 400.0
LONG_S = 1_000_000


async def until_still(sky: Sky) -> float:
    """Wait until nearly no calls are made; how many seconds that took."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < STILL_MAX_S:
        before = sum((await sky.calls()).values())
        await asyncio.sleep(STILL_S)
        if sum((await sky.calls()).values()) - before < STILL_CALLS:
            break
    return time.monotonic() - began_s


async def measure(cluster: Cluster, payments: int, changed: int) -> dict[str, object]:
    """Make them, let them grow old, change some, count."""
    settings = cluster.settings
    password = settings.postgres.router_password
    async with Etcd(settings.etcd) as etcd, aiohttp.ClientSession() as http:
        shards = Shards(etcd, settings, role="oncepay_router", password=password, actor="router")
        await shards.start()
        try:
            sky = Sky(cluster, shards, http)
            for first in range(0, payments - changed, AT_ONCE):
                await sky.in_progress(min(AT_ONCE, payments - changed - first), LONG_S)
            keys = await sky.in_progress(changed, CHANGE_S)
            still_s = await until_still(sky)
            before, began_s = await sky.calls(), time.monotonic()
            await asyncio.sleep(2 * POLL.max_s)
            quiet = sum((await sky.calls()).values()) - sum(before.values())
            quiet_s, began_s = time.monotonic() - began_s, time.monotonic()
            calls = await sky.calls_for_changes(keys)
            took_s = time.monotonic() - began_s
        finally:
            await shards.stop()
    return {
        "pending": payments,
        "changed": changed,
        "calls": sum(calls.values()),
        "calls_by_endpoint": calls,
        "settled_after_s": round(took_s, 1),
        "poll_interval_s": POLL.max_s,
        "calls_while_nothing_changes": quiet,
        "while_nothing_changes_s": round(quiet_s, 1),
        "until_still_s": round(still_s, 1),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payments", type=int, default=10_000, help="how many are pending (default: %(default)s)")
    parser.add_argument("--changed", type=int, default=100, help="how many of them change (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oncepay-bench-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder) / "polls", free_base(), shards=(SHARD,), parts=PARTS)
        try:
            cluster.up(hooks=hooks(cluster))
            (cluster.home / "oncepay.toml").write_bytes(dump(msgspec.structs.replace(cluster.settings, poll=POLL)))
            workers = [f"worker-{SHARD}-1", f"worker-{SHARD}-2"]
            cluster.supervisor().stop(workers)
            cluster.supervisor().start(workers)
            print(json.dumps(asyncio.run(measure(cluster, options.payments, options.changed)), indent=2))
        finally:
            cluster.down(purge=True)


if __name__ == "__main__":
    main()
