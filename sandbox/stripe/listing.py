"""Lists: newest first, cursors, limits from 1 to 100, `created` bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from sandbox import ids
from sandbox.store import Row, SqlValue, Table
from sandbox.stripe import errors
from sandbox.stripe.forms import JsonObject, Params

R = TypeVar("R", bound=Row)

LIMIT_DEFAULT = 10
LIMIT_MAX = 100
COMMON = frozenset({"limit", "starting_after", "ending_before", "created", "expand"})


class Window:
    """What part of a table a list call asks for: `low < ordinal < high`."""

    def __init__(self, table: Table[R], params: Params, kind: str) -> None:
        asked = params.integer("limit")
        self.limit = LIMIT_DEFAULT if asked is None else max(1, min(LIMIT_MAX, asked))
        self.low = 0
        self.high = table.newest + 1
        after, before = params.text("starting_after"), params.text("ending_before")
        if after and before:
            raise errors.invalid("You can only specify one of these parameters: starting_after, ending_before.")
        self.ascending = before is not None
        for cursor, param in ((after, "starting_after"), (before, "ending_before")):
            if cursor and table.get(cursor) is None:
                raise errors.no_such(kind, cursor, param)
        if after:
            self.high = ids.ordinal(after)
        if before:
            self.low = ids.ordinal(before)
        self._bounds(table, params)

    def _bounds(self, table: Table[R], params: Params) -> None:
        value = params.values.get("created")
        if value is None or value == "":
            return
        if isinstance(value, str):
            exact = params.integer("created") or 0
            self._since(table.first_since(exact))
            self._before(table.first_since(exact + 1))
            return
        bounds = params.inner("created")
        if bounds is None:
            return
        bounds.allow(frozenset({"gt", "gte", "lt", "lte"}))
        for name, offset in (("gte", 0), ("gt", 1)):
            bound = bounds.integer(name)
            if bound is not None:
                self._since(table.first_since(bound + offset))
        for name, offset in (("lt", 0), ("lte", 1)):
            bound = bounds.integer(name)
            if bound is not None:
                self._before(table.first_since(bound + offset))

    def _since(self, ordinal: int) -> None:
        self.low = max(self.low, ordinal - 1)

    def _before(self, ordinal: int) -> None:
        self.high = min(self.high, ordinal)


def answer(rows: list[R], window: Window, url: str, show: Callable[[R], JsonObject]) -> JsonObject:
    """The list object; `rows` holds one more than the limit when there is more."""
    more = len(rows) > window.limit
    rows = rows[: window.limit]
    if window.ascending:
        rows = rows[::-1]
    return {"object": "list", "data": [show(row) for row in rows], "has_more": more, "url": url}


def of_table(
    table: Table[R],
    params: Params,
    kind: str,
    url: str,
    show: Callable[[R], JsonObject],
    filters: Iterable[tuple[str, SqlValue]] = (),
) -> JsonObject:
    """A page of `table`."""
    window = Window(table, params, kind)
    rows = table.page(window.limit + 1, low=window.low, high=window.high, ascending=window.ascending, filters=filters)
    return answer(rows, window, url, show)
