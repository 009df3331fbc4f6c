"""Fields as COPY takes them, against what Postgres makes of them; and literals of arrays."""

from __future__ import annotations

import datetime as dt
import io

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import copying
from aggregator.rows import number_array, optional_text_array, text_array
from oncepay.errors import MalformedBody
from tests.aggregator.test_apply import REAL

pytestmark = pytest.mark.cluster

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8) | st.integers(500, 520).map("x".__mul__)
INT8 = st.integers(-(1 << 63), (1 << 63) - 1)
ROW = st.tuples(
    TEXT, TEXT | st.none(), st.integers(-(1 << 31), (1 << 31) - 1), INT8, INT8 | st.none(), st.integers(0, (1 << 63) - 1),
    st.integers(0, 4_000_000_000_000_000), st.lists(TEXT, max_size=3), st.lists(INT8, max_size=3),
)  # fmt: skip
TABLE = """create temp table copied (
    z text, a text, b text, c integer, d bigint, e bigint, f pg_lsn, g timestamptz, h text[], i bigint[], j text, k boolean)
"""
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@settings(REAL, max_examples=15)
@given(rows=st.lists(ROW, min_size=1, max_size=5))
async def test_what_is_copied_is_what_was_meant(aggregator_dsn: str, rows: list[tuple[object, ...]]) -> None:
    a, b, c, d, e, f, g, h, i, *_ = map(list, zip(*rows, strict=True))
    columns = [
        copying.joined(copying.texts(a), copying.optional_texts(b)),
        copying.fixed(("int4", c), ("int8", d)),
        copying.optional_int8s(e),
        copying.fixed(("lsn", f), ("int8", copying.times(g))),
        copying.text_arrays(h),
        copying.int8_arrays(i),
        copying.joined(copying.words(a), copying.fixed(("boolean", [text == "" for text in a]))),
    ]
    body = copying.HEADER + copying.rows(12, columns, copying.text("first")) + copying.TRAILER
    owner = await asyncpg.connect(aggregator_dsn)
    try:
        await owner.execute(TABLE)
        await owner.copy_to_table("copied", source=io.BytesIO(body), format="binary")
        found = [tuple(row) for row in await owner.fetch("select * from copied")]
    finally:
        await owner.close()
    told = [("first", *row, row[0], row[0] == "") for row in rows]
    assert [(*row[:7], (row[7] - EPOCH) // dt.timedelta(microseconds=1), *row[8:]) for row in found] == told


@REAL
@given(texts=st.lists(TEXT | st.just("NULL")), numbers=st.lists(INT8 | st.none()))
async def test_literals_are_read_as_they_were(
    connection: asyncpg.Connection, texts: list[str], numbers: list[int | None]
) -> None:
    assert await connection.fetchval("select $1::text::text[]", text_array(texts)) == texts
    assert await connection.fetchval("select $1::text::bigint[]", number_array(numbers)) == numbers
    optional = [None, *texts]
    assert await connection.fetchval("select $1::text::text[]", optional_text_array(optional)) == optional


def test_a_text_that_no_database_can_hold_is_refused() -> None:
    with pytest.raises(MalformedBody):
        text_array(["a", "b\0c"])
