"""Lists over all shards, newest first, with cursors that stay right while payments come in.

A page is read from every shard behind its barrier and merged. A cursor names the last payment shown: (created_at, key).
A page that looks for what no index serves reads at most SCAN_MAX rows of each shard; it may then hold fewer than were
asked for, and its cursor leads on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import msgspec

from oncepay.errors import InvalidField
from oncepay.payment import Payment
from oncepay.payment_text import line_start
from shard.store.rows import milliseconds, moment, payment_of
from shard.store.store import Shards

LIMIT_DEFAULT, LIMIT_MAX = 20, 100
SCAN_MAX = 5_000

_FOLDER = resources.files("shard.store") / "sql"
_PAYMENTS = (_FOLDER / "list_payments.sql").read_text()
_OF_BUYER = _PAYMENTS.replace("/* buyer */ ($3::text is null)", "buyer = $3")
"""A text of its own: plans are made once for all values, and one for any buyer or none would not use the buyers' index."""
_DISPUTED = (_FOLDER / "list_disputed.sql").read_text()


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The last payment that a page has shown, or passed over."""

    created_at_ms: int
    key: str

    def text(self) -> str:
        """As clients carry it."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")


def parse_cursor(text: str) -> Cursor:
    """Raises InvalidField for what is no cursor of ours."""
    try:
        cursor = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=Cursor)
    except (msgspec.MsgspecError, binascii.Error, ValueError):
        raise InvalidField("this is no cursor of this list", field="cursor") from None
    if not 0 <= cursor.created_at_ms <= _START.created_at_ms or "\0" in cursor.key:
        raise InvalidField("this is no cursor of this list", field="cursor")
    return cursor


class Page(msgspec.Struct, frozen=True):
    """Payments, newest first; `cursor` leads on, None at the end."""

    payments: tuple[Payment, ...]
    cursor: Cursor | None


_START = Cursor(253_402_300_799_000, "\x7f")


async def list_payments(
    store: Shards, *, buyer: str | None, seller: str | None, status: str | None, limit: int, cursor: Cursor | None
) -> Page:
    """Payments of all shards that fit. Raises ShardUnavailable."""
    at = cursor or _START
    line = None if seller is None else line_start(seller)
    query = _PAYMENTS if buyer is None else _OF_BUYER
    return await _merged(store, query, limit, moment(at.created_at_ms), at.key, buyer, seller, status, limit, SCAN_MAX, line)


async def list_disputed(store: Shards, *, limit: int, cursor: Cursor | None) -> Page:
    """Payments that have or had a dispute."""
    at = cursor or _START
    return await _merged(store, _DISPUTED, limit, moment(at.created_at_ms), at.key, limit)


async def _merged(store: Shards, query: str, limit: int, *arguments: object) -> Page:
    async def attempt() -> Page:
        shards = store.maps.current.shards()
        pages = await asyncio.gather(*(store.batcher(shard).read(query, *arguments) for shard in shards))
        return merge(pages, limit)

    return await store.hold(attempt)


def merge(pages: Sequence[Sequence[Mapping[str, Any]]], limit: int) -> Page:
    """Merge the shards' pages. A row whose `passed` is true only marks how far its shard was read.

    What is shown must not lie beyond the place up to which every shard was read.
    """
    ends = [_place(page[-1]) for page in pages if page and (page[-1]["passed"] or len(page) >= limit)]
    bound = max(ends, default=None)
    rows = sorted((row for page in pages for row in page if not row["passed"]), key=_place, reverse=True)
    shown = [row for row in rows if bound is None or _place(row) >= bound][:limit]
    more = len(shown) < len(rows) or bound is not None
    if not more:
        return Page(tuple(map(payment_of, shown)), None)
    last = _place(shown[-1]) if len(shown) == limit or bound is None else bound
    return Page(tuple(map(payment_of, shown)), Cursor(*last))


def _place(row: Mapping[str, Any]) -> tuple[int, str]:
    return milliseconds(row["created_at"]), str(row["key"])
