"""What of a batch is an event: changes of a payment's state, refunds, disputes, payouts. Ids are stable: the same is the same."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from aggregator.rows import failure_of, time_of
from oncepay.entry_rows import entries_of
from oncepay.feed import EntryRow, FeedBatch, PaymentRow, PayoutRow

TERMINAL = frozenset({"succeeded", "failed", "canceled"})
INTERNAL = frozenset({"attempted", "confirming", "canceling"})
"""States on the way that mean nothing to anybody outside."""
OF_ENTRY = {
    "refund": "refund.created",
    "refund_paid": "refund.paid",
    "refund_returned": "refund.returned",
    "refund_reversed": "refund.failed",
    "dispute": "dispute.funds_withdrawn",
    "dispute_reinstated": "dispute.funds_reinstated",
}
"""Entries that are events, by kind."""
PAYMENT_TYPES = tuple(
    f"payment.{status}"
    for status in (
        *("created", "processing", "requires_payment_method", "requires_action", "requires_capture"),
        *sorted(TERMINAL),
    )
)
FAILURE_UNKNOWN = ""


class Event(NamedTuple):
    """One event. `data` is JSON; items and the platform's fee of a payment, which never change, are added when it is sent."""

    lsn: int
    id: str
    type: str
    key: str
    at: dt.datetime
    data: str


def event_id(type_: str, key: str, which: str) -> str:
    """The same happening has the same id, however often it comes and whoever brings it."""
    return "evt_" + blake2b(f"{type_}\0{key}\0{which}".encode(), digest_size=16).hexdigest()


def events_of(batch: FeedBatch, payments: Mapping[str, str] = {}, payouts: Mapping[str, str] = {}) -> list[Event]:
    """The batch's events, in commit order; of one commit the payment's before its entries'.

    `payments` and `payouts` are the states before the batch, by key: with them the events are the same however the log is cut.
    """
    found = [
        *_of_payments(batch.payments, dict(payments)), *_of_entries(batch.entries), *_of_payouts(batch.payouts, dict(payouts))
    ]  # fmt: skip
    return sorted(found, key=lambda event: event.lsn)


def _of_payments(rows: tuple[PaymentRow, ...], before: dict[str, str]) -> Iterator[Event]:
    """A state once: in the log there are versions that change something else. A terminal state comes once for ever."""
    for row in rows:
        if before.get(row.key) == row.status:
            continue
        before[row.key] = row.status
        if row.status in INTERNAL:
            continue
        type_ = f"payment.{row.status}"
        which = "" if row.status in TERMINAL or row.version == 1 else str(row.version)
        yield _event(row, type_, which, row.updated_at_us, _payment_data(row))


def _payment_data(row: PaymentRow) -> dict[str, Any]:
    data: dict[str, Any] = {
        "key": row.key, "status": row.status, "version": row.version, "buyer": row.buyer, "currency": row.currency,
        "amount": row.amount, "amount_captured": row.amount_captured, "amount_refunded": row.amount_refunded,
        "payment_intent": row.intent, "created_at": _shown(row.created_at_us), "updated_at": _shown(row.updated_at_us),
    }  # fmt: skip
    failure = failure_of(row.progress)
    if failure:
        data["failure"] = msgspec.Raw(failure.encode())
    return data


def _of_entries(rows: tuple[EntryRow, ...]) -> Iterator[Event]:
    for row in rows:
        type_ = OF_ENTRY.get(row.kind)
        if type_ is None:
            continue
        entry = entries_of(row.stored)[0]
        sellers: dict[str, int] = {}
        for amount, seller in zip(entry.amounts, entry.sellers, strict=True):
            if seller:
                sellers[seller] = sellers.get(seller, 0) - amount
        data = {
            "key": row.key, "entry": row.entry_id, "source": entry.source, "currency": row.currency,
            "amount": sum(amount for amount in row.amounts if amount > 0), "sellers": sellers,
            "created_at": _shown(row.created_at_us),
        }  # fmt: skip
        yield _event(row, type_, row.entry_id, row.created_at_us, data)


def _of_payouts(rows: tuple[PayoutRow, ...], before: dict[str, str]) -> Iterator[Event]:
    for row in rows:
        if before.get(row.key) == row.status:
            continue
        before[row.key] = row.status
        data = {
            "key": row.key, "seller": row.seller, "currency": row.currency, "sequence": row.sequence, "status": row.status,
            "version": row.version, "amount": row.amount, "created_at": _shown(row.created_at_us),
            "updated_at": _shown(row.updated_at_us),
        }  # fmt: skip
        yield _event(row, f"payout.{row.status}", str(row.version), row.updated_at_us, data)


def _event(row: PaymentRow | EntryRow | PayoutRow, type_: str, which: str, at_us: int, data: dict[str, Any]) -> Event:
    return Event(row.lsn, event_id(type_, row.key, which), type_, row.key, time_of(at_us), msgspec.json.encode(data).decode())


def _shown(time_us: int) -> str:
    return time_of(time_us).isoformat(timespec="milliseconds").replace("+00:00", "Z")
