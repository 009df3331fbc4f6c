"""The change feed: what a shard's worker forwards to the aggregator, and what the aggregator answers.

A batch holds the changes of one shard between two positions of its log, in commit order. It is applied whole, in one
transaction with the shard's watermark, or not at all. Rows travel as arrays (msgpack), so a member is only ever added
at the end, with a default.
"""

from __future__ import annotations

import msgspec

from oncepay.entry_rows import EntryRow as StoredEntry

FEED_ROWS_MAX = 10_000
"""Rows in one batch, all kinds together: the worker closes a batch at the first commit past it. No transaction is split."""

FEED_BYTES_MAX = 64 * 1024 * 1024
"""The largest body that the aggregator reads."""


class PaymentRow(msgspec.Struct, array_like=True, frozen=True):
    """A payment as one commit left it. Times in microseconds since 1970 (UTC), exactly as the shard has them.

    `lsn` is the end of its commit, `committed_at_ms` the transaction's time. `terms` and `progress` are the columns'
    JSON text; None when the log doesn't repeat a large value that didn't change: what an earlier row said still holds.
    `event` is why this version was made, `actor` the process that made it.
    """

    lsn: int
    committed_at_ms: int
    slot: int
    key: str
    status: str
    version: int
    buyer: str
    currency: str
    amount: int
    amount_captured: int
    amount_refunded: int
    intent: str | None
    terms: str | None
    progress: str | None
    created_at_us: int
    updated_at_us: int
    expires_at_us: int
    open_work: bool = True
    event: str = ""
    actor: str = ""


class EntryRow(msgspec.Struct, array_like=True, frozen=True):
    """A row of the shard's ledger: an entry, and with `fee` Stripe's fee as an entry of its own (oncepay/entry_rows.py reads it).

    Parallel tuples of account, amount (minor units, debits positive) and on whose behalf; where `sellers` is None `accounts` are
    codes. `source` is None where `entry_id` is `kind:source`. `balance_transaction` is what the row's entries are linked to.
    """

    lsn: int
    committed_at_ms: int
    slot: int
    key: str
    entry_id: str
    kind: str
    currency: str
    source: str | None
    accounts: tuple[str, ...]
    amounts: tuple[int, ...]
    sellers: tuple[str, ...] | None
    created_at_us: int
    balance_transaction: str | None = None
    fee: int | None = None

    @property
    def stored(self) -> StoredEntry:
        """As `entries_of` and `links_of` read it."""
        return StoredEntry(
            *(self.entry_id, self.kind, self.currency, self.source, self.accounts, self.amounts, self.sellers),
            *(self.balance_transaction, self.fee),
        )


class LinkRow(msgspec.Struct, array_like=True, frozen=True):
    """A balance transaction at Stripe and an entry whose posting on the clearing account is (a part of) its net, where the
    entry's own row doesn't say it."""

    lsn: int
    committed_at_ms: int
    slot: int
    key: str
    entry_id: str
    balance_transaction: str
    created_at_us: int


class PayoutRow(msgspec.Struct, array_like=True, frozen=True):
    """A payout as one commit left it; members as those of `oncepay.payout.Payout`, times in microseconds since 1970.

    `positions` and `progress` are the columns' JSON text; `progress` is None when the log doesn't repeat a large value that
    didn't change.
    """

    lsn: int
    committed_at_ms: int
    slot: int
    key: str
    seller: str
    currency: str
    sequence: int
    status: str
    version: int
    amount: int
    payee: str
    ref_code: str
    run: str
    created_by: str
    positions: str | None
    progress: str | None
    open_work: bool
    created_at_us: int
    updated_at_us: int


