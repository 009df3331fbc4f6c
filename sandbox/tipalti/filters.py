"""The `filter` parameter of lists: `refCode=="x"`, `status=in=("Paid","Cleared")`, joined by `;` or ` and `."""

from __future__ import annotations

import re

from sandbox.tipalti.errors import invalid

CLAUSES_MAX = 10
VALUES_MAX = 250
_CLAUSE = re.compile(
    r"""\s*(?P<field>[A-Za-z]+)\s*(?:==\s*(?P<one>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s;,()"']+)"""
    r"""|=in=\s*\((?P<many>[^)]*)\))\s*(?:;|\band\b|$)""",
    re.IGNORECASE,
)
_VALUE = re.compile(r""""((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^\s,]+)""")


def _values(text: str) -> list[str]:
    found = []
    for double, single, bare in _VALUE.findall(text):
        found.append(re.sub(r"\\(.)", r"\1", double or single or bare))
    return found


def parse(text: str, fields: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Columns and the values that each may have. `fields` maps the names of a filter to columns. 400 when unreadable."""
    clauses: list[tuple[str, list[str]]] = []
    place = 0
    while place < len(text):
        match = _CLAUSE.match(text, place)
        if match is None or len(clauses) == CLAUSES_MAX:
            raise invalid(f"The filter can't be read from here on: {text[place : place + 40]}")
        column = fields.get(match["field"])
        if column is None:
            raise invalid(f"There is no filter by {match['field']}; known are {', '.join(sorted(fields))}.")
        values = _values(match["one"] if match["one"] is not None else match["many"])
        if not 1 <= len(values) <= VALUES_MAX:
            raise invalid(f"A filter has from 1 to {VALUES_MAX} values.")
        clauses.append((column, values))
        place = match.end()
    return clauses
