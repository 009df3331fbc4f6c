"""From a batch's rows to the columns of the statements in `sql/apply.sql`: sorted, each payment once, arrays as literals."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from oncepay.feed import EntryRow, LinkRow, PaymentRow, PayoutRow
from oncepay.payment_text import failure_in, items_and_fee_in

EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Columns = tuple[list[Any], ...]
"""Parallel lists, one a column, in the order of the statement's parameters."""

FAILURE_NOT_KNOWN = ""
"""In the column `failure`: keep what is there (None: there is no failure)."""


def time_of(time_us: int) -> dt.datetime:
    """Microseconds since 1970 as a UTC time."""
    return EPOCH + dt.timedelta(microseconds=time_us)


def text_array(values: Iterable[str]) -> str:
    """A Postgres array literal of texts."""
    return "{" + ",".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values) + "}"


def number_array(values: Iterable[int]) -> str:
    """A Postgres array literal of integers."""
    return "{" + ",".join(map(str, values)) + "}"


def _transposed(rows: Sequence[tuple[Any, ...]], width: int) -> Columns:
    return tuple(map(list, zip(*rows, strict=True))) if rows else tuple([] for _ in range(width))


def items_and_fee(terms: str | None) -> tuple[str | None, int | None]:
    """The items (a JSON array of objects) and the platform's fee of a payment's terms."""
    if terms is None:
        return None, None
    items, fee = items_and_fee_in(terms)
    return msgspec.json.encode(items).decode(), fee


def failure_of(progress: str | None) -> str | None:
    """The failure (JSON) in a payment's progress; FAILURE_NOT_KNOWN without progress."""
    if progress is None:
        return FAILURE_NOT_KNOWN
    failure = failure_in(progress)
    return None if failure is None else msgspec.json.encode(failure).decode()


def latest_payments(rows: Iterable[PaymentRow]) -> list[PaymentRow]:
    """Each payment once, by key: its highest version, with what only an earlier row of the batch says filled in."""
    latest: dict[str, PaymentRow] = {}
    for row in rows:
        known = latest.get(row.key)
        if known is None:
            latest[row.key] = row
            continue
        old, new = (known, row) if row.version > known.version else (row, known)
        if new.terms is None or new.progress is None:
            terms, progress = new.terms or old.terms, new.progress or old.progress
            new = msgspec.structs.replace(new, terms=terms, progress=progress)
        latest[row.key] = new
    return sorted(latest.values(), key=attrgetter("key"))


def payment_columns(rows: Sequence[PaymentRow]) -> Columns:
    """For `upsert_payments`."""
    made = [
        (
            *(r.key, r.slot, r.status, r.version, r.buyer, r.currency, r.amount, r.amount_captured, r.amount_refunded, r.intent),
            *items_and_fee(r.terms),
            *(failure_of(r.progress), time_of(r.created_at_us), time_of(r.updated_at_us), r.lsn),
        )
        for r in rows
    ]
    return _transposed(made, 16)


def history_columns(rows: Iterable[PaymentRow], *, at_commit: bool) -> Columns:
    """For `add_history`. Without `at_commit` the rows are a table's, and when each was committed isn't known exactly."""
    made = [
        (r.key, r.version, r.slot, r.status, r.event, r.actor, time_of(r.committed_at_ms * 1000), r.lsn if at_commit else None)
        for r in sorted(rows, key=attrgetter("key", "version"))
    ]
    return _transposed(made, 8)


def sorted_entries(rows: Iterable[EntryRow]) -> list[EntryRow]:
    """In the order of the table's key."""
    return sorted(rows, key=attrgetter("key", "entry_id"))


def entry_columns(rows: Sequence[EntryRow]) -> Columns:
    """For `insert_entries`."""
    made = [
        (
            *(r.key, r.entry_id, r.slot, r.kind, r.currency, r.source),
            *(text_array(r.accounts), number_array(r.amounts), text_array(r.sellers), time_of(r.created_at_us), r.lsn),
        )
        for r in rows
    ]
    return _transposed(made, 11)


def content_columns(columns: Columns) -> Columns:
    """For `differing_entries`: the columns of an entry's content, out of those for `insert_entries`."""
    return (*columns[0:2], *columns[3:9])


def link_columns(rows: Iterable[LinkRow]) -> Columns:
    """For `insert_links`."""
    made = [
        (r.balance_transaction, r.key, r.entry_id, r.slot, time_of(r.created_at_us), r.lsn)
        for r in sorted(rows, key=attrgetter("balance_transaction", "key", "entry_id"))
    ]
    return _transposed(made, 6)


def payout_columns(rows: Iterable[PayoutRow]) -> Columns:
    """For `upsert` of payouts: each once, by key, its highest version, with what only an earlier row of the batch says."""
    latest: dict[str, PayoutRow] = {}
    for row in rows:
        known = latest.get(row.key)
        if known is not None:
            old, new = (known, row) if row.version > known.version else (row, known)
            positions, progress = new.positions or old.positions, new.progress or old.progress
            row = msgspec.structs.replace(new, positions=positions, progress=progress)
        latest[row.key] = row
    made = [
        (
            *(r.key, r.slot, r.seller, r.currency, r.sequence, r.status, r.version, r.amount, r.payee, r.ref_code, r.run),
            *(r.created_by, r.positions, r.progress, time_of(r.created_at_us), time_of(r.updated_at_us), r.lsn),
        )
        for r in sorted(latest.values(), key=attrgetter("seller", "currency", "sequence"))
    ]
    return _transposed(made, 17)