class FeedBatch(msgspec.Struct, array_like=True, frozen=True):
    """All changes of `shard` with from_lsn < lsn <= to_lsn, in commit order.

    `to_lsn` is the end of a commit of the worker's own that is on the quorum and came back in the same stream.
    `incarnation` names the shard's history: positions of one mean nothing in another. `epoch` is the worker's.
    """

    shard: str
    incarnation: str
    epoch: int
    from_lsn: int
    to_lsn: int
    payments: tuple[PaymentRow, ...] = ()
    entries: tuple[EntryRow, ...] = ()
    links: tuple[LinkRow, ...] = ()
    payouts: tuple[PayoutRow, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows the batch holds."""
        return len(self.payments) + len(self.entries) + len(self.links) + len(self.payouts)


class FeedAnswer(msgspec.Struct, frozen=True):
    """What became of a batch (JSON). When `applied` is false nothing was: go on from `watermark`.

    `watermark` is None when the aggregator has never seen the shard. `incarnation` and `epoch` are the last that it
    accepted; `reason` is a word for logs: `gap`, `incarnation`, `epoch`.
    """

    applied: bool
    watermark: int | None
    incarnation: str
    epoch: int
    reason: str = ""


class FeedPosition(msgspec.Struct, frozen=True):
    """How far the aggregator has got with a shard (JSON). `watermark` is None when it has never seen it."""

    watermark: int | None
    incarnation: str
    epoch: int


class RebuildHead(msgspec.Struct, array_like=True, frozen=True):
    """How a rebuild of a shard's derived data begins: all that the shard's tables hold at `lsn` follows.

    `slots` are the ranges (first, last) that the shard owned then: what is derived of these is replaced. `copied` are the tables
    whose rows come as Postgres copies them (`COPIED`); of payments those that are unusual come in batches all the same.
    """

    shard: str
    incarnation: str
    epoch: int
    lsn: int
    slots: tuple[tuple[int, int], ...]
    copied: tuple[str, ...] = ()


_ENTRY_ROWS = "shard key entry_id kind currency slot created_at lsn source accounts amounts sellers balance_transaction fee"
_PAYMENTS = (
    "shard key slot version amount amount_captured amount_refunded created_at updated_at lsn status buyer currency payment_intent"
    " items platform_fee failure"
)
COPIED: dict[str, tuple[str, ...]] = {
    "entry_rows": tuple(_ENTRY_ROWS.split()),
    "link_rows": ("shard", "balance_transaction", "key", "entry_id", "slot", "created_at", "lsn"),
    "payment_versions": ("shard", "key", "slot", "first_version", "last_version", "versions"),
    "payments": tuple(_PAYMENTS.split()),
}
"""Tables of the aggregator whose rows a shard's Postgres can write as they are, and their columns in its order. The ledger's are
sent first: while the shard's node makes the others' rows, the aggregator's works at them."""

COPY_TAG = 0xC1
"""The first byte of a frame with a part of what Postgres' COPY wrote; a batch never begins with it (msgpack doesn't use it)."""


def encode_copy(table: int, part: bytes = b"") -> bytes:
    """A part of what COPY (binary) wrote for `RebuildHead.copied[table]`, as a frame without its length. An empty one comes after
    the last part; another COPY for the same table may follow."""
    return bytes((COPY_TAG, table)) + part


_batch_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(FeedBatch)


def encode_batch(batch: FeedBatch) -> bytes:
    """The batch as the body of `POST /v1/feed`."""
    return _batch_encoder.encode(batch)


def decode_batch(body: bytes) -> FeedBatch:
    """The batch in a body. Raises msgspec.DecodeError (or its ValidationError) when it is none."""
    return _batch_decoder.decode(body)


_head_encoder = msgspec.msgpack.Encoder()
_head_decoder = msgspec.msgpack.Decoder(RebuildHead)

REBUILD_END = b"\0\0\0\0"
"""The empty frame with which a rebuild's body ends. A body without it was cut off, and changes nothing."""


def encode_head(head: RebuildHead) -> bytes:
    """A rebuild's first frame, without its length."""
    return _head_encoder.encode(head)


def decode_head(frame: bytes) -> RebuildHead:
    """The head in a rebuild's first frame. Raises msgspec.DecodeError (or its ValidationError) when it is none."""
    return _head_decoder.decode(frame)


def framed(frame: bytes) -> bytes:
    """A frame of a rebuild's body: its length in 4 bytes (big-endian) before it."""
    return len(frame).to_bytes(4, "big") + frame


def lsn_text(lsn: int) -> str:
    """A position as Postgres writes it: `lsn_text(0x116B3A8)` is `0/116B3A8`."""
    if not 0 <= lsn < 1 << 64:
        raise ValueError(f"{lsn} is no position in a log")
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """The position in `text` (`X/Y`, hexadecimal). Raises ValueError when it is none."""
    high, slash, low = text.partition("/")
    if not slash or not (1 <= len(high) <= 8 and 1 <= len(low) <= 8) or not (high + low).isalnum():
        raise ValueError(f"{text!r} is no position in a log (X/Y)")
    return (int(high, 16) << 32) | int(low, 16)
