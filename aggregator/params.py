"""What a request says in its path and query, checked; every complaint names the parameter."""

from __future__ import annotations

import datetime as dt
import re
from typing import Literal, get_args

from aiohttp import web

from aggregator import positions
from aggregator.reads import Span
from aggregator.views import Interval
from oncepay.cart import BUYER_LENGTH_MAX, SELLER_LENGTH_MAX
from oncepay.errors import InvalidField
from oncepay.keys import KEY_CHARACTERS
from oncepay.money import exponent

LIMIT_DEFAULT = 50
LIMIT_MAX = 500
ROWS_MAX = 1_000
"""Rows of revenue, of profit or of a statement in one page, also by default."""
YEARS = range(1971, 9999)
"""Days outside of these years are nobody's."""

_ZONE = re.compile(r"[A-Za-z][A-Za-z_]*(?:/[A-Za-z0-9_+-]+){0,2}")


class Query:
    """The query's parameters: those that the call takes, each at most once. Raises InvalidField for others."""

    def __init__(self, request: web.Request, *allowed: str) -> None:
        query = request.query
        takes = ("min_position", *allowed)
        for name in query:
            if name not in takes:
                raise InvalidField(f"there is no parameter {name!r}; this call takes {', '.join(takes)}", field=name)
            if len(query.getall(name)) > 1:
                raise InvalidField("it may be given once", field=name)
        self._query = query

    def min_position(self) -> dict[str, int]:
        """The positions that the answer has to be at or past."""
        return positions.parse(self._query.get("min_position", ""))

    def currency(self) -> str | None:
        """A currency's code, None when it isn't given."""
        code = self._query.get("currency")
        if code is not None:
            exponent(code)
        return code

    def needed_currency(self) -> str:
        """A currency's code; amounts of two currencies can't be added up."""
        code = self.currency()
        if code is None:
            raise InvalidField("say which currency: `?currency=usd`", field="currency")
        return code

    def days(self) -> tuple[dt.date | None, dt.date | None]:
        """`from` and `to`: days, both inclusive."""
        first, last = self._day("from"), self._day("to")
        if first is not None and last is not None and last < first:
            raise InvalidField(f"it is before `from`, {first}", field="to")
        return first, last

    def _day(self, name: Literal["from", "to", "cursor"]) -> dt.date | None:
        text = self._query.get(name)
        if text is None:
            return None
        try:
            if len(text) != len("2026-01-31"):
                raise ValueError
            day = dt.date.fromisoformat(text)
            if day.year not in YEARS:
                raise ValueError
        except ValueError:
            raise InvalidField(f"{text!r} is not a day like 2026-01-31", field=name) from None
        return day

    def interval(self) -> Interval | None:
        """How long a row is; None for the whole."""
        text = self._query.get("interval")
        if text is None:
            return None
        for interval in get_args(Interval):
            if interval == text:
                return interval  # type: ignore[no-any-return]
        raise InvalidField(f"{text!r} is none of {', '.join(get_args(Interval))}", field="interval")

    def text(self, name: str) -> str | None:
        """A parameter as it is, None when it isn't given."""
        text = self._query.get(name)
        if text is not None and not text.isprintable():
            raise InvalidField("only printable characters are allowed", field=name)
        return text

    def limit(self, *, default: int = LIMIT_DEFAULT, most: int = LIMIT_MAX) -> int:
        """How many rows a page has at most."""
        text = self._query.get("limit")
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= most):
            raise InvalidField(f"{text!r} is not a number from 1 to {most}", field="limit")
        return int(text)

    def timezone(self) -> str:
        """A time zone's name as the IANA database has it; UTC by default. Whether it is known, the database says."""
        text = self._query.get("timezone", "UTC")
        if not _ZONE.fullmatch(text):
            raise InvalidField(f"{text!r} is no time zone like Europe/Berlin", field="timezone")
        return text

    def span(self) -> Span:
        """`from`, `to`, `interval`, `timezone`, `limit` and `cursor`: a page of rows by day, week or month."""
        first, last = self.days()
        interval, cursor = self.interval(), self._day("cursor")
        if cursor is not None and (interval is None or (first is not None and cursor < first)):
            raise InvalidField("this is not a cursor that an earlier page gave", field="cursor")
        return Span(cursor or first, last, interval, self.limit(default=ROWS_MAX, most=ROWS_MAX), self.timezone())

    def at(self) -> dict[str, int]:
        """The positions that the answer has to be exactly at."""
        return positions.parse(self._query.get("at", ""), field="at")

    def cursor(self) -> str | None:
        """Where the page begins, as an earlier page said."""
        return self._query.get("cursor")


_LENGTHS_MAX = {"seller": SELLER_LENGTH_MAX, "buyer": BUYER_LENGTH_MAX, "shard": SELLER_LENGTH_MAX, "payment": KEY_CHARACTERS}


def path_id(request: web.Request, name: Literal["seller", "buyer", "shard", "payment"]) -> str:
    """An id in the path, decoded."""
    value = request.match_info[name]
    longest = _LENGTHS_MAX[name]
    if not value or len(value) > longest or not value.isprintable():
        raise InvalidField(f"a {name}'s id has 1 to {longest} printable characters", field=name)
    return value
