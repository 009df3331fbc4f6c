"""Decoding of logical replication messages: plugin pgoutput, proto_version 1, with or without `binary`, with `messages`.

The formats are those of the PostgreSQL documentation, "Logical Replication Message Formats". A row is a dict by column
name, so that added or reordered columns change nothing for who reads it. A column that Postgres didn't send because its
toasted value is unchanged is absent from the dict; a null is None.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from oncepay.errors import OncepayError
from shard.worker.rows import Kind, Read, reader

Value = str | int | bool | bytes | None | list[str | None] | list[int | None]
Row = dict[str, Value]

EPOCH_US = 946_684_800_000_000
"""2000-01-01, Postgres' zero, in microseconds since 1970."""


class MalformedMessage(OncepayError):
    """A replication message can't be decoded."""

    slug = "malformed-replication-message"


class Begin(msgspec.Struct, frozen=True, gc=False):
    """A transaction starts; its commit record is at `commit_lsn`. `committed_at_us` since 1970."""

    commit_lsn: int
    committed_at_us: int
    xid: int


class Commit(msgspec.Struct, frozen=True, gc=False):
    """The transaction ended; `end_lsn` is the position after its commit record."""

    commit_lsn: int
    end_lsn: int
    committed_at_us: int


class Column(msgspec.Struct, frozen=True):
    """One column of a relation as the server described it."""

    name: str
    type_oid: int
    in_key: bool


class Relation(msgspec.Struct, frozen=True):
    """A table's description. It comes before the table's first change, and again after its definition changed."""

    oid: int
    name: str
    columns: tuple[Column, ...]


class Insert(msgspec.Struct, frozen=True):
    """A new row of `table` (schema-qualified)."""

    table: str
    row: Row


class Update(msgspec.Struct, frozen=True):
    """A row of `table` as it is now."""

    table: str
    row: Row


class Delete(msgspec.Struct, frozen=True):
    """A row of `table` is gone; `row` has the columns of its replica identity."""

    table: str
    row: Row


class Truncate(msgspec.Struct, frozen=True):
    """These tables were emptied."""

    tables: tuple[str, ...]


class Message(msgspec.Struct, frozen=True):
    """What `pg_logical_emit_message` wrote."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class Origin(msgspec.Struct, frozen=True):
    """The transaction came from another node."""

    lsn: int
    name: str


class Type(msgspec.Struct, frozen=True):
    """A data type that is not built in."""

    oid: int
    name: str


LogicalMessage = Begin | Commit | Relation | Insert | Update | Delete | Truncate | Message | Origin | Type

_I16 = struct.Struct(">h").unpack_from
_I32 = struct.Struct(">i").unpack_from
_I64 = struct.Struct(">q").unpack_from
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")
_COLUMN = struct.Struct(">Ii")
_ARRAY = struct.Struct(">iiI")
_DIMENSION = struct.Struct(">ii")

_BOOL, _BYTEA, _INT8, _INT4, _TEXT, _JSON, _INT2 = 16, 17, 20, 23, 25, 114, 21
_TEXT_ARRAY, _INT4_ARRAY, _VARCHAR_ARRAY, _INT8_ARRAY = 1009, 1007, 1015, 1016
_VARCHAR, _BPCHAR, _NAME, _JSONB, _TIMESTAMPTZ = 1043, 1042, 19, 3802, 1184


def _fixed(unpack_from: Callable[[bytes], tuple[int]], size: int) -> Callable[[bytes], int]:
    def decode(data: bytes) -> int:
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where {size} were expected")
        return unpack_from(data)[0]

    return decode


_int2, _int4, _int8 = _fixed(_I16, 2), _fixed(_I32, 4), _fixed(_I64, 8)


def _bool(data: bytes) -> bool:
    if len(data) != 1:
        raise ValueError(f"{len(data)} bytes where 1 was expected")
    return data != b"\0"


def _text(data: bytes) -> str:
    return data.decode()


def _jsonb(data: bytes) -> str:
    """The JSON text behind the format's version byte."""
    if data[:1] != b"\1":
        raise ValueError(f"jsonb of version {data[:1]!r}")
    return data[1:].decode()


def _timestamptz(data: bytes) -> int:
    """Microseconds since 1970 (UTC)."""
    return _int8(data) + EPOCH_US


def _array(data: bytes) -> list[object]:
    """An array of one dimension (or none) of text or integers; the element type stands in the value."""
    dimensions, _, element_oid = _ARRAY.unpack_from(data)
    if dimensions == 0:
        return []
    if dimensions != 1:
        raise ValueError(f"an array of {dimensions} dimensions")
    decode = _SCALARS[element_oid]
    count, _ = _DIMENSION.unpack_from(data, 12)
    offset, size = 20, len(data)
    if not 0 <= count <= (size - offset) // 4:
        raise ValueError(f"an array of {count} elements in {size} bytes")
    values: list[object] = []
    for _ in range(count):
        length = _I32(data, offset)[0]
        offset += 4
        if length == -1:
            values.append(None)
            continue
        end = offset + length
        if length < 0 or end > size:
            raise ValueError(f"an element of {length} bytes")
        values.append(decode(data[offset:end]))
        offset = end
    return values


