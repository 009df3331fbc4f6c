"""The decoder: every kind of message, changed tables, and whatever bytes may come."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard.worker.pgoutput import (
    EPOCH_US,
    Begin,
    Column,
    Commit,
    Decoder,
    Delete,
    Insert,
    MalformedMessage,
    Message,
    Origin,
    Relation,
    Row,
    Truncate,
    Type,
    Update,
    reader_of,
)
from shard.worker.rows import UNUSUAL
from shard.worker.transactions import Assembler

BOOL, BYTEA, INT8, INT4, TEXT, JSONB, TIMESTAMPTZ, TEXT_ARRAY, INT8_ARRAY, UUID = (
    *(16, 17, 20, 23, 25, 3802, 1184, 1009, 1016),
    2950,
)
UNCHANGED = object()


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def relation(oid: int, name: str, columns: list[tuple[str, int]]) -> bytes:
    head = b"R" + struct.pack(">I", oid) + text("oncepay") + text(name) + b"d" + struct.pack(">h", len(columns))
    return head + b"".join(b"\1" + text(column) + struct.pack(">Ii", type_oid, -1) for column, type_oid in columns)


def value(data: object) -> bytes:
    if data is None:
        return b"n"
    if data is UNCHANGED:
        return b"u"
    assert isinstance(data, bytes)
    return b"b" + struct.pack(">i", len(data)) + data


def tuple_of(*values: object) -> bytes:
    return struct.pack(">h", len(values)) + b"".join(map(value, values))


def insert(oid: int, *values: object) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + tuple_of(*values)


def array(element_oid: int, *elements: bytes | None) -> bytes:
    if not elements:
        return struct.pack(">iiI", 0, 0, element_oid)
    body = b"".join(struct.pack(">i", -1) if e is None else struct.pack(">i", len(e)) + e for e in elements)
    return struct.pack(">iiIii", 1, 0, element_oid, len(elements), 1) + body


def begin(lsn: int, at_us: int = EPOCH_US) -> bytes:
    return b"B" + struct.pack(">QqI", lsn, at_us - EPOCH_US, 7)


def commit(lsn: int, end_lsn: int, at_us: int = EPOCH_US) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, lsn, end_lsn, at_us - EPOCH_US)


def message(content: bytes, prefix: str = "oncepay", *, transactional: bool = True) -> bytes:
    return b"M" + struct.pack(">BQ", transactional, 99) + text(prefix) + struct.pack(">i", len(content)) + content


def test_every_kind_of_value() -> None:
    decoder = Decoder()
    columns = [
        *(("yes", BOOL), ("raw", BYTEA), ("big", INT8), ("small", INT4), ("words", TEXT), ("json", JSONB)),
        *(("at", TIMESTAMPTZ), ("names", TEXT_ARRAY), ("sums", INT8_ARRAY), ("other", UUID), ("none", TEXT)),
    ]
    decoder.decode(relation(5, "things", columns))
    decoded = decoder.decode(
        insert(
            5, b"\1", b"\0\xff", struct.pack(">q", -(2**62)), struct.pack(">i", -5), "å".encode(), b'\1{"a": 1}',
            struct.pack(">q", 1_000_000), array(TEXT, b"x", None, b""), array(INT8, struct.pack(">q", -7)), b"?" * 16, None,
        )
    )  # fmt: skip
    sums: list[int | None] = [-7]
    expected: Row = {
        "yes": True, "raw": b"\0\xff", "big": -(2**62), "small": -5, "words": "å", "json": '{"a": 1}',
        "at": EPOCH_US + 1_000_000, "names": ["x", None, ""], "sums": sums, "other": b"?" * 16, "none": None,
    }  # fmt: skip
    assert decoded == Insert("oncepay.things", expected)


def test_text_format_where_a_type_needs_no_parser() -> None:
    decoder = Decoder()
    decoder.decode(relation(5, "things", [("a", INT8), ("b", BOOL), ("c", TEXT), ("d", JSONB), ("e", TIMESTAMPTZ)]))
    cells = [b"t" + struct.pack(">i", len(data)) + data for data in (b"-12", b"t", b"x", b"{}")]
    row = b"I" + struct.pack(">I", 5) + b"N" + struct.pack(">h", 5)
    assert decoder.decode(row + b"".join(cells) + b"n") == Insert(
        "oncepay.things", {"a": -12, "b": True, "c": "x", "d": "{}", "e": None}
    )
    with pytest.raises(MalformedMessage):
        decoder.decode(row + b"".join(cells) + b"t" + struct.pack(">i", 3) + b"now")


def test_the_other_messages() -> None:
    decoder = Decoder()
    assert decoder.decode(begin(10, EPOCH_US + 5)) == Begin(10, EPOCH_US + 5, 7)
    assert decoder.decode(commit(10, 20, EPOCH_US + 5)) == Commit(10, 20, EPOCH_US + 5)
    assert decoder.decode(message(b"nonce")) == Message(True, 99, "oncepay", b"nonce")
    assert decoder.decode(message(b"", "x", transactional=False)) == Message(False, 99, "x", b"")
    assert decoder.decode(b"O" + struct.pack(">Q", 3) + text("node")) == Origin(3, "node")
    assert decoder.decode(b"Y" + struct.pack(">I", 3) + text("") + text("int4")) == Type(3, "pg_catalog.int4")
    described = decoder.decode(relation(5, "things", [("a", INT4)]))
    assert described == Relation(5, "oncepay.things", (Column("a", INT4, True),))
    assert decoder.decode(b"D" + struct.pack(">I", 5) + b"K" + tuple_of(struct.pack(">i", 1))) == Delete(
        "oncepay.things", {"a": 1}
    )
    assert decoder.decode(b"T" + struct.pack(">iBI", 1, 0, 5)) == Truncate(("oncepay.things",))


def test_an_update_with_and_without_the_old_row() -> None:
    decoder = Decoder()
    decoder.decode(relation(5, "things", [("a", INT4), ("b", TEXT)]))
    one, two = struct.pack(">i", 1), struct.pack(">i", 2)
    head = b"U" + struct.pack(">I", 5)
    new = b"N" + tuple_of(two, b"new")
    assert decoder.decode(head + new) == Update("oncepay.things", {"a": 2, "b": "new"})
    assert decoder.decode(head + b"K" + tuple_of(one, None) + new) == Update("oncepay.things", {"a": 2, "b": "new"})
    assert decoder.decode(head + b"O" + tuple_of(one, b"old") + new) == Update("oncepay.things", {"a": 2, "b": "new"})


def test_an_unchanged_large_value_is_absent() -> None:
    decoder = Decoder()
    decoder.decode(relation(5, "things", [("a", INT4), ("b", TEXT)]))
    update = b"U" + struct.pack(">I", 5) + b"N" + tuple_of(struct.pack(">i", 1), UNCHANGED)
    assert decoder.decode(update) == Update("oncepay.things", {"a": 1})


def test_columns_may_come_go_and_change_places() -> None:
    decoder = Decoder()
    one = struct.pack(">i", 1)
    decoder.decode(relation(5, "things", [("a", INT4), ("b", TEXT)]))
    assert decoder.decode(insert(5, one, b"x")) == Insert("oncepay.things", {"a": 1, "b": "x"})
    decoder.decode(relation(5, "things", [("new", TEXT), ("b", TEXT), ("a", INT4)]))
    assert decoder.decode(insert(5, b"?", b"x", one)) == Insert("oncepay.things", {"new": "?", "b": "x", "a": 1})


def test_only_wanted_columns_are_decoded() -> None:
    decoder = Decoder({"oncepay.things": {"b"}})
    decoder.decode(relation(5, "things", [("a", JSONB), ("b", TEXT), ("c", INT4)]))
    assert decoder.decode(insert(5, b"not json's version", b"x", None)) == Insert("oncepay.things", {"b": "x"})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"?",
        b"B",
        b"B" + bytes(19),
        insert(6, b"x"),
        b"I" + struct.pack(">I", 5) + b"X" + tuple_of(b"x"),
        insert(5, b"x", b"y"),
        insert(5),
        b"I" + struct.pack(">I", 5) + b"N" + struct.pack(">h", -1),
        b"I" + struct.pack(">I", 5) + b"N" + struct.pack(">h", 1) + b"b" + struct.pack(">i", 99) + b"x",
        b"I" + struct.pack(">I", 5) + b"N" + struct.pack(">h", 1) + b"b" + struct.pack(">i", -2),
        b"I" + struct.pack(">I", 5) + b"N" + struct.pack(">h", 1) + b"z",
        insert(5, b"\xff\xfe"),
        b"M" + struct.pack(">BQ", 1, 1) + text("p") + struct.pack(">i", 2**31 - 1),
        b"M" + struct.pack(">BQ", 1, 1) + b"never ends",
        b"T" + struct.pack(">iB", 2**31 - 1, 0),
        b"R" + struct.pack(">I", 9) + text("s") + text("t") + b"d" + struct.pack(">h", 2) + b"\1" + text("a"),
    ],
)
def test_malformed(data: bytes) -> None:
    decoder = Decoder()
    decoder.decode(relation(5, "things", [("a", TEXT)]))
    with pytest.raises(MalformedMessage):
        decoder.decode(data)


@pytest.mark.parametrize(
    ("type_oid", "data"),
    [
        (INT4, b"123"),
        (INT8, b""),
        (BOOL, b"\1\1"),
        (JSONB, b'\2{"a": 1}'),
        (JSONB, b""),
        (TEXT_ARRAY, array(TEXT, b"x")[:-1]),
        (TEXT_ARRAY, array(TEXT_ARRAY, array(TEXT, b"x"))),
        (TEXT_ARRAY, struct.pack(">iiI", 2, 0, TEXT) + bytes(16)),
        (INT8_ARRAY, struct.pack(">iiIii", 1, 0, INT8, 2**31 - 1, 1)),
        (INT8_ARRAY, struct.pack(">iiIii", 1, 0, INT8, -1, 1)),
        (INT8_ARRAY, array(999, b"x")),
    ],
)
def test_malformed_values(type_oid: int, data: bytes) -> None:
    decoder = Decoder()
    decoder.decode(relation(5, "things", [("a", type_oid)]))
    with pytest.raises(MalformedMessage):
        decoder.decode(insert(5, data))


VALUES: dict[int, st.SearchStrategy[tuple[bytes, object]]] = {
    INT8: st.integers(-(2**63), 2**63 - 1).map(lambda n: (struct.pack(">q", n), n)),
    INT4: st.integers(-(2**31), 2**31 - 1).map(lambda n: (struct.pack(">i", n), n)),
    TEXT: st.text().map(lambda s: (s.encode(), s)),
    JSONB: st.text().map(lambda s: (b"\1" + s.encode(), s)),
    BOOL: st.booleans().map(lambda b: (bytes([b]), b)),
    BYTEA: st.binary().map(lambda b: (b, b)),
    INT8_ARRAY: st.lists(st.integers(-(2**63), 2**63 - 1)).map(lambda ns: (array(INT8, *(struct.pack(">q", n) for n in ns)), ns)),
    TEXT_ARRAY: st.lists(st.none() | st.text()).map(
        lambda items: (array(TEXT, *(None if s is None else s.encode() for s in items)), items)
    ),
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[object], Row]:
    """A table's columns, a row's cells as sent, and the row that they mean."""
    types = draw(st.lists(st.sampled_from(list(VALUES)), max_size=8))
    columns = [(f"c{n}", type_oid) for n, type_oid in enumerate(types)]
    cells: list[object] = []
    row: Row = {}
    for name, type_oid in columns:
        kind = draw(st.sampled_from(["value", "value", "null", "unchanged"]))
        if kind == "value":
            data, meant = draw(VALUES[type_oid])
            cells.append(data)
            row[name] = meant  # type: ignore[assignment]
        else:
            cells.append(None if kind == "null" else UNCHANGED)
            if kind == "null":
                row[name] = None
    return columns, cells, row


@given(rows())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_rows_come_back_as_they_were(case: tuple[list[tuple[str, int]], list[object], Row]) -> None:
    columns, cells, row = case
    decoder = Decoder()
    decoder.decode(relation(5, "things", columns))
    assert decoder.decode(insert(5, *cells)) == Insert("oncepay.things", row)


@given(rows(), st.data())
@settings(max_examples=300)
def test_damaged_messages_raise_only_the_named_error(
    case: tuple[list[tuple[str, int]], list[object], Row], data: st.DataObject
) -> None:
    columns, cells, _ = case
    decoder = Decoder()
    whole = [relation(5, "things", columns), insert(5, *cells), begin(1), commit(1, 2), message(b"nonce")]
    damaged = bytearray(data.draw(st.sampled_from(whole)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    decoder.decode(whole[0])
    for sent in (bytes(damaged), bytes(damaged[:cut])):
        try:
            decoder.decode(sent)
        except MalformedMessage:
            pass


def as_read(data: bytes, columns: list[tuple[str, int]], wanted: list[str], optional: set[str]) -> tuple[object, ...] | None:
    """The wanted values by the code that is made for the table; None where it leaves the row to the decoder."""
    described = Decoder().decode(relation(5, "things", columns))
    assert isinstance(described, Relation)
    read = reader_of(described, wanted, optional)
    assert read is not None
    try:
        return read(data)
    except UNUSUAL:
        return None


def as_decoded(data: bytes, columns: list[tuple[str, int]], wanted: list[str], optional: set[str]) -> tuple[object, ...] | None:
    """The same by the decoder; None where it refuses the row, or lacks a value that isn't optional."""
    decoder = Decoder({"oncepay.things": wanted})
    decoder.decode(relation(5, "things", columns))
    try:
        message = decoder.decode(data)
        assert isinstance(message, Insert | Update)
        return tuple(message.row.get(name) if name in optional else message.row[name] for name in wanted)
    except (MalformedMessage, KeyError):
        return None


