"""The lines of a payment's story."""

from __future__ import annotations

from typing import Any

from cli.history import rows


def version(number: int, lsn: str | None = "0/1") -> dict[str, Any]:
    return {"version": number, "status": "s", "event": "e", "actor": "a", "at": "t", "shard": "s0", "lsn": lsn}


def test_what_is_not_known_is_shown_as_a_gap() -> None:
    shown = rows([version(1), version(4, None), version(5)], 7)
    assert [row[0] for row in shown] == ["1", "2-3", "4", "5", "6-7"]
    assert shown[1][2] == "not known: the feed had lost its log"
    assert shown[2][4] == "s0 before a rebuild"
    assert shown[4][2] == "not there yet"


def test_a_whole_story_has_no_gap() -> None:
    assert [row[0] for row in rows([version(1), version(2)], 2)] == ["1", "2"]
    assert [row[0] for row in rows([], 1)] == ["1"]
