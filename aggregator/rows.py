"""From a batch's rows to the columns of the statements in `sql/apply.sql`: sorted, each payment once, arrays as literals."""

from __future__ import annotations

import bisect
import datetime as dt
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from oncepay.entry_rows import entries_of
from oncepay.errors import MalformedBody
from oncepay.feed import EntryRow, LinkRow, PaymentRow, PayoutRow, lsn_text
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
    """A Postgres array literal of texts. Raises MalformedBody for a text that no database can hold."""
    values = list(values)
    if not values:
        return "{}"
    joined = "\0".join(values)
    if joined.count("\0") != len(values) - 1:
        raise MalformedBody("a text holds a character with the number 0")
    return '{"' + joined.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'


def optional_text_array(values: Iterable[str | None]) -> str:
    """As `text_array`, with nulls."""
    return "{" + ",".join("null" if value is None else text_array((value,))[1:-1] for value in values) + "}"


def number_array(values: Iterable[int | None]) -> str:
    """A Postgres array literal of integers, with nulls."""
    return "{" + ",".join(["null" if value is None else str(value) for value in values]) + "}"


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


def by_payment(rows: Iterable[PaymentRow]) -> list[list[PaymentRow]]:
    """Each payment's rows, by version; payments by key."""
    grouped: dict[str, list[PaymentRow]] = {}
    for row in rows:
        known = grouped.get(row.key)
        if known is None:
            grouped[row.key] = [row]
        elif row.version >= known[-1].version:
            known.append(row)
        else:
            bisect.insort(known, row, key=attrgetter("version"))
    return [grouped[key] for key in sorted(grouped)]


def latest_of(rows: Sequence[PaymentRow]) -> PaymentRow:
    """The last of a payment's rows, with what only an earlier one says filled in."""
    latest = rows[-1]
    if (latest.terms is None or latest.progress is None) and len(rows) > 1:
        before = latest_of(rows[:-1])
        terms, progress = latest.terms or before.terms, latest.progress or before.progress
        return msgspec.structs.replace(latest, terms=terms, progress=progress)
    return latest


def payment_columns(rows: Sequence[PaymentRow]) -> tuple[str, ...]:
    """For `upsert_payments`: a literal of each column."""
    terms = [items_and_fee(row.terms) for row in rows]
    return (
        text_array(row.key for row in rows),
        number_array(row.slot for row in rows),
        text_array(row.status for row in rows),
        number_array(row.version for row in rows),
        text_array(row.buyer for row in rows),
        text_array(row.currency for row in rows),
        number_array(row.amount for row in rows),
        number_array(row.amount_captured for row in rows),
        number_array(row.amount_refunded for row in rows),
        optional_text_array(row.intent for row in rows),
        optional_text_array(items for items, _ in terms),
        number_array(fee for _, fee in terms),
        optional_text_array(failure_of(row.progress) for row in rows),
        number_array(row.created_at_us for row in rows),
        number_array(row.updated_at_us for row in rows),
        text_array(lsn_text(row.lsn) for row in rows),
    )


class Life(NamedTuple):
    """The versions of a payment that one batch brings, as `payment_versions` keeps them."""

    key: str
    slot: int
    first_version: int
    last_version: int
    versions: str


_json = msgspec.json.Encoder()


def life_of(rows: Sequence[PaymentRow], *, at_commit: bool = True) -> Life:
    """Of a payment's rows, by version. Without `at_commit` they are a table's, whose commits' positions aren't known."""
    first, last = rows[0], rows[-1]
    versions = [(r.version, r.status, r.event, r.actor, r.committed_at_ms, r.lsn if at_commit else None) for r in rows]
    return Life(first.key, first.slot, first.version, last.version, _json.encode(versions).decode())


def sorted_entries(rows: Iterable[EntryRow]) -> list[EntryRow]:
    """In the order of the table's key."""
    return sorted(rows, key=attrgetter("key", "entry_id"))


def entry_columns(rows: Sequence[EntryRow]) -> Columns:
    """For `insert_entries`."""
    made = [
        (
            *(r.key, r.entry_id, r.slot, r.kind, r.currency, r.source, text_array(r.accounts), number_array(r.amounts)),
            *(
                None if r.sellers is None else text_array(r.sellers),
                time_of(r.created_at_us),
                r.lsn,
                r.balance_transaction,
                r.fee,
            ),
        )
        for r in rows
    ]
    return _transposed(made, 13)


def content_columns(rows: Sequence[EntryRow]) -> Columns:
    """For `differing_entries`: the entries in the rows, as they were booked."""
    made = [
        (
            *(row.key, read.entry_id, read.kind, read.currency, read.source),
            *(text_array(read.accounts), number_array(read.amounts), text_array(read.sellers)),
        )
        for row in rows
        for read in entries_of(row.stored)
    ]
    return _transposed(made, 8)


def sorted_links(rows: Iterable[LinkRow]) -> list[LinkRow]:
    """In the order of the table's key."""
    return sorted(rows, key=attrgetter("balance_transaction", "key", "entry_id"))


def link_columns(rows: Sequence[LinkRow]) -> tuple[str, ...]:
    """For `insert_links`: a literal of each column."""
    return (
        text_array(row.balance_transaction for row in rows),
        text_array(row.key for row in rows),
        text_array(row.entry_id for row in rows),
        number_array(row.slot for row in rows),
        number_array(row.created_at_us for row in rows),
        text_array(lsn_text(row.lsn) for row in rows),
    )


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
