"""What the aggregator makes of values, without a database: columns, cursors, positions."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import cursor, positions, queries, rows
from aggregator.apply import refusal
from aggregator.cursor import Cursor
from oncepay.cart import Item
from oncepay.errors import InvalidField
from oncepay.feed import FeedBatch
from oncepay.payment_text import parse_terms
from tests.aggregator.strategies import FIRST_US, payment_row

ITEMS = [Item("ann", 1000)]


def test_each_payment_once_with_its_highest_version() -> None:
    (found,) = rows.by_payment(payment_row(v, "k", "created", v, ITEMS) for v in (2, 3, 1))
    assert [row.version for row in found] == [1, 2, 3]
    latest, life = rows.latest_of(found), rows.life_of(found)
    assert (latest.key, latest.version) == ("k", 3)
    assert (life.key, life.first_version, life.last_version) == ("k", 1, 3)


@pytest.mark.parametrize("versions", [(1, 2), (2, 1)])
def test_terms_come_from_whichever_row_has_them(versions: tuple[int, int]) -> None:
    made = [payment_row(v, "k", "created", v, ITEMS, terms=v == 1, failure="x" if v == 1 else "") for v in versions]
    latest = rows.latest_of(*rows.by_payment(made))
    assert latest.version == 2
    assert parse_terms(latest.terms or "").items == tuple(ITEMS)
    columns = rows.payment_columns([latest])
    assert (columns[11], columns[12]) == ("{130}", rows.text_array(['{"code":"x"}']))


def test_what_no_row_says_is_not_known() -> None:
    columns = rows.payment_columns([payment_row(1, "k", "created", 2, ITEMS, terms=False)])
    assert (columns[10], columns[11], columns[12]) == ("{null}", "{null}", rows.text_array([rows.FAILURE_NOT_KNOWN]))


def test_the_client_secret_is_not_taken() -> None:
    assert "hush" not in str(rows.payment_columns([payment_row(1, "k", "created", 1, ITEMS)]))


def test_times_are_exact_to_the_microsecond() -> None:
    assert rows.time_of(FIRST_US + 1) - rows.time_of(FIRST_US) == dt.timedelta(microseconds=1)


def test_empty_rows_make_empty_columns() -> None:
    assert rows.entry_columns([]) == ([],) * 13
    assert rows.number_array([]) == rows.text_array([]) == "{}"


@given(st.datetimes(timezones=st.just(dt.UTC)), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50))
def test_a_cursor_comes_back(created_at: dt.datetime, key: str) -> None:
    made = Cursor(created_at, key)
    assert cursor.decode(made.encode(), Cursor) == made


@given(st.text(max_size=40))
def test_no_other_text_is_a_cursor_or_breaks_it(text: str) -> None:
    try:
        decoded = cursor.decode(text, Cursor)
    except InvalidField:
        return
    assert decoded.created_at.tzinfo is not None


def test_positions_that_are_wanted() -> None:
    assert positions.parse("s0:0/10, s1:1/0,s0:0/9") == {"s0": 0x10, "s1": 1 << 32}
    assert positions.parse("") == {}
    assert positions.reached({"s0": 16, "s1": 5}, {"s0": 16})
    assert not positions.reached({"s0": 15}, {"s0": 16})
    assert not positions.reached({}, {"s0": 0}), "a shard never seen is before everything"


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (FeedBatch("s", "i", 2, 100, 200), ""),
        (FeedBatch("s", "i", 3, 100, 100), ""),
        (FeedBatch("s", "j", 9, 100, 200), "incarnation"),
        (FeedBatch("s", "i", 1, 100, 200), "epoch"),
        (FeedBatch("s", "i", 2, 99, 200), "gap"),
        (FeedBatch("s", "i", 2, 101, 200), "gap"),
    ],
)
def test_when_a_batch_is_refused(batch: FeedBatch, reason: str) -> None:
    assert refusal(batch, "i", 2, 100) == reason


def test_statements_are_found_by_name() -> None:
    assert set(queries.load("apply.sql")) >= {"lock_watermark", "insert_entries", "move_watermark"}
    assert all("-- name" not in statement for statement in queries.load("read.sql").values())