_SCALARS: dict[int, Callable[[bytes], object]] = {
    _BOOL: _bool, _BYTEA: bytes, _INT2: _int2, _INT4: _int4, _INT8: _int8, _TIMESTAMPTZ: _timestamptz,
    _TEXT: _text, _VARCHAR: _text, _BPCHAR: _text, _NAME: _text, _JSON: _text, _JSONB: _jsonb,
}  # fmt: skip
_DECODERS = _SCALARS | dict.fromkeys((_TEXT_ARRAY, _VARCHAR_ARRAY, _INT4_ARRAY, _INT8_ARRAY), _array)

_TEXTUAL: dict[int, Callable[[bytes], object]] = {
    _BOOL: lambda data: data == b"t",
    **{oid: int for oid in (_INT2, _INT4, _INT8)},
    **{oid: _text for oid in (_TEXT, _VARCHAR, _BPCHAR, _NAME, _JSON, _JSONB)},
}
"""Values that came in text format, for the types where that needs no parser."""

_NULL, _UNCHANGED, _TEXT_FORMAT, _BINARY_FORMAT = b"nutb"
_VALUE_FORMATS = (_BINARY_FORMAT, _TEXT_FORMAT)


_IN_PLACE = {
    _INT2: (_I16, 2, 0), _INT4: (_I32, 4, 0), _INT8: (_I64, 8, 0), _TIMESTAMPTZ: (_I64, 8, EPOCH_US),
}  # fmt: skip
"""Binary numbers that are read where they stand: how, their size, and what is added. A fifth of a row's time in all."""


class _Table:
    """A relation, ready for decoding: for each column its name (None: not wanted) and its decoder."""

    __slots__ = ("columns", "name")

    def __init__(self, relation: Relation, wanted: Collection[str] | None) -> None:
        self.name = relation.name
        self.columns = [
            (
                c.name if wanted is None or c.name in wanted else None,
                c.type_oid,
                _DECODERS.get(c.type_oid, bytes),
                *_IN_PLACE.get(c.type_oid, (None, 0, 0)),
            )
            for c in relation.columns
        ]


_KINDS: dict[int, Kind] = {
    **{oid: Kind(decode=decode) for oid, decode in _DECODERS.items() if decode is not _text},
    _BOOL: Kind("?"), _INT2: Kind("h"), _INT4: Kind("i"), _INT8: Kind("q"), _TIMESTAMPTZ: Kind("q", EPOCH_US),
    **{oid: Kind() for oid, decode in _DECODERS.items() if decode is _text},
}  # fmt: skip
_OTHER = Kind(decode=bytes)


def reader_of(relation: Relation, wanted: Sequence[str], optional: Collection[str]) -> Read | None:
    """Code that reads the table's usual rows, as the decoder would; None when it hasn't all the columns."""
    columns = [(column.name, _KINDS.get(column.type_oid, _OTHER)) for column in relation.columns]
    return reader(columns, wanted, optional)


