"""Payments as rows: to the arrays that `commit_batch` takes, and back."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from oncepay.keys import slot as slot_of
from oncepay.ledger import BalanceLink, Entry
from oncepay.payment import Key, Payment, Progress, Status, Terms

_UTC = datetime.UTC
_encode = msgspec.json.Encoder().encode
_terms = msgspec.json.Decoder(Terms).decode
_progress = msgspec.json.Decoder(Progress).decode


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
        terms=_terms(row["terms"]),
        fingerprint=row["fingerprint"],
        created_at_ms=milliseconds(row["created_at"]),
        updated_at_ms=milliseconds(row["updated_at"]),
        expires_at_ms=milliseconds(row["expires_at"]),
        intent=row["intent"] or "",
        amount_captured=row["amount_captured"],
        amount_refunded=row["amount_refunded"],
        progress=_progress(row["progress"]),
    )


def put_arrays(puts: Sequence[Put]) -> list[list[Any]]:
    """The nineteen arrays of the rows, in the order of `commit_batch`'s parameters. New rows bring their terms too."""
    rows = [_put_row(put) for put in puts]
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(19)]


def _put_row(put: Put) -> tuple[Any, ...]:
    p = put.payment
    own = (
        slot_of(p.key), p.key, put.expect, p.status.value, p.intent or None, _encode(p.progress).decode(),
        p.amount_captured, p.amount_refunded, p.open_work, bool(p.progress.disputes), put.event,
    )  # fmt: skip
    updated = moment(p.updated_at_ms)
    if put.expect:
        return (*own, None, None, None, None, None, None, None, updated)
    created = updated if p.created_at_ms == p.updated_at_ms else moment(p.created_at_ms)
    terms = _encode(p.terms).decode()
    return (*own, p.buyer, p.currency, p.amount, p.fingerprint, terms, created, moment(p.expires_at_ms), updated)


def entry_arrays(puts: Sequence[Put]) -> list[list[Any]]:
    """The eight arrays of the entries and the three of the links; the first of each is the put's ordinal, from 1."""
    entries: list[list[Any]] = [[] for _ in range(8)]
    links: list[list[Any]] = [[] for _ in range(3)]
    for ordinal, put in enumerate(puts, 1):
        for entry in put.entries:
            row = (
                ordinal, entry.entry_id, entry.kind, entry.currency, entry.source,
                array_literal([p.account for p in entry.postings]), array_literal([p.amount_minor for p in entry.postings]),
                array_literal([p.seller for p in entry.postings]),
            )  # fmt: skip
            for column, value in zip(entries, row, strict=True):
                column.append(value)
        for link in put.links:
            for column, value in zip(links, (ordinal, link.entry_id, link.balance_transaction), strict=True):
                column.append(value)
    return entries + links
