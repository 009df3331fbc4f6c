"""Which shards a rebuild needs: what was given away before the giver's feed was applied, and where it is now."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.needed import Part, in_order
from oncepay.moves import Move, split
from oncepay.moves import given as give
from oncepay.shardmap import Range, ShardMap, even_map

HALVES = even_map(["s0", "s1"])
GAVE = "which {} gave away while its feed stood still"


def move(first: int, last: int, source: str, target: str, state: Any = "finished", **fields: Any) -> Move:
    return Move(**{"id": f"m{first}", "first": first, "last": last, "source": source, "target": target, "state": state} | fields)


def moved(current: ShardMap, first: int, last: int, to: str) -> ShardMap:
    return give(split(current, first, last), first, last, to, 1)


def shards(parts: list[Part]) -> list[str]:
    return [part.shard for part in parts]


TO_S1 = moved(HALVES, 0, 8_191, "s1")


@pytest.mark.parametrize("state", ["reversible", "finished", "fence", "drain", "switch"])
def test_what_was_given_away_before_the_feed_was_there_is_rebuilt_first(state: Any) -> None:
    why = f"it has slots 0-8191, {GAVE.format('s0')}"
    gave = move(0, 8_191, "s0", "s1", state, drain_lsn="0/100")
    assert in_order(["s0"], [gave], TO_S1, {"s0": 0xFF}) == [Part("s1", why), Part("s0")]
    assert in_order(["s1", "s0"], [gave], TO_S1, {"s0": 0xFF}) == [Part("s1", why), Part("s0")]
    assert in_order(["s0", "s1"], [gave], TO_S1, {"s0": 0xFF}) == [Part("s1", why), Part("s0")], "the owner first"
    assert in_order(["s1"], [gave], TO_S1, {"s0": 0xFF}) == [Part("s1")]


def test_a_feed_that_was_past_the_fence_needs_nothing_more() -> None:
    gave = move(0, 8_191, "s0", "s1", drain_lsn="0/100")
    assert in_order(["s0"], [gave], TO_S1, {"s0": 0x100, "s1": 1}) == [Part("s0")]


@pytest.mark.parametrize("positions", [{}, {"s1": 0x1_000}])
def test_what_is_not_known_was_not_applied(positions: dict[str, int]) -> None:
    assert shards(in_order(["s0"], [move(0, 8_191, "s0", "s1", drain_lsn="0/100")], TO_S1, positions)) == ["s1", "s0"]
    assert shards(in_order(["s0"], [move(0, 8_191, "s0", "s1")], TO_S1, {"s0": 0x1_000})) == ["s1", "s0"]


def test_a_rollback_is_given_by_its_target() -> None:
    back = move(0, 8_191, "s0", "s1", "rolled_back", back=True, drain_lsn="0/100")
    assert shards(in_order(["s1"], [back], HALVES, {})) == ["s0", "s1"]
    assert in_order(["s0"], [back], HALVES, {}) == [Part("s0")]
    under_way = move(0, 8_191, "s0", "s1", "verify", back=True, drain_lsn="0/100")
    assert shards(in_order(["s0"], [under_way], TO_S1, {"s0": 0xFF})) == ["s1", "s0"]
    assert shards(in_order(["s0"], [under_way], TO_S1, {"s0": 0x100})) == ["s0"]


@pytest.mark.parametrize("state", ["plan", "copy", "catch_up", "verify", "ready", "aborted"])
def test_what_was_never_handed_over_needs_nothing(state: Any) -> None:
    assert in_order(["s0"], [move(0, 8_191, "s0", "s1", state)], HALVES, {}) == [Part("s0")]


def test_the_present_owners_count_whoever_had_it_in_between() -> None:
    """From s0 by s1 to s2 and s3; what s0 has got back is its own."""
    ranges = (Range(0, 99, "s0"), Range(100, 199, "s2"), Range(200, 299, "s3"), Range(300, 65_535, "s1"))
    gave = move(0, 299, "s0", "s1", drain_lsn="0/100")
    onward = [move(100, 199, "s1", "s2", drain_lsn="0/1"), move(200, 299, "s1", "s3", drain_lsn="0/1")]
    parts = in_order(["s0"], [gave, *onward], ShardMap(9, ranges), {"s0": 1, "s1": 1})
    assert parts == [
        Part("s2", f"it has slots 100-199, {GAVE.format('s0')}"),
        Part("s3", f"it has slots 200-299, {GAVE.format('s0')}"),
        Part("s0"),
    ]


def test_what_is_rebuilt_for_another_one_has_given_away_too() -> None:
    """Each rebuild lets a feed go on behind what it had not brought. Two that gave each other something are both rebuilt."""
    current = even_map(["s1", "s0", "s2"])
    moves = [
        move(0, 9, "s0", "s1", drain_lsn="0/100"),
        move(21_845, 21_850, "s1", "s0", drain_lsn="0/100"),
        move(60_000, 60_009, "s1", "s2", drain_lsn="0/100"),
    ]
    assert shards(in_order(["s0"], moves, current, {})) == ["s2", "s1", "s0"]
    assert shards(in_order(["s0"], moves, current, {"s1": 0x100})) == ["s1", "s0"]


names = st.sampled_from(["s0", "s1", "s2", "s3"])


@given(
    st.lists(names, min_size=1, unique=True),
    st.lists(st.tuples(st.integers(0, 6), names, names), max_size=8),
    st.dictionaries(names, st.sampled_from([0, 0x100])),
)
def test_every_named_shard_comes_once_and_whatever_is_needed_with_it(
    named: list[str], gave: list[tuple[int, str, str]], positions: dict[str, int]
) -> None:
    current = even_map(["s0", "s1", "s2", "s3"])
    moves = [move(n * 10_000, n * 10_000 + 99, source, target, drain_lsn="0/100") for n, source, target in gave]
    found = shards(in_order(named, moves, current, positions))
    assert len(found) == len(set(found))
    assert set(named) <= set(found)
    for each in moves:
        if each.source in found and positions.get(each.source, 0) < 0x100:
            assert {current.range_of(each.first).shard, current.range_of(each.last).shard} <= set(found)
