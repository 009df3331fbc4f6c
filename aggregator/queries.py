"""The named statements of a .sql file: each begins with a line `-- name: <name>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "sql"
_MARK = "-- name: "


def load(file: str) -> Mapping[str, str]:
    """The statements of `file` in the folder `sql`, by name."""
    found: dict[str, str] = {}
    for part in (FOLDER / file).read_text(encoding="utf-8").split(f"\n{_MARK}")[1:]:
        name, _, statement = part.partition("\n")
        if name in found:
            raise ValueError(f"{file} names two statements {name}")
        found[name] = statement.strip()
    return found
