"""What the campaign of moves makes of what it saw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.reshard.matrix import Cell, owner, table
from loadtest.reshard.traffic import quantile


def cell(step: str, victim: str, *, ok: bool = True, resumed: int = 0, errors: int = 0) -> Cell:
    return Cell(step, victim, ok, resumed, 30.0, 0.1, 300, {"no answer": errors} if errors else {}, 2.5)


def test_the_table_has_a_row_a_step_and_a_column_a_victim() -> None:
    lines = table([cell("copy", "operator", resumed=1), cell("copy", "router"), cell("drain", "operator", ok=False, errors=2)])
    assert lines[0] == "| killed at | operator | router |"
    assert lines[2] == "| `copy` | ok, resumed 1×, 2.5 s | ok, 2.5 s |"
    assert lines[3] == "| `drain` | WRONG, 2.5 s, 2 × no answer |  |"


def test_the_owner_is_read_from_the_status() -> None:
    status = {"shards": [{"name": "s0", "ranges": [[0, 9], [20, 29]]}, {"name": "s1", "ranges": [[10, 19], [30, 65_535]]}]}
    assert [owner(status, slot) for slot in (0, 9, 10, 25, 30)] == ["s0", "s0", "s1", "s0", "s1"]


@given(st.lists(st.floats(0, 1000), min_size=1), st.sampled_from((0.5, 0.99, 1.0)))
def test_a_quantile_is_one_of_the_values(values: list[float], part: float) -> None:
    found = quantile(values, part)
    assert found in values
    assert sum(value <= found for value in values) >= part * len(values)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_the_quantile_of_nothing(part: float) -> None:
    assert quantile([], part) == 0.0
