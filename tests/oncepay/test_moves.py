"""The rules of moves that need no I/O: cutting the map, giving ranges, dealing out evenly, what may follow what."""

from __future__ import annotations

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st
from msgspec.structs import replace

from oncepay.moves import Goal, Move, State, even_moves, given, owned_runs, refusal, split
from oncepay.shardmap import SLOTS, Range, ShardMap

SHARDS = ("s0", "s1", "s2", "s3")


@st.composite
def maps(draw: st.DrawFn) -> ShardMap:
    cuts = sorted(draw(st.sets(st.integers(1, SLOTS - 1), max_size=12)))
    bounds = [0, *cuts, SLOTS]
    return ShardMap(
        draw(st.integers(1, 1000)),
        tuple(Range(bounds[n], bounds[n + 1] - 1, draw(st.sampled_from(SHARDS))) for n in range(len(bounds) - 1)),
    )


spans = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)).map(lambda pair: (min(pair), max(pair)))


def owners(current: ShardMap, slots: set[int]) -> dict[int, str]:
    return {slot: current.range_of(slot).shard for slot in slots}


@for_all(maps(), spans, st.sets(st.integers(0, SLOTS - 1), max_size=20))
def test_a_split_changes_no_owner_and_makes_whole_ranges(current: ShardMap, span: tuple[int, int], slots: set[int]) -> None:
    first, last = span
    cut = split(current, first, last)
    slots |= {first, last, max(0, first - 1), min(SLOTS - 1, last + 1)}
    assert owners(cut, slots) == owners(current, slots)
    assert cut.range_of(first).first == first
    assert cut.range_of(last).last == last
    assert cut.version == current.version + (cut is not current)
    assert split(cut, first, last) is cut


@for_all(maps(), spans, st.sampled_from(SHARDS), st.integers(0, 2000), st.sets(st.integers(0, SLOTS - 1), max_size=20))
def test_what_is_given_has_one_owner_and_nothing_else_changes(
    current: ShardMap, span: tuple[int, int], shard: str, version: int, slots: set[int]
) -> None:
    first, last = span
    cut = split(current, first, last)
    after = given(cut, first, last, shard, version)
    slots |= {first, last, max(0, first - 1), min(SLOTS - 1, last + 1)}
    expected = {slot: shard if first <= slot <= last else owner for slot, owner in owners(current, slots).items()}
    assert owners(after, slots) == expected
    assert given(after, first, last, shard, version) is after
    if after is not cut:
        assert after.version > cut.version
        assert after.version >= version


def test_only_whole_ranges_are_given() -> None:
    current = ShardMap(1, (Range(0, SLOTS - 1, "s0"),))
    with pytest.raises(ValueError, match="no whole ranges"):
        given(current, 10, 20, "s1", 2)


@for_all(maps())
def test_even_moves_deal_the_slots_out_evenly(current: ShardMap) -> None:
    moves = even_moves(current, SHARDS)
    for first, last, source, target in moves:
        assert {current.range_of(slot).shard for slot in (first, last)} == {source}
        assert target != source
        current = given(split(current, first, last), first, last, target, 1)
    sizes = [sum(last - first + 1 for first, last in owned_runs(current, shard)) for shard in SHARDS]
    assert max(sizes) - min(sizes) <= 1
    assert even_moves(current, SHARDS) == []


@for_all(maps())
def test_owned_runs_are_the_map(current: ShardMap) -> None:
    runs = sorted((first, last, shard) for shard in SHARDS for first, last in owned_runs(current, shard))
    assert sum(last - first + 1 for first, last, _ in runs) == SLOTS
    for first, last, shard in runs:
        assert {current.range_of(slot).shard for slot in (first, last)} == {shard}


@pytest.mark.parametrize(
    ("state", "goal", "allowed"),
    [
        ("plan", "ready", True),
        ("plan", "reversible", False),
        ("ready", "reversible", True),
        ("ready", "finished", False),
        ("ready", "aborted", True),
        ("drain", "aborted", True),
        ("reversible", "aborted", False),
        ("reversible", "finished", True),
        ("reversible", "rolled_back", True),
        ("finished", "rolled_back", False),
        ("aborted", "ready", False),
    ],
)
def test_what_may_follow_what(state: State, goal: Goal, allowed: bool) -> None:
    move = Move(id="m1", first=0, last=9, source="s0", target="s1", state=state)
    why = refusal(move, goal)
    assert (why == "") is allowed
    assert allowed or f"state {state}" in why


def test_a_rollback_under_way_is_not_aborted() -> None:
    move = Move(id="m1", first=0, last=9, source="s0", target="s1", state="drain", back=True)
    assert refusal(move, "aborted")
    assert refusal(move, "rolled_back") == ""
    assert (move.giver, move.taker) == ("s1", "s0")


@pytest.mark.parametrize("state", ["copy", "catch_up", "verify"])
def test_a_rollback_is_given_up_only_before_its_hand_over(state: State) -> None:
    move = Move(id="m1", first=0, last=9, source="s0", target="s1", state=state, back=True)
    assert refusal(move, "finished") == ""
    assert refusal(replace(move, back=False), "finished"), "the source has the range"
    assert refusal(replace(move, state="drain"), "finished"), "it may be nobody's"


@pytest.mark.parametrize("state", ["copy", "catch_up", "verify", "drain"])
def test_only_what_was_switched_is_rolled_back(state: State) -> None:
    assert refusal(Move(id="m1", first=0, last=9, source="s0", target="s1", state=state), "rolled_back")
