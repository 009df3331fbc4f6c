"""From the plugin's messages to whole transactions, with their rows as the feed carries them."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import msgspec

from oncepay.feed import EntryRow, LinkRow, PaymentRow, PayoutRow
from shard.store.entry_rows import EntryRow as StoredEntry
from shard.store.entry_rows import entries_of, links_of
from shard.worker.pgoutput import Begin, Commit, Decoder, Insert, MalformedMessage, Message, Row, Update

MESSAGE_PREFIX = "oncepay"
ROW_BYTES = 200
"""What a row costs in memory beside its text, about."""

_PAYMENT_COLUMNS = (
    "slot", "key", "status", "version", "buyer", "currency", "amount", "amount_captured", "amount_refunded", "intent",
)  # fmt: skip
_MOMENTS = ("created_at", "updated_at", "expires_at")
_payment_head = itemgetter(*_PAYMENT_COLUMNS)
_payment_tail = itemgetter(*_MOMENTS, "open_work", "event", "actor")
_ENTRY_COLUMNS = (
    "slot", "key", "entry_id", "kind", "currency", "source", "accounts", "amounts", "sellers", "balance_transaction", "fee",
    "created_at",
)  # fmt: skip
_entry_content = itemgetter(*_ENTRY_COLUMNS[2:-3])
_LINK_COLUMNS = ("slot", "key", "entry_id", "balance_transaction", "created_at")
_PAYOUT_COLUMNS = (
    "slot", "key", "seller", "currency", "sequence", "status", "version", "amount", "payee", "ref_code", "run", "created_by",
)  # fmt: skip
PAYMENTS, ENTRIES, LINKS = "oncepay.payments", "oncepay.entries", "oncepay.balance_links"
PAYOUTS = "oncepay.payouts"
WANTED = {
    PAYMENTS: frozenset((*_PAYMENT_COLUMNS, "agreed", "course", "terms", "progress", "open_work", "event", "actor", *_MOMENTS)),
    ENTRIES: frozenset(_ENTRY_COLUMNS),
    LINKS: frozenset(_LINK_COLUMNS),
    PAYOUTS: frozenset((*_PAYOUT_COLUMNS, "positions", "progress", "open_work", "created_at", "updated_at")),
}


class Transaction(msgspec.Struct):
    """A committed transaction. `end_lsn` is the position after its commit record; `nonces` are its messages' texts."""

    end_lsn: int
    committed_at_ms: int
    payments: list[PaymentRow]
    entries: list[EntryRow]
    links: list[LinkRow]
    nonces: list[str]
    size_bytes: int
    payouts: list[PayoutRow] = []

    @property
    def rows(self) -> int:
        """How many rows it changed."""
        return len(self.payments) + len(self.entries) + len(self.links) + len(self.payouts)


class Assembler:
    """Takes the messages of one replication connection, gives back a transaction at each commit."""

    def __init__(self) -> None:
        self._decoder = Decoder(WANTED)
        self._began: Begin | None = None
        self._rows: dict[str, list[Row]] = {PAYMENTS: [], ENTRIES: [], LINKS: [], PAYOUTS: []}
        self._nonces: list[str] = []
        self._size_bytes = 0

    def feed(self, payload: bytes) -> Transaction | None:
        """One message. Raises MalformedMessage when it can't be decoded or doesn't belong here."""
        message = self._decoder.decode(payload)
        kind = type(message)
        if kind is Insert or kind is Update:
            rows = self._rows.get(message.table)  # type: ignore[union-attr]
            if rows is not None:
                if self._began is None:
                    raise MalformedMessage("a change outside of a transaction")
                rows.append(message.row)  # type: ignore[union-attr]
                self._size_bytes += len(payload) + ROW_BYTES
        elif kind is Begin:
            self._start(message)  # type: ignore[arg-type]
        elif kind is Message:
            if message.prefix == MESSAGE_PREFIX and message.transactional:  # type: ignore[union-attr]
                self._nonces.append(message.content.decode(errors="replace"))  # type: ignore[union-attr]
        elif kind is Commit:
            return self._finish(message)  # type: ignore[arg-type]
        return None

    def _start(self, begin: Begin) -> None:
        if self._began is not None:
            raise MalformedMessage("a transaction within a transaction")
        self._began = begin
        self._rows = {PAYMENTS: [], ENTRIES: [], LINKS: [], PAYOUTS: []}
        self._nonces = []
        self._size_bytes = ROW_BYTES

    def _finish(self, commit: Commit) -> Transaction:
        if self._began is None or self._began.commit_lsn != commit.commit_lsn:
            raise MalformedMessage("a commit without its begin")
        self._began = None
        lsn, at_ms = commit.end_lsn, commit.committed_at_us // 1000
        rows = self._rows
        try:
            return Transaction(
                lsn,
                at_ms,
                [_payment(lsn, at_ms, row) for row in rows[PAYMENTS]],
                [entry for row in rows[ENTRIES] for entry in entry_rows(lsn, at_ms, row)],
                [link for row in rows[ENTRIES] for link in entry_links(lsn, at_ms, row)]
                + [_link(lsn, at_ms, row) for row in rows[LINKS]],
                self._nonces,
                self._size_bytes,
                [_payout(lsn, at_ms, row) for row in rows[PAYOUTS]],
            )
        except (KeyError, TypeError) as error:
            raise MalformedMessage(f"a row lacks a column that the feed needs: {error!r}") from error


def _payment(lsn: int, at_ms: int, row: dict[str, Any]) -> PaymentRow:
    terms, progress = row.get("agreed") or row.get("terms"), row.get("course") or row.get("progress")
    return PaymentRow(*(lsn, at_ms, *_payment_head(row), terms, progress, *_payment_tail(row)))


def entry_rows(lsn: int, at_ms: int, row: Mapping[str, Any]) -> list[EntryRow]:
    """The entries in a row of the shard's entries. Raises KeyError for a missing column, or a code of a later version."""
    slot, key, created_at = row["slot"], row["key"], row["created_at"]
    return [EntryRow(lsn, at_ms, slot, key, *entry, created_at) for entry in entries_of(_stored(row))]


def entry_links(lsn: int, at_ms: int, row: Mapping[str, Any]) -> list[LinkRow]:
    """The links in a row of the shard's entries."""
    slot, key, created_at = row["slot"], row["key"], row["created_at"]
    return [LinkRow(lsn, at_ms, slot, key, *link, created_at) for link in links_of(_stored(row))]


def _stored(row: Mapping[str, Any]) -> StoredEntry:
    """A log that was written before the last two columns were there doesn't have them."""
    entry_id, kind, currency, source, accounts, amounts, sellers = _entry_content(row)
    transaction, fee = row.get("balance_transaction"), row.get("fee")
    return StoredEntry(entry_id, kind, currency, source, accounts, amounts, sellers, transaction, fee)


def _link(lsn: int, at_ms: int, row: dict[str, Any]) -> LinkRow:
    return LinkRow(lsn, at_ms, *(row[name] for name in _LINK_COLUMNS))


def _payout(lsn: int, at_ms: int, row: dict[str, Any]) -> PayoutRow:
    values = [lsn, at_ms, *(row[name] for name in _PAYOUT_COLUMNS), row.get("positions"), row.get("progress")]
    return PayoutRow(*values, *(row[name] for name in ("open_work", "created_at", "updated_at")))
