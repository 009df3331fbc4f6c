"""Reads a shard, and the aggregator's database, each in one snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from loadtest.checker.model import (
    TERMINAL,
    Derived,
    Entry,
    Link,
    Misread,
    Payment,
    Payout,
    Progress,
    SellerDay,
    Shard,
    ShardTarget,
    Share,
    State,
    Unreachable,
)

CONNECT_S = 5.0
ROWS_A_FETCH = 5_000
_FOLDER = Path(__file__).parent / "sql"
_MARK = "\n-- name: "


def _load(file: str) -> dict[str, str]:
    parts = (_FOLDER / file).read_text(encoding="utf-8").split(_MARK)[1:]
    return {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}


SHARD = _load("shard.sql")
AGGREGATOR = _load("aggregator.sql")


class _Item(msgspec.Struct):
    seller: str
    amount: int
    quantity: int = 1


class _Share(msgspec.Struct):
    seller: str
    gross: int
    fee: int


class _Terms(msgspec.Struct):
    items: list[_Item]
    shares: list[_Share]
    payment_method: str = ""
    on_decline: str = "retry"


class _Line(msgspec.Struct, array_like=True):
    seller: str
    amount: int
    quantity: int = 1


class _ShortTerms(msgspec.Struct, array_like=True):
    """As most rows have them: `fees` are the sellers', in the order in which they first appear."""

    items: list[_Line]
    fees: list[int]
    api_version: str
    payment_method: str = ""
    on_decline: str = "retry"


class _Capture(msgspec.Struct):
    shares: list[_Share]


class _Course(msgspec.Struct):
    charge: str = ""
    stripe_fee: int = -1
    capture: _Capture | None = None


_OF_COURSE = {"charge": 2, "stripe_fee": 3, "capture": 13}
"""Where a short text of a payment's progress has these."""

_terms = msgspec.json.Decoder(_Terms)
_short_terms = msgspec.json.Decoder(_ShortTerms)
_course = msgspec.json.Decoder(_Course)


