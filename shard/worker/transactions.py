"""From the plugin's messages to whole transactions, with their rows as the feed carries them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from oncepay.feed import EntryRow, LinkRow, PaymentRow, PayoutRow
from shard.worker.pgoutput import Begin, Commit, Decoder, Insert, MalformedMessage, Message, Relation, Update, reader_of
from shard.worker.rows import UNUSUAL, Read

MESSAGE_PREFIX = "oncepay"
ROW_BYTES = 200
"""What a row costs in memory beside its text, about."""


class Columns(NamedTuple):
    """What the feed takes of a table, in the order in which `_payment` and its like get it.

    `optional` ones are None where they are null, where the log doesn't repeat a large value that didn't change, and in a log
    from before the table had them.
    """

    names: tuple[str, ...]
    optional: frozenset[str] = frozenset()


PAYMENTS, ENTRIES, LINKS = "oncepay.payments", "oncepay.entries", "oncepay.balance_links"
PAYOUTS = "oncepay.payouts"
COLUMNS = {
    PAYMENTS: Columns(
        (
            "slot", "key", "status", "version", "buyer", "currency", "amount", "amount_captured", "amount_refunded", "intent",
            "agreed", "terms", "course", "progress", "created_at", "updated_at", "expires_at", "open_work", "event", "actor",
        ),
        frozenset({"agreed", "terms", "course", "progress"}),
    ),
    ENTRIES: Columns(
        (
            "slot", "key", "entry_id", "kind", "currency", "source", "accounts", "amounts", "sellers", "balance_transaction",
            "fee", "created_at",
        ),
        frozenset({"balance_transaction", "fee"}),
    ),
    LINKS: Columns(("slot", "key", "entry_id", "balance_transaction", "created_at")),
    PAYOUTS: Columns(
        (
            "slot", "key", "seller", "currency", "sequence", "status", "version", "amount", "payee", "ref_code", "run",
            "created_by", "positions", "progress", "open_work", "created_at", "updated_at",
        ),
        frozenset({"positions", "progress"}),
    ),
}  # fmt: skip
WANTED = {table: frozenset(columns.names) for table, columns in COLUMNS.items()}

Values = tuple[Any, ...]


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


class _Table:
    """A table of the feed as this connection described it, and its rows in the transaction that is being read."""

    __slots__ = ("columns", "read", "rows")

    def __init__(self, columns: Columns, read: Read | None, rows: list[Values]) -> None:
        self.columns = columns
        self.read = read
        self.rows = rows

    def usual(self, payload: bytes) -> Values | None:
        """A change's values, unless it has to be decoded in the general way."""
        try:
            return self.read(payload) if self.read is not None else None
        except UNUSUAL:
            return None

    def values(self, row: dict[str, Any]) -> Values:
        """The same from a decoded row. Raises MalformedMessage when it lacks a column."""
        optional = self.columns.optional
        try:
            return tuple(row.get(name) if name in optional else row[name] for name in self.columns.names)
        except KeyError as error:
            raise MalformedMessage(f"a row lacks a column that the feed needs: {error!r}") from error


class Assembler:
    """Takes the messages of one replication connection, gives back a transaction at each commit."""

    def __init__(self) -> None:
        self._decoder = Decoder(WANTED)
        self._began: Begin | None = None
        self._rows: dict[str, list[Values]] = {table: [] for table in COLUMNS}
        self._tables: dict[bytes, _Table] = {}
        """By the table's oid as it stands in a message."""
        self._nonces: list[str] = []
        self._size_bytes = 0

    def feed(self, payload: bytes) -> Transaction | None:
        """One message. Raises MalformedMessage when it can't be decoded or doesn't belong here."""
        table = self._tables.get(payload[1:5])
        if table is None or payload[0] not in _CHANGES:
            return self._other(payload)
        values = table.usual(payload)
        if values is None or self._began is None:
            return self._other(payload)
        table.rows.append(values)
        self._size_bytes += len(payload) + ROW_BYTES
        return None

    def _other(self, payload: bytes) -> Transaction | None:
        """A message that is no usual change of a table of the feed."""
        message = self._decoder.decode(payload)
        if isinstance(message, Insert | Update):
            table = self._tables.get(payload[1:5])
            if table is None:
                return None
            if self._began is None:
                raise MalformedMessage("a change outside of a transaction")
            table.rows.append(table.values(message.row))
            self._size_bytes += len(payload) + ROW_BYTES
        elif isinstance(message, Begin):
            self._start(message)
        elif isinstance(message, Relation):
            self._described(payload[1:5], message)
        elif isinstance(message, Message):
            if message.prefix == MESSAGE_PREFIX and message.transactional:
                self._nonces.append(message.content.decode(errors="replace"))
        elif isinstance(message, Commit):
            return self._finish(message)
        return None

    def _described(self, oid: bytes, relation: Relation) -> None:
        columns = COLUMNS.get(relation.name)
        if columns is None:
            self._tables.pop(oid, None)
        else:
            read = reader_of(relation, columns.names, columns.optional)
            self._tables[oid] = _Table(columns, read, self._rows[relation.name])

    def _start(self, begin: Begin) -> None:
        if self._began is not None:
            raise MalformedMessage("a transaction within a transaction")
        self._began = begin
        for rows in self._rows.values():
            rows.clear()
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
                [_payment(lsn, at_ms, values) for values in rows[PAYMENTS]],
                [entry_row(lsn, at_ms, values) for values in rows[ENTRIES]],
                [_link(lsn, at_ms, values) for values in rows[LINKS]],
                self._nonces,
                self._size_bytes,
                [_payout(lsn, at_ms, values) for values in rows[PAYOUTS]],
            )
        except (KeyError, TypeError) as error:
            raise MalformedMessage(f"a row lacks a value that the feed needs: {error!r}") from error


_CHANGES = b"IU"


def _payment(lsn: int, at_ms: int, values: Values) -> PaymentRow:
    (
        slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent,
        agreed, terms, course, progress, created_at, updated_at, expires_at, open_work, event, actor,
    ) = values  # fmt: skip
    return PaymentRow(
        lsn, at_ms, slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent,
        agreed or terms, course or progress, created_at, updated_at, expires_at, open_work, event, actor,
    )  # fmt: skip


def entry_row(lsn: int, at_ms: int, values: Sequence[Any]) -> EntryRow:
    """A row of the shard's entries, with the kind where its id says it."""
    slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, transaction, fee, created_at = values
    if kind is None:
        kind = entry_id if source is not None else entry_id.partition(":")[0]
    return EntryRow(
        *(lsn, at_ms, slot, key, entry_id, kind, currency, source, tuple(accounts), tuple(amounts)),
        *(None if sellers is None else tuple(sellers), created_at, transaction, fee),
    )


def _link(lsn: int, at_ms: int, values: Values) -> LinkRow:
    return LinkRow(lsn, at_ms, *values)


def _payout(lsn: int, at_ms: int, values: Values) -> PayoutRow:
    return PayoutRow(lsn, at_ms, *values)
