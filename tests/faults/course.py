"""One fault under payments, from before it until all is whole again, with all that must hold whatever it was."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import asyncpg

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.faults import FAULTS, Fault, Hands, inflict
from loadtest.recorder import Recorder

SHARD = "s0"
SLACK = 2.0
"""A machine that does other work too may take so many times what docs/durability.md promises."""
AROUND = 30
"""Payments before and after."""
ONCE = "select key, count(*) from oncepay.payments where key = any ($1) group by key"
BOOKED_ONCE = "select key, count(*) from oncepay.entries where key = any ($1) and entry_id = 'payment' group by key"


class Seen(NamedTuple):
    """What the buyers saw of a fault."""

    fault: Fault
    recorder: Recorder
    times: dict[str, float]

    def gap_s(self) -> float:
        return self.recorder.gap_s(self.times["begun"])

    def slowest_s(self) -> float:
        return self.recorder.slowest_s(self.times["begun"])

    def refused(self) -> int:
        return self.recorder.refused(self.times["begun"])


async def suffer(cluster: Cluster, name: str, hold_s: float | None = None) -> Seen:
    """Inflict it while buyers pay, for `hold_s` at least.

    What they were told is there in the end, once; nobody was answered backwards.
    """
    hands = Hands(cluster, SHARD, hooks(cluster))
    await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", 120, 0.5)
    status = await asyncio.to_thread(cluster.status)
    ranges = next(shard.ranges for shard in status.shards if shard.name == SHARD)
    fault = FAULTS[name](hands)
    async with Recorder(status.urls["router"], status.api_key, ranges) as recorder:
        await recorder.more(AROUND)
        times = await asyncio.to_thread(inflict, fault, hold_s=hold_s)
        await recorder.more(AROUND)
        await recorder.stop()
        assert await recorder.check() == []
    await assert_once(cluster, list(recorder.told))
    return Seen(fault, recorder, times)


async def assert_once(cluster: Cluster, keys: list[str]) -> None:
    """Each is one row of the shard, and was booked once."""
    status = await asyncio.to_thread(cluster.status)
    connection = await asyncpg.connect(next(shard.dsn for shard in status.shards if shard.name == SHARD))
    try:
        for query in (ONCE, BOOKED_ONCE):
            rows = await connection.fetch(query, keys)
            assert {row["key"]: row["count"] for row in rows} == dict.fromkeys(keys, 1)
    finally:
        await connection.close()