@contextlib.asynccontextmanager
async def _snapshot(name: str, dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A read-only transaction on one moment. Raises Unreachable, or Misread when the schema is another."""
    try:
        connection = await asyncpg.connect(dsn, timeout=CONNECT_S, server_settings={"timezone": "UTC"})
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        raise Unreachable(f"{name} can't be reached: {error or type(error).__name__}") from error
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            yield connection
    except (OSError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
        raise Unreachable(f"{name} went away while it was read: {error}") from error
    except asyncpg.PostgresError as error:
        raise Misread(f"{name}: {error}") from error
    finally:
        connection.terminate()


async def _read(connection: asyncpg.Connection, statement: str, take: Callable[[Any], None], step: Callable[[int], None]) -> None:
    """Give each row to `take`, in pieces, so that a large table is never held twice."""
    cursor = await connection.cursor(statement)
    while rows := await cursor.fetch(ROWS_A_FETCH):
        for row in rows:
            take(row)
        step(len(rows))


class _Steps:
    """Adds up pieces for a progress bar."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done = 0
        progress(what, 0, total)

    def __call__(self, count: int) -> None:
        self._done += count
        self._progress(self._what, self._done, max(self._total, self._done))

    def finish(self) -> None:
        self._progress(self._what, self._done, self._done)


async def read_shard(target: ShardTarget, progress: Progress) -> Shard:
    """All that a shard holds."""
    shard = Shard(target.name)
    async with _snapshot(f"shard {target.name}", target.dsn) as connection:
        shard.owned = [(row[0], row[1]) for row in await connection.fetch(SHARD["ranges"])]
        shard.position = await connection.fetchval("select pg_current_wal_insert_lsn()")
        total = await connection.fetchval(
            "select (select count(*) from oncepay.payments) + (select count(*) from oncepay.entries)"
            " + (select count(*) from oncepay.balance_links)"
        )
        step = _Steps(f"shard {target.name}", total, progress)
        payments, entries, links = shard.payments.append, shard.entries.append, shard.links.append
        await _read(connection, SHARD["payments"], lambda row: payments(_payment(target.name, row)), step)
        await _read(connection, SHARD["entries"], lambda row: entries(_entry(target.name, row)), step)
        await _read(connection, SHARD["links"], lambda row: links(Link(*row)), step)
        payouts = shard.payouts.append
        await _read(connection, SHARD["payouts"], lambda row: payouts(Payout(target.name, *row)), step)
        step.finish()
    return shard


def _payment(shard: str, row: Any) -> Payment:
    terms_text, course_text, expired = tuple(row)[10:]
    try:
        terms, course = _terms_in(terms_text), _course_in(course_text)
    except (msgspec.DecodeError, ValueError) as error:
        raise Misread(f"shard {shard}: the terms of {row[1]}: {error}") from error
    items = tuple(Share(seller, amount, 0) for seller, amount in _gross(terms.items).items())
    driven = expired or _driven(row[2], terms)
    asked = course.capture.shares if course.capture else []
    known = (course.charge, course.stripe_fee >= 0, driven)
    return Payment._make((shard, *tuple(row)[:10], *known, _of(terms.shares), items, _of(asked)))


def _gross(items: list[_Item]) -> dict[str, int]:
    gross: dict[str, int] = {}
    for item in items:
        gross[item.seller] = gross.get(item.seller, 0) + item.amount * item.quantity
    return gross


def _terms_in(text: str) -> _Terms:
    if text.startswith("{"):
        return _terms.decode(text)
    short = _short_terms.decode(text)
    items = [_Item(line.seller, line.amount, line.quantity) for line in short.items]
    shares = [_Share(*total, fee) for total, fee in zip(_gross(items).items(), short.fees, strict=True)]
    return _Terms(items, shares, short.payment_method, short.on_decline)


def _course_in(text: str) -> _Course:
    if text.startswith("{"):
        return _course.decode(text)
    values = msgspec.json.decode(text)
    return msgspec.convert({name: values[place] for name, place in _OF_COURSE.items() if place < len(values)}, _Course)


def _of(shares: list[_Share]) -> tuple[Share, ...]:
    return tuple(Share(share.seller, share.gross, share.fee) for share in shares)


def _driven(status: str, terms: _Terms) -> bool:
    if status in TERMINAL or status in ("requires_action", "requires_capture"):
        return False
    if status == "attempted":
        return bool(terms.payment_method)
    return status != "requires_payment_method" or terms.on_decline == "fail"


def _entry(shard: str, row: Any) -> Entry:
    slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at_us = row
    return Entry(
        *(shard, slot, key, entry_id, kind, currency, source),
        *(tuple(accounts), tuple(amounts), tuple(sellers), created_at_us),
    )


async def read_derived(dsn: str, progress: Progress) -> Derived:
    """All that the aggregator holds."""
    derived = Derived()
    async with _snapshot("the aggregator's database", dsn) as connection:
        derived.positions = {row[0]: row[1] for row in await connection.fetch(AGGREGATOR["positions"])}
        total = await connection.fetchval(
            "select (select count(*) from oncepay.payments) + (select count(*) from oncepay.entries)"
            " + (select count(*) from oncepay.balance_links) + (select count(*) from oncepay.seller_days)"
        )
        step = _Steps("aggregator", total, progress)
        entries, links = derived.entries.append, derived.links.add

        def payment(row: Any) -> None:
            derived.payments[row[0]] = State(*tuple(row)[1:])

        def seller_day(row: Any) -> None:
            derived.seller_days[tuple(row)[:3]] = SellerDay(*tuple(row)[3:])

        await _read(connection, AGGREGATOR["payments"], payment, step)
        await _read(connection, AGGREGATOR["entries"], lambda row: entries(_entry(row[0], tuple(row)[1:])), step)
        await _read(connection, AGGREGATOR["links"], lambda row: links(Link(*row)), step)
        await _read(connection, AGGREGATOR["seller_days"], seller_day, step)
        for key, *state in await connection.fetch(AGGREGATOR["payouts"]):
            derived.payouts[key] = (state[0], state[1], state[2])
        for name, sums in (("accounts", derived.accounts), ("kinds", derived.kinds)):
            for first, currency, one, two in await connection.fetch(AGGREGATOR[name]):
                sums[first, currency] = int(one), int(two)
        step.finish()
    return derived


async def read_counts(target: ShardTarget, *, payouts: bool = False) -> tuple[int, int]:
    """How many payments of a shard are open, and on how many (those that only lack their fee, too) the platform works.

    With `payouts`, those that Tipalti still has to be told of count as work too.
    """
    async with _snapshot(f"shard {target.name}", target.dsn) as connection:
        row = await connection.fetchrow(SHARD["counts"])
        untold = await connection.fetchval(SHARD["payout_counts"]) if payouts else 0
        return row["open"], row["driven"] + untold


async def read_positions(dsn: str) -> dict[str, int]:
    """How far the aggregator is with each shard."""
    async with _snapshot("the aggregator's database", dsn) as connection:
        return {row[0]: row[1] for row in await connection.fetch(AGGREGATOR["positions"])}
