"""Verification: both sides of a range hold the same rows, by count, money and checksum.

Chunks are compared as they are on either side. Where they differ, keys are compared one by one, and a key that differs is looked
at again behind the stream: it differs for good only when the giver's rows stayed the same from before the taker had replayed
everything until after the taker's were read, and everything that was being committed meanwhile could be seen.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from shard.mover.errors import MoveStopped
from shard.mover.pace import Pace
from shard.mover.side import Side
from shard.mover.stream import Stream
from shard.mover.tables import Table

CHUNK_ROWS = 20_000
KEYS_AT_ONCE = 2_000
SETTLE_S = 60.0
"""How long keys that keep changing are looked at again."""
APPLIED_S = 30.0
NAMED_MAX = 50
"""Differences that are named; more are only counted."""

Key = tuple[int, str]
"""Slot and key."""


class Digest(NamedTuple):
    """Rows of one key, or of a chunk, in one table."""

    rows: int
    money: int
    checksum: int


Digests = dict[Key, tuple[Digest, ...]]
"""By key, for each table."""

_EMPTY = Digest(0, 0, 0)


class Comparer:
    """Compares the two sides of `stream`."""

    def __init__(self, stream: Stream, tables: Sequence[Table]) -> None:
        self._stream = stream
        self._giver = stream.giver
        self._taker = stream.taker
        self._tables = tables
        self.rows = 0
        """Rows compared so far, as the giver counts them."""

    async def whole(self, rows_total: int, on_chunk: Callable[[int], Awaitable[None]], *, limit_rows_per_s: int = 0) -> list[str]:
        """Compare the whole range; what differs. `on_chunk` hears the number of rows compared. 0 rows a second: no limit."""
        pace = Pace(limit_rows_per_s)
        found: list[str] = []
        first, last = self._stream.first, self._stream.last
        per_slot = max(rows_total / (last - first + 1), 0.001)
        slots = max(1, int(pace.chunk(CHUNK_ROWS) / per_slot))
        for begin in range(first, last + 1, slots):
            end = min(begin + slots - 1, last)
            before = self.rows
            found += await self._chunk(begin, end)
            await on_chunk(self.rows)
            await pace.after(self.rows - before)
            if len(found) > NAMED_MAX:
                break
        return found

    async def _chunk(self, first: int, last: int) -> list[str]:
        one = [await self._sum(self._giver, table, first, last) for table in self._tables]
        other = [await self._sum(self._taker, table, first, last) for table in self._tables]
        self.rows += sum(digest.rows for digest in one)
        if one == other:
            return []
        ones, others = await self._by_key(self._giver, first, last), await self._by_key(self._taker, first, last)
        return await self.keys([key for key in ones.keys() | others.keys() if ones.get(key) != others.get(key)])

    async def _sum(self, side: Side, table: Table, first: int, last: int) -> Digest:
        row = await side.one(
            f"select count(*) as rows, coalesce(sum({table.money_sum}), 0)::text as money,"  # noqa: S608 (names of ours)
            f" coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text as checksum"
            f" from {table.qualified} t where slot between $1 and $2",
            first,
            last,
        )
        assert row is not None
        return Digest(row["rows"], int(row["money"]), int(row["checksum"]))

    async def _by_key(self, side: Side, first: int, last: int) -> Digests:
        return await self._gathered(side, "from {table} t where slot between $1 and $2", first, last)

    async def _of_keys(self, side: Side, keys: Sequence[Key]) -> Digests:
        source = "from unnest($1::integer[], $2::text[]) u (slot, key) join {table} t on t.slot = u.slot and t.key = u.key"
        found: Digests = {}
        for begin in range(0, len(keys), KEYS_AT_ONCE):
            part = keys[begin : begin + KEYS_AT_ONCE]
            found |= await self._gathered(side, source, [slot for slot, _ in part], [key for _, key in part])
        return found

    async def _gathered(self, side: Side, source: str, *arguments: object) -> Digests:
        """Digests by key. All tables in one statement, and so of one moment."""
        parts = [
            f"select {n} as n, t.slot, t.key, count(*) as rows, sum({table.money_sum})::text as money,"
            f" sum(hashtextextended(t::text, 0)::numeric)::text as checksum {source.format(table=table.qualified)}"
            " group by t.slot, t.key"
            for n, table in enumerate(self._tables)
        ]
        digests: dict[Key, list[Digest]] = {}
        for row in await side.read(" union all ".join(parts), *arguments):
            of_key = digests.setdefault((row["slot"], row["key"]), [_EMPTY] * len(self._tables))
            of_key[row["n"]] = Digest(row["rows"], int(row["money"]), int(row["checksum"]))
        return {key: tuple(found) for key, found in digests.items()}

    async def keys(self, keys: Sequence[Key]) -> list[str]:
        """Compare single keys until each is equal, or differs for good; what differs. Raises MoveStopped after SETTLE_S."""
        left = sorted(set(keys))
        found: list[str] = []
        deadline_s = time.monotonic() + SETTLE_S
        while left:
            before = await self._of_keys(self._giver, left)
            await self._stream.applied(await self._giver.position(), APPLIED_S)
            there = await self._of_keys(self._taker, left)
            left = [key for key in left if before.get(key) != there.get(key)]
            if not left:
                break
            # A stream sends what is in the log, also a commit that still waits for its standbys: the taker can be ahead.
            await self._giver.until_visible(deadline_s - time.monotonic())
            after = await self._of_keys(self._giver, left)
            found += [self._named(key, after.get(key), there.get(key)) for key in left if before.get(key) == after.get(key)]
            left = [key for key in left if before.get(key) != after.get(key)]
            if left and time.monotonic() > deadline_s:
                raise MoveStopped(f"{len(left)} payments changed for {SETTLE_S:.0f} s without a break, such as {left[0][1]}")
        return found

    def _named(self, key: Key, giver: tuple[Digest, ...] | None, taker: tuple[Digest, ...] | None) -> str:
        parts = []
        for n, table in enumerate(self._tables):
            one, other = (giver or ())[n : n + 1] or (_EMPTY,), (taker or ())[n : n + 1] or (_EMPTY,)
            if one != other:
                parts.append(f"{table.name}: {_told(one[0])} on {self._giver.shard}, {_told(other[0])} on {self._taker.shard}")
        return f"{key[1]} (slot {key[0]}): {'; '.join(parts)}"


def _told(digest: Digest) -> str:
    rows = "1 row" if digest.rows == 1 else f"{digest.rows} rows"
    return f"{rows} of {digest.money} minor units, checksum {digest.checksum & 0xFFFFFFFF:08x}"
