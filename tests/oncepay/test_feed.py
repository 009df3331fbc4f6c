"""Batches on the wire, and positions as text."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.feed import EntryRow, FeedBatch, LinkRow, PaymentRow, decode_batch, encode_batch, lsn_text, parse_lsn

PAYMENT = PaymentRow(9, 1, 5, "k", "created", 1, "b", "usd", 10, 0, 0, None, "{}", None, 1, 2, 3)
ENTRY = EntryRow(9, 1, 5, "k", "e", "payment", "usd", "ch", ("a", "b"), (1, -1), ("", "x"), 7)
LINK = LinkRow(9, 1, 5, "k", "e", "txn", 7)


def test_a_batch_comes_back_as_it_was() -> None:
    batch = FeedBatch("s0", "i", 1, 8, 9, (PAYMENT,), (ENTRY,), (LINK,))
    assert decode_batch(encode_batch(batch)) == batch
    assert batch.rows == 3


def test_a_batch_of_a_newer_worker_with_more_members_is_read() -> None:
    newer = [*msgspec.msgpack.decode(encode_batch(FeedBatch("s0", "i", 1, 8, 9))), "new"]
    assert decode_batch(msgspec.msgpack.encode(newer)) == FeedBatch("s0", "i", 1, 8, 9)


@pytest.mark.parametrize("body", [b"", b"\x90", msgspec.msgpack.encode(["s0", "i", "1", 8, 9])])
def test_what_is_no_batch(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_batch(body)


@given(st.integers(0, (1 << 64) - 1))
def test_positions_as_text(lsn: int) -> None:
    assert parse_lsn(lsn_text(lsn)) == lsn


def test_positions_as_postgres_writes_them() -> None:
    assert lsn_text(0x16B3A8) == "0/16B3A8"
    assert parse_lsn("1F/000000a0") == (0x1F << 32) | 0xA0


@pytest.mark.parametrize("text", ["", "0", "/", "0/", "/1", "0/1/2", "0/G", "0/ 1", "-1/0", "0/123456789", "0_1/2"])
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(ValueError, match=r"position|invalid literal"):
        parse_lsn(text)
