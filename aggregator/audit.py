"""The audit in the background: what is derived, compared with the shards and with itself, sample by sample.

A round takes some entries of each shard, behind its barrier, and looks for them here once the feed is past; takes some
entries from here, and looks for them in their shards; and folds the sums of the sellers that it met. It costs a few
milliseconds, so it runs for ever; `oncepay verify` is the whole check.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import time
from collections import defaultdict
from collections.abc import Sequence

import asyncpg
import msgspec

from aggregator import metrics, queries
from aggregator.positions import PositionNotReached, Reader
from oncepay.errors import OncepayError
from oncepay.keys import SLOTS
from oncepay.logs import get_logger
from shard.store.store import Shards

SQL = queries.load("audit.sql")
SAMPLE = 200
"""Entries of a shard in one round, and as many from here."""
SELLERS_MAX = 50
WAIT_S = 60.0
"""How long a round waits for the feed to be past what it read; a feed that is later has an alert of its own."""
AGAIN_S = 5.0
"""What differs is looked at again after this long: a range that was being moved isn't a difference."""
CONTENT = ("kind", "currency", "source", "accounts", "amounts", "sellers")

Name = tuple[str, str]
_log = get_logger("audit")


class AuditState(msgspec.Struct):
    """The last round: when it ended (RFC 3339), how many entries it compared, what it found wrong."""

    ended_at: str = ""
    entries: int = 0
    differences: list[str] = []


class Audit:
    """Compares for ever. `last` is the last round."""

    def __init__(self, reader: Reader, shards: Shards, every_s: float) -> None:
        self._reader = reader
        self._shards = shards
        self._every_s = every_s
        self.last = AuditState()
        self._sample_of: dict[str, int] = {}
        """Where the last sample of each shard began."""

    async def work(self) -> None:
        """Round after round."""
        while True:
            await asyncio.sleep(self._every_s * random.uniform(0.5, 1.5))
            try:
                found = await self.round()
                if found:
                    await asyncio.sleep(AGAIN_S)
                    found = await self.round(again=found)
            except PositionNotReached as error:
                _log.info("the audit waits for the feed", reason=str(error))
            except (OncepayError, asyncpg.PostgresError) as error:
                _log.warning("the audit has to wait", error=str(error))
            else:
                for what in found:
                    _log.error("derived data differs", what=what)
                metrics.AUDIT_DIFFERENCES.set(len(found))

    async def round(self, *, again: Sequence[str] = ()) -> list[str]:
        """What differs now; with `again` only what was found before and differs still.

        Raises PositionNotReached for a feed that is late, or what shards and database raise.
        """
        began_s, entries, found = time.monotonic(), 0, list[str]()
        for shard in self._shards.maps.current.shards():
            if not again:
                self._sample_of[shard] = random.randrange(SLOTS)
            start = self._sample_of.get(shard, 0)
            count, wrong = await self._shard(shard, start)
            entries, found = entries + count, found + wrong
        async with self._reader.snapshot({}) as (connection, _):
            found += [row["what"] for row in await connection.fetch(SQL["accounts_differ"])]
        found = [what for what in dict.fromkeys(found) if not again or what in again]
        self.last = AuditState(dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), entries, found)
        metrics.AUDITED.inc(entries)
        metrics.AUDIT_SECONDS.observe(time.monotonic() - began_s)
        return found

    async def _shard(self, shard: str, start: int) -> tuple[int, list[str]]:
        """How many entries were compared, and what differs."""
        batcher = self._shards.batcher(shard)
        rows = await batcher.read(SQL["shard_sample"], start, SAMPLE) or await batcher.read(SQL["shard_sample"], 0, SAMPLE)
        if not rows:
            return 0, []
        keys, ids = [row["key"] for row in rows], [row["entry_id"] for row in rows]
        sellers = list(dict.fromkeys(name for row in rows for name in row["sellers"] if name and name != "platform"))
        async with self._reader.snapshot({shard: _lsn(rows[0]["position"])}, wait_s=WAIT_S) as (connection, _):
            ours = {(row["key"], row["entry_id"]): row for row in await connection.fetch(SQL["ours"], keys, ids)}
            postings = await connection.fetch(SQL["postings_differ"], keys, ids)
            sums = await connection.fetch(SQL["sellers_differ"], sellers[:SELLERS_MAX])
            sample = await connection.fetch(SQL["our_sample"], random.choice(keys), SAMPLE)
        found = []
        for row in rows:
            held = ours.get((row["key"], row["entry_id"]))
            if held is None:
                found.append(f"entry {row['entry_id']} of {row['key']} is in {shard} and not here")
            elif any(held[name] != row[name] for name in CONTENT):
                found.append(f"entry {row['entry_id']} of {row['key']} is another in {shard}")
        found += [f"the sellers' postings of {row['key']} are not what its entries say" for row in postings]
        found += [f"the sums of seller {row['seller']} are not what its postings come to" for row in sums]
        found += [f"entry {entry} of {key} is here and in no shard" for key, entry in await self._strangers(sample)]
        return len(rows) + len(sample), found

    async def _strangers(self, sample: Sequence[asyncpg.Record]) -> list[Name]:
        """Those of our entries that the shards which own their slots don't have."""
        of_shard: defaultdict[str, list[asyncpg.Record]] = defaultdict(list)
        for row in sample:
            of_shard[self._shards.maps.current.range_of(row["slot"]).shard].append(row)
        strangers = []
        for shard, rows in of_shard.items():
            columns = [row["slot"] for row in rows], [row["key"] for row in rows], [row["entry_id"] for row in rows]
            known = {tuple(row) for row in await self._shards.batcher(shard).read(SQL["shard_has"], *columns)}
            strangers += [(row["key"], row["entry_id"]) for row in rows if (row["key"], row["entry_id"]) not in known]
        return strangers


def _lsn(position: object) -> int:
    """asyncpg gives positions as numbers."""
    assert isinstance(position, int)
    return position