@given(rows(), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_rows_read_in_one_pass_are_what_the_decoder_makes_of_them(
    case: tuple[list[tuple[str, int]], list[object], Row], data: st.DataObject
) -> None:
    columns, cells, _ = case
    names = [name for name, _ in columns]
    wanted = data.draw(st.permutations(names).map(lambda order: order[: data.draw(st.integers(0, len(order)))]))
    optional = set(data.draw(st.lists(st.sampled_from(names)))) if names else set()
    sent = insert(5, *cells)
    read = as_read(sent, columns, wanted, optional)
    if all(isinstance(cell, bytes) for cell in cells):
        assert read == as_decoded(sent, columns, wanted, optional)
        assert read is not None
    damaged = bytearray(sent)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(5, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for data_sent in (sent, bytes(damaged), bytes(damaged[: data.draw(st.integers(0, len(damaged)))])):
        read = as_read(data_sent, columns, wanted, optional)
        assert read is None or read == as_decoded(data_sent, columns, wanted, optional)


def test_texts_that_are_null_or_not_repeated_are_read_in_one_pass_too() -> None:
    columns = [("a", INT4), ("b", TEXT), ("c", JSONB), ("d", TEXT), ("e", TEXT), ("f", BOOL)]
    names = [name for name, _ in columns]
    sent = insert(5, struct.pack(">i", 7), None, UNCHANGED, "å".encode(), None, b"\1")
    assert as_read(sent, columns, names, {"c"}) == (7, None, None, "å", None, True)
    assert as_read(sent, columns, names, set()) is None, "c is needed: the decoder finds that it isn't there"
    assert as_read(sent, columns, ["f", "d"], set()) == (True, "å")


def test_an_optional_number_may_be_null_or_not_be_there_at_all() -> None:
    columns = [("a", TEXT), ("b", INT8), ("c", TIMESTAMPTZ)]
    five = struct.pack(">q", 5)
    assert as_read(insert(5, b"x", five, five), columns, ["c", "a", "b"], {"b", "c"}) == (EPOCH_US + 5, "x", 5)
    assert as_read(insert(5, b"x", None, None), columns, ["c", "a", "b"], {"b", "c"}) == (None, "x", None)
    assert as_read(insert(5, b"x", None, five), columns, ["c", "a", "b"], {"c"}) is None
    assert as_read(insert(5, b"x", five, b"short"), columns, ["c", "a", "b"], {"b", "c"}) is None
    assert as_read(insert(5, b"x", five, five), columns, ["new", "a"], {"new"}) == (None, "x")


def test_a_table_without_a_wanted_column_has_no_code() -> None:
    described = Decoder().decode(relation(5, "things", [("a", INT4)]))
    assert isinstance(described, Relation)
    assert reader_of(described, ("a", "b"), ()) is None


@given(st.binary())
def test_any_bytes_raise_only_the_named_error(data: bytes) -> None:
    try:
        Decoder().decode(data)
    except MalformedMessage:
        pass


def test_a_transaction_has_its_messages_and_its_end() -> None:
    assembler = Assembler()
    parts = [begin(10, EPOCH_US + 2_000), message(b"n1"), message(b"other", "else"), message(b"loose", transactional=False)]
    assert [assembler.feed(part) for part in parts] == [None] * 4
    transaction = assembler.feed(commit(10, 20, EPOCH_US + 2_000))
    assert transaction is not None
    assert (transaction.end_lsn, transaction.committed_at_ms, transaction.nonces) == (20, EPOCH_US // 1000 + 2, ["n1"])
    assert transaction.rows == 0


@pytest.mark.parametrize("parts", [[commit(1, 2)], [begin(1), begin(2)], [begin(1), commit(2, 3)]])
def test_transactions_out_of_order_are_refused(parts: list[bytes]) -> None:
    assembler = Assembler()
    for part in parts[:-1]:
        assembler.feed(part)
    with pytest.raises(MalformedMessage):
        assembler.feed(parts[-1])


def test_a_change_outside_of_a_transaction_or_without_its_columns_is_refused() -> None:
    assembler = Assembler()
    assembler.feed(relation(5, "balance_links", [("slot", INT4), ("key", TEXT)]))
    with pytest.raises(MalformedMessage, match="outside"):
        assembler.feed(insert(5, struct.pack(">i", 1), b"k"))
    assembler.feed(begin(1))
    with pytest.raises(MalformedMessage, match="entry_id"):
        assembler.feed(insert(5, struct.pack(">i", 1), b"k"))