class Decoder:
    """Decodes the messages of one replication connection, which names each table before its first change.

    `wanted` limits the columns that are decoded, by table; a table that isn't in it is decoded whole. Values of types
    that aren't known here are left as bytes. MalformedMessage is the only error that `decode` raises.
    """

    def __init__(self, wanted: Mapping[str, Collection[str]] | None = None) -> None:
        self._wanted = wanted or {}
        self._tables: dict[int, _Table] = {}
        self._handlers: dict[int, Callable[[bytes], LogicalMessage]] = {
            ord("B"): _begin, ord("C"): _commit, ord("R"): self._relation, ord("I"): self._insert, ord("U"): self._update,
            ord("D"): self._delete, ord("T"): self._truncate, ord("M"): _message, ord("O"): _origin, ord("Y"): _type,
        }  # fmt: skip

    def decode(self, data: bytes) -> LogicalMessage:
        """One message. Its first byte says of what kind it is."""
        try:
            return self._handlers[data[0]](data)
        except MalformedMessage:
            raise
        except (struct.error, ValueError, LookupError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
            raise MalformedMessage(f"message {data[:1]!r} of {len(data)} bytes: {error!r}") from error

    def _relation(self, data: bytes) -> Relation:
        oid = _u32(data, 1)
        schema, offset = _string(data, 5)
        name, offset = _string(data, offset)
        count = _count(data, offset + 1)
        offset += 3
        columns = []
        for _ in range(count):
            in_key = data[offset] & 1 == 1
            column, offset = _string(data, offset + 1)
            type_oid, _ = _COLUMN.unpack_from(data, offset)
            offset += _COLUMN.size
            columns.append(Column(column, type_oid, in_key))
        relation = Relation(oid, f"{schema or 'pg_catalog'}.{name}", tuple(columns))
        self._tables[oid] = _Table(relation, self._wanted.get(relation.name))
        return relation

    def _insert(self, data: bytes) -> Insert:
        table = self._tables[_u32(data, 1)]
        _expect(data, 5, b"N")
        row, _ = _tuple(data, 6, table)
        return Insert(table.name, row)

    def _update(self, data: bytes) -> Update:
        table = self._tables[_u32(data, 1)]
        offset = 5
        if data[offset] in b"KO":
            _, offset = _tuple(data, offset + 1, table)
        _expect(data, offset, b"N")
        row, _ = _tuple(data, offset + 1, table)
        return Update(table.name, row)

    def _delete(self, data: bytes) -> Delete:
        table = self._tables[_u32(data, 1)]
        _expect(data, 5, b"KO")
        row, _ = _tuple(data, 6, table)
        return Delete(table.name, row)

    def _truncate(self, data: bytes) -> Truncate:
        count = _I32(data, 1)[0]
        if not 0 <= count <= (len(data) - 6) // 4:
            raise MalformedMessage(f"a truncate of {count} tables in {len(data)} bytes")
        oids = [_u32(data, 6 + 4 * n) for n in range(count)]
        return Truncate(tuple(self._tables[oid].name for oid in oids))


def _tuple(data: bytes, offset: int, table: _Table) -> tuple[Row, int]:
    """A row's values from `offset` on, and the offset after them."""
    columns = table.columns
    if _count(data, offset) != len(columns):
        raise MalformedMessage(f"{table.name} has {len(columns)} columns, a row has {_count(data, offset)}")
    offset += 2
    size = len(data)
    row: dict[str, object] = {}
    for name, type_oid, decode, unpack, width, added in columns:
        kind = data[offset]
        offset += 1
        if kind in _VALUE_FORMATS:
            start = offset + 4
            end = start + _I32(data, offset)[0]
            if not start <= end <= size:
                raise MalformedMessage(f"{table.name}.{name} ends at {end} of {size} bytes")
            offset = end
            if name is None:
                continue
            if kind == _TEXT_FORMAT:
                row[name] = _from_text(type_oid, data[start:end])
            elif decode is _text:
                row[name] = data[start:end].decode()
            elif unpack is not None and end - start == width:
                row[name] = unpack(data, start)[0] + added
            else:
                row[name] = decode(data[start:end])
        elif kind == _NULL:
            if name is not None:
                row[name] = None
        elif kind != _UNCHANGED:
            raise MalformedMessage(f"{table.name}.{name} has a value of kind {kind}")
    return row, offset  # type: ignore[return-value]  # the decoders make nothing but Value


def _begin(data: bytes) -> Begin:
    commit_lsn, at, xid = _BEGIN.unpack_from(data, 1)
    return Begin(commit_lsn, at + EPOCH_US, xid)


def _commit(data: bytes) -> Commit:
    _, commit_lsn, end_lsn, at = _COMMIT.unpack_from(data, 1)
    return Commit(commit_lsn, end_lsn, at + EPOCH_US)


def _message(data: bytes) -> Message:
    transactional = data[1] & 1 == 1
    lsn = _I64(data, 2)[0]
    prefix, offset = _string(data, 10)
    start = offset + 4
    end = start + _I32(data, offset)[0]
    if not start <= end <= len(data):
        raise MalformedMessage(f"a message's content ends at {end} of {len(data)} bytes")
    return Message(transactional, lsn, prefix, data[start:end])


def _origin(data: bytes) -> Origin:
    return Origin(_I64(data, 1)[0], _string(data, 9)[0])


def _type(data: bytes) -> Type:
    schema, offset = _string(data, 5)
    return Type(_u32(data, 1), f"{schema or 'pg_catalog'}.{_string(data, offset)[0]}")


def _from_text(type_oid: int, value: bytes) -> object:
    if type_oid in _DECODERS:
        return _TEXTUAL[type_oid](value)
    return value


def _u32(data: bytes, offset: int) -> int:
    return int(_I32(data, offset)[0]) & 0xFFFFFFFF


def _count(data: bytes, offset: int) -> int:
    count = _I16(data, offset)[0]
    if count < 0:
        raise MalformedMessage(f"a count of {count}")
    return int(count)


def _string(data: bytes, offset: int) -> tuple[str, int]:
    """The text that ends with a zero byte, and the offset after it."""
    end = data.index(b"\0", offset)
    return data[offset:end].decode(), end + 1


def _expect(data: bytes, offset: int, kinds: bytes) -> None:
    if data[offset] not in kinds:
        raise MalformedMessage(f"{data[offset]:#x} where one of {kinds!r} was expected")
