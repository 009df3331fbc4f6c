"""Filling the pending cache, once, from the table.

The order makes it exact. The feed runs first, remembering what settles. When a barrier has passed it, what it told until then is
forgotten, and the table is read page by page; a second barrier passes after the last page: what was read is then on the quorum,
and whatever was committed since any page was read has come through the feed. If the leader changed in between, all starts over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from importlib import resources

import asyncpg

from oncepay.errors import ShardUnavailable
from oncepay.logs import get_logger
from shard.worker.cache import PendingCache
from shard.worker.feed import Feed
from shard.worker.payout_cache import PayoutCache
from shard.worker.poller import TO_BE_DRIVEN

PAGE_ROWS = 2_000
OLD = timedelta(seconds=180)
"""What hasn't changed for so long has most likely been looked at, and waits: thousands of such payments go after the others.
Longer than back to when lists of intents are read (`Bulk`), which take such a payment for looked at."""

_FOLDER = resources.files("shard.worker") / "sql"
_SQL = (_FOLDER / "fill.sql").read_text()
_PAYOUTS = (_FOLDER / "fill_payouts.sql").read_text()
_log = get_logger("cache")

Connect = Callable[[str, int], Awaitable[asyncpg.Connection]]


async def fill(cache: PendingCache, payouts: PayoutCache, feed: Feed, connect: Connect, runs: Sequence[tuple[int, int]]) -> None:
    """Fill the caches with what is pending of these slots, the shard's by the map. Raises ShardUnavailable: then try again.

    `begin_fill` was called before `feed` was started, or `begin_load` before this. `connect` opens a session with a node. The
    caches keep what the feed tells meanwhile.
    """
    before = await feed.fence()
    for slots in runs:
        # Of a range that has come back the feed may have told, late, what was before it went: another shard has settled that
        # since, and what a move brings is in no feed. What was committed until the fence is in the table.
        cache.forget_slots(*slots)
        payouts.forget_slots(*slots)
    rows = await _read(cache, payouts, connect, before.host, before.port, runs)
    after = await feed.fence()
    if after != before:
        raise ShardUnavailable(f"the leader changed from {before} to {after} while the cache was filled")
    cache.end_fill()
    payouts.end_fill()
    _log.info("cache filled", slots=list(runs), rows=rows, pending=len(cache), payouts=len(payouts))


async def _read(
    cache: PendingCache, payouts: PayoutCache, connect: Connect, host: str, port: int, runs: Sequence[tuple[int, int]]
) -> int:
    rows = 0
    try:
        connection = await connect(host, port)
        try:
            for slots in runs:
                await _payout_pages(payouts, connection, slots)
                rows += await _pages(cache, connection, slots)
            return rows
        finally:
            connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ShardUnavailable(f"the payments with open work can't be read: {error!r}") from error


async def _pages(cache: PendingCache, connection: asyncpg.Connection, slots: tuple[int, int]) -> int:
    slot, key, total = slots[0], "", 0
    while True:
        rows = await connection.fetch(_SQL, slot, key, PAGE_ROWS, slots[1], OLD)
        for row in rows:
            tries = 1 if row["is_old"] and row["status"] not in TO_BE_DRIVEN else 0
            cache.put(row["key"], row["status"], row["version"], True, row["expires_s"], tries)
        total += len(rows)
        if len(rows) < PAGE_ROWS:
            return total
        slot, key = rows[-1]["slot"], rows[-1]["key"]


async def _payout_pages(payouts: PayoutCache, connection: asyncpg.Connection, slots: tuple[int, int]) -> None:
    slot, key = slots[0], ""
    while True:
        rows = await connection.fetch(_PAYOUTS, slot, key, PAGE_ROWS, slots[1])
        for row in rows:
            payouts.put(row["key"], row["status"], row["version"], True)
        if len(rows) < PAGE_ROWS:
            return
        slot, key = rows[-1]["slot"], rows[-1]["key"]
