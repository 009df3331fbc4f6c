"""Payments as rows: to the arrays that `commit_batch` takes, and back."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from oncepay.entry_rows import packed
from oncepay.keys import slot as slot_of
from oncepay.ledger import BalanceLink, Entry
from oncepay.payment import Key, Payment, Status
from oncepay.payment_text import parse_progress, parse_terms, progress_text, terms_text

_UTC = datetime.UTC
NEW_COLUMNS, CHANGE_COLUMNS, ENTRY_COLUMNS, LINK_COLUMNS = 13, 12, 10, 3
"""How many arrays each kind of row comes in."""


class Put(msgspec.Struct, frozen=True):
    """One row to write: `expect` is 0 for a new row, else the version that the row must still have."""

    payment: Payment
    expect: int
    event: str
    entries: tuple[Entry, ...] = ()
    links: tuple[BalanceLink, ...] = ()


def moment(milliseconds: int) -> datetime.datetime:
    """A timestamp for Postgres from milliseconds since 1970."""
    return datetime.datetime.fromtimestamp(milliseconds / 1000, _UTC)


def milliseconds(value: datetime.datetime) -> int:
    """Milliseconds since 1970 of a timestamp from Postgres."""
    return round(value.timestamp() * 1000)


def array_literal(values: Sequence[str | int]) -> str:
    """A Postgres array literal, every text quoted."""
    return "{" + ",".join(_quote(v) if isinstance(v, str) else str(v) for v in values) + "}"


def _quote(value: str) -> str:
    if value.isalnum():
        return f'"{value}"'
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def payment_of(row: Mapping[str, Any]) -> Payment:
    """The payment in a row of `oncepay.payments` (or of an answer of `commit_batch`)."""
    return Payment(
        key=Key(row["key"]),
        status=Status(row["status"]),
        version=row["version"],
        buyer=row["buyer"],
        currency=row["currency"],
        amount=row["amount"],
        terms=parse_terms(row["terms"]),
        fingerprint=row["fingerprint"],
        created_at_ms=milliseconds(row["created_at"]),
        updated_at_ms=milliseconds(row["updated_at"]),
        expires_at_ms=milliseconds(row["expires_at"]),
        intent=row["intent"] or "",
        amount_captured=row["amount_captured"],
        amount_refunded=row["amount_refunded"],
        progress=parse_progress(row["progress"]),
    )


def new_arrays(puts: Sequence[Put]) -> list[list[Any]]:
    """The arrays of new rows, in the order of `commit_batch`'s parameters."""
    return _columns([_new_row(put) for put in puts], NEW_COLUMNS)


def change_arrays(puts: Sequence[Put]) -> list[list[Any]]:
    """The arrays of changes."""
    return _columns([_change_row(put) for put in puts], CHANGE_COLUMNS)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _new_row(put: Put) -> tuple[Any, ...]:
    p = put.payment
    if p.intent or p.amount_captured or put.entries:
        raise ValueError(f"{p.key} is new: it has neither an intent nor entries")
    return (
        slot_of(p.key), p.key, p.status.value, p.open_work, put.event, p.buyer, p.currency, p.amount, p.fingerprint,
        terms_text(p.terms), progress_text(p.progress), p.created_at_ms, p.expires_at_ms,
    )  # fmt: skip


def _change_row(put: Put) -> tuple[Any, ...]:
    p = put.payment
    return (
        slot_of(p.key), p.key, put.expect, p.status.value, p.intent or None, progress_text(p.progress), p.amount_captured,
        p.amount_refunded, p.open_work, bool(p.progress.disputes), put.event, p.updated_at_ms,
    )  # fmt: skip


def entry_arrays(puts: Sequence[Put]) -> list[list[Any]]:
    """The arrays of the changes' entries and of their links; the first of each is the put's ordinal, from 1."""
    entries: list[tuple[Any, ...]] = []
    links: list[tuple[Any, ...]] = []
    for ordinal, put in enumerate(puts, 1):
        if not put.entries and not put.links:
            continue
        rows, left = packed(put.entries, put.links)
        for row in rows:
            sellers = None if row.sellers is None else array_literal(row.sellers)
            entries.append((
                ordinal, row.entry_id, row.kind, row.currency, row.source, array_literal(row.accounts),
                array_literal(row.amounts), sellers, row.balance_transaction, row.fee,
            ))  # fmt: skip
        links += [(ordinal, link.entry_id, link.balance_transaction) for link in left]
    return _columns(entries, ENTRY_COLUMNS) + _columns(links, LINK_COLUMNS)
