"""Columns in the binary format of Postgres' COPY: for many rows at once it takes a third of the time that asyncpg's encoders do,
above all for arrays.

A field is its length and its value as the type's binary output has it. Columns are parallel lists of fields; neighbors may be
one list, of what comes after one another in a row (`fixed`, `joined`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain, repeat
from typing import Literal, TypeVar

Fields = list[bytes]

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
NULL = b"\xff\xff\xff\xff"
TEXT_OID, INT8_OID = 25, 20
POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01 UTC in microseconds since 1970."""

_Element = TypeVar("_Element", str, int)
Fixed = Literal["int4", "int8", "lsn", "boolean"]
"""Types whose fields all have one size."""
_FIXED: dict[Fixed, tuple[str, int]] = {"int4": ("ii", 4), "int8": ("iq", 8), "lsn": ("iQ", 8), "boolean": ("i?", 1)}
_width = struct.Struct(">h").pack
_length = struct.Struct(">i").pack
_int8 = struct.Struct(">iq").pack
_array = struct.Struct(">iiiiii").pack
_EMPTY = {oid: struct.pack(">iiii", 12, 0, 0, oid) for oid in (TEXT_OID, INT8_OID)}
_LENGTHS = tuple(map(_length, range(512)))


def rows(width: int, columns: Sequence[Fields], first: bytes = b"") -> bytes:
    """The rows of `columns`, without header and trailer. Each has `width` fields, of which `first` is the same in all."""
    return b"".join(chain.from_iterable(zip(repeat(_width(width) + first, len(columns[0])), *columns, strict=True)))


def joined(*columns: Fields) -> Fields:
    """Columns that stand beside one another in more than one table, as one."""
    return list(map(b"".join, zip(*columns, strict=True)))


@cache
def packer(*types: Fixed) -> Callable[..., bytes]:
    """Makes the fields of neighbors of these types; it is given each value after its size. It raises struct.error for a value
    that the type hasn't."""
    return struct.Struct(">" + "".join(_FIXED[each][0] for each in types)).pack


def fixed(*columns: tuple[Fixed, Sequence[int]]) -> Fields:
    """Neighbors of one size each, in a third of the time that they take one by one. Raises struct.error as `packer` says."""
    if len({len(values) for _, values in columns}) > 1:
        raise ValueError("columns have the same number of rows")
    packed = chain.from_iterable((repeat(_FIXED[each][1]), values) for each, values in columns)
    return list(map(packer(*(each for each, _ in columns)), *packed))


def texts(values: Iterable[str]) -> Fields:
    """Texts, most of them different."""
    return [(_LENGTHS[len(each)] if len(each) < 512 else _length(len(each))) + each for each in map(str.encode, values)]


def words(values: Iterable[str]) -> Fields:
    """Texts that come more than once."""
    known: dict[str, bytes] = {}
    return [known.get(value) or known.setdefault(value, text(value)) for value in values]


def optional_texts(values: Iterable[str | None]) -> Fields:
    """Texts, or null."""
    return [NULL if value is None else text(value) for value in values]


def optional_int8s(values: Iterable[int | None]) -> Fields:
    """`bigint`, or null."""
    return [NULL if value is None else _int8(8, value) for value in values]


def times(values_us: Iterable[int]) -> list[int]:
    """`timestamptz` of microseconds since 1970, as `fixed` takes it for `int8`."""
    return [value - POSTGRES_EPOCH_US for value in values_us]


def text_arrays(values: Sequence[Sequence[str]]) -> Fields:
    """`text[]`, whose elements come often."""
    elements = set(chain.from_iterable(values))
    return _arrays(TEXT_OID, values, dict(zip(elements, texts(elements), strict=True)))


def optional_text_arrays(values: Sequence[Sequence[str] | None]) -> Fields:
    """`text[]`, or null."""
    made = iter(text_arrays([value for value in values if value is not None]))
    return [NULL if value is None else next(made) for value in values]


def int8_arrays(values: Sequence[Sequence[int]]) -> Fields:
    """`bigint[]`, whose elements come often. Raises struct.error for what is none."""
    elements = set(chain.from_iterable(values))
    return _arrays(INT8_OID, values, {value: _int8(8, value) for value in elements})


def text(value: str) -> bytes:
    """One text."""
    encoded = value.encode()
    return _length(len(encoded)) + encoded


def _arrays(oid: int, values: Sequence[Sequence[_Element]], known: dict[_Element, bytes]) -> Fields:
    """Arrays of one dimension without nulls, from 1 on; `known` has each element as a field."""
    get, empty = known.__getitem__, _EMPTY[oid]
    elements = [b"".join(map(get, each)) for each in values]
    return [
        _array(20 + len(fields), 1, 0, oid, len(each), 1) + fields if each else empty
        for each, fields in zip(values, elements, strict=True)
    ]
