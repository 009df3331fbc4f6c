"""Reading a table's usual rows in one pass, by code that is made for the table when the server describes it.

A row is usual when its values came in binary format, and only texts and what is optional are null or not repeated. Runs of
columns of a known width are read by one call of `struct`, up to the length of the next text. The general decoder of
pgoutput.py takes three times as long; it is asked for every other row, and for the error where a row is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any

Read = Callable[[bytes], "tuple[Any, ...] | None"]
"""The wanted values of an insert or update, None where the row isn't usual. Raises UNUSUAL for some that are not."""

UNUSUAL = (struct.error, ValueError, IndexError, LookupError, OverflowError)
FIRST = 8
"""Where a row's first value is: behind the kind of message, the table, the kind of row and the number of columns."""

_LENGTH_BYTES = 4


class Kind:
    """How values of one type are read: `code` of struct for a fixed width, else by `decode` (None: as UTF-8)."""

    __slots__ = ("added", "code", "decode")

    def __init__(self, code: str = "", added: int = 0, decode: Callable[[bytes], object] | None = None) -> None:
        self.code = code
        self.added = added
        self.decode = decode


def reader(columns: Sequence[tuple[str, Kind]], wanted: Sequence[str], optional: Collection[str]) -> Read | None:
    """Code for rows of these columns, which gives the `wanted` values in their order; None when one isn't there at all.

    `optional` ones are None where they are null, where the log doesn't repeat them, and where the table hasn't got them.
    """
    numbers = {name: number for number, (name, _) in enumerate(columns)}
    if not set(wanted) - set(optional) <= numbers.keys():
        return None
    maker = _Maker(columns, frozenset(wanted), optional)
    return maker.made([f"v{numbers[name]}" if name in numbers else "None" for name in wanted])


class _Maker:
    """Writes the code. Names in it are numbers of columns: nothing that the server sent becomes code."""

    def __init__(self, columns: Sequence[tuple[str, Kind]], wanted: Collection[str], optional: Collection[str]) -> None:
        self._columns = columns
        self._wanted = wanted
        self._optional = optional
        self._lines: list[str] = []
        self._names: dict[str, object] = {}
        self._format = ""
        self._targets: list[str] = []
        self._checks: list[str] = []
        self._added: list[str] = []

    def made(self, values: Sequence[str]) -> Read:
        head = struct.pack(">h", len(self._columns))
        self._names["head"] = b"N" + head
        self._line(f"if d[5:{FIRST}] != head: return None")
        self._line(f"o = {FIRST}")
        self._line("size = len(d)")
        if self._columns and not self._is_fixed(*self._columns[-1]):
            self._line("d += pad")  # a null at the end is read together with what would be its length
            self._names["pad"] = bytes(_LENGTH_BYTES)
        for number, (name, kind) in enumerate(self._columns):
            if self._is_fixed(name, kind):
                self._fixed(number, name, kind)
            else:
                self._text(number, name, kind)
        self._run("")
        self._line("if o != size: return None")
        self._line(f"return ({''.join(f'{value}, ' for value in values)})")
        code = "def read(d):\n" + "\n".join(self._lines)
        exec(code, self._names)  # noqa: S102  (made here, of numbers alone)
        read: Read = self._names["read"]  # type: ignore[assignment]
        return read

    def _line(self, text: str, depth: int = 1) -> None:
        self._lines.append("    " * depth + text)

    def _is_fixed(self, name: str, kind: Kind) -> bool:
        """Whether the value must have its known width: an optional one may be null."""
        return bool(kind.code) and name not in self._optional

    def _fixed(self, number: int, name: str, kind: Kind) -> None:
        """A value of a known width: a part of the run."""
        width = struct.calcsize(">" + kind.code)
        self._format += "BI"
        self._targets += [f"k{number}", f"n{number}"]
        self._checks.append(f"k{number} != 98 or n{number} != {width}")
        if name in self._wanted:
            self._format += kind.code
            self._targets.append(f"v{number}")
            if kind.added:
                self._added.append(f"v{number} += {kind.added}")
        else:
            self._format += f"{width}x"

    def _run(self, behind: str, targets: Sequence[str] = ()) -> None:
        """Read the run that has gathered, with what stands behind it."""
        form = struct.Struct(f">{self._format}{behind}")
        if form.size:
            name = f"u{len(self._names)}"
            self._names[name] = form.unpack_from
            self._line(f"{', '.join([*self._targets, *targets])}, = {name}(d, o)")
            if self._checks:
                self._line(f"if {' or '.join(self._checks)}: return None")
            for added in self._added:
                self._line(added)
        self._size = form.size
        self._format, self._targets, self._checks, self._added = "", [], [], []
        if not behind:
            self._line(f"o += {form.size}")

    def _text(self, number: int, name: str, kind: Kind) -> None:
        """A value whose length stands before it, read with the run before. Its length is checked at the end of all."""
        self._run("BI", ("k", "n"))
        size = self._size
        self._line("if k == 98:")
        self._line(f"o += {size}", 2)
        self._line("e = o + n", 2)
        if name in self._wanted:
            self._line(f"v{number} = {self._decoding(number, kind)}", 2)
            if kind.code:
                self._line(f"if n != {struct.calcsize('>' + kind.code)}: return None", 2)
        self._line("o = e", 2)
        unchanged = name in self._optional or name not in self._wanted
        self._line("elif k == 110 or k == 117:" if unchanged else "elif k == 110:")
        self._line(f"o += {size - _LENGTH_BYTES}", 2)
        if name in self._wanted:
            self._line(f"v{number} = None", 2)
        self._line("else: return None")

    def _decoding(self, number: int, kind: Kind) -> str:
        if kind.code:
            self._names[f"f{number}"] = struct.Struct(f">{kind.code}").unpack_from
            return f"f{number}(d, o)[0]" + (f" + {kind.added}" if kind.added else "")
        if kind.decode is None:
            return "d[o:e].decode()"
        self._names[f"f{number}"] = kind.decode
        return f"f{number}(d[o:e])"
