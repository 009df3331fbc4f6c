"""Removing a range's rows from a shard that doesn't own them: page by page where many of a table go, else by their slots."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import asyncpg
import msgspec

from shard.mover.pace import Pace
from shard.mover.tables import Table

ROWS_AT_ONCE = 5_000
ROWS_A_PAGE = 0.5
"""A table is read whole where so many rows of each of its pages go, on average: then each page is written once."""
PAGES_FIRST, PAGES_MAX = 16, 4_096

_BY_SLOTS = "select oncepay.delete_moved($1, $2, $3, $4, $5, $6) as gone"
_BY_PAGES = "select oncepay.delete_moved_pages($1, $2, $3, $4, $5, $6, $7) as gone"
_PAGES = "select pg_relation_size($1::regclass) / current_setting('block_size')::bigint"


class Remover:
    """Deletes the rows of the slots `first` to `last` in a session of the mover's role, at most `rows_per_s` (0: no limit).

    `on_rows` hears how many are gone, of all tables, and may raise to stop: whoever begins again goes on with what is left.
    """

    def __init__(
        self, session: asyncpg.Connection, move: str, epoch: int, first: int, last: int, rows_per_s: int,
        on_rows: Callable[[int], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._session = session
        self._of = (move, epoch)
        self._first, self._last = first, last
        self._pace = Pace(rows_per_s)
        self._at_once = self._pace.chunk(ROWS_AT_ONCE)
        self._on_rows = on_rows
        self.gone = 0
        """Rows that this session has deleted."""

    async def remove(self, table: Table) -> None:
        """Delete the range's rows of `table`. Nothing may refer to them any more."""
        pages = await self._session.fetchval(_PAGES, table.qualified)
        if await self._rows(table) >= pages * ROWS_A_PAGE:
            await self._by_pages(table, pages)
        await self._by_slots(table)

    async def _rows(self, table: Table) -> float:
        """How many rows the range has, as Postgres estimates."""
        where = f"slot between {int(self._first)} and {int(self._last)}"
        text = await self._session.fetchval(f"explain (format json) select from {table.qualified} where {where}")
        return float(msgspec.json.decode(text)[0]["Plan"]["Plan Rows"])

    async def _by_pages(self, table: Table, pages: int) -> None:
        page, step = 0, PAGES_FIRST
        while page < pages:
            until = min(page + step, pages)
            count = await self._session.fetchval(_BY_PAGES, *self._of, table.name, self._first, self._last, page, until)
            await self._went(count)
            page = until
            if count > self._at_once:
                step = max(1, step // 2)
            elif count * 2 < self._at_once:
                step = min(PAGES_MAX, step * 2)

    async def _by_slots(self, table: Table) -> None:
        count = self._at_once
        while count >= self._at_once:
            count = await self._session.fetchval(_BY_SLOTS, *self._of, table.name, self._first, self._last, self._at_once)
            await self._went(count)

    async def _went(self, count: int) -> None:
        self.gone += count
        if count:
            await self._on_rows(self.gone)
        await self._pace.after(count)
