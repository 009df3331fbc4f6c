"""The map that the shards' own tables make."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.ownership import NotOneMap, Owned, map_of
from oncepay.shardmap import SLOTS

cuts = st.lists(st.integers(1, SLOTS - 1), unique=True, max_size=12).map(sorted)
VERSIONS = st.integers(1, 2**40)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Owned]]:
    """Tables of up to four shards that have every slot once."""
    bounds = [0, *draw(cuts), SLOTS]
    made: dict[str, list[Owned]] = {f"s{n}": [] for n in range(4)}
    for first, end in itertools.pairwise(bounds):
        made[draw(st.sampled_from(sorted(made)))].append(Owned(first, end - 1, draw(VERSIONS)))
    return made


@given(tables(), VERSIONS)
def test_every_slot_is_where_its_shard_has_it_in_a_newer_version(made: dict[str, list[Owned]], known: int) -> None:
    found = map_of(made, known_version=known)
    for shard, table in made.items():
        for owned in table:
            assert found.range_of(owned.first).shard == found.range_of(owned.last).shard == shard
            assert found.version > max(known, owned.map_version)


@given(tables(), st.data())
def test_a_range_that_nobody_has_or_two_have_is_named(made: dict[str, list[Owned]], data: st.DataObject) -> None:
    holders = [shard for shard, table in made.items() if table]
    shard = data.draw(st.sampled_from(holders))
    owned = data.draw(st.sampled_from(made[shard]))
    if data.draw(st.booleans()):
        made[shard].remove(owned)
        with pytest.raises(NotOneMap, match="no shard's table"):
            map_of(made)
    else:
        made.setdefault("other", []).append(owned)
        with pytest.raises(NotOneMap, match="another shard too"):
            map_of(made)


def test_no_table_at_all_is_no_map() -> None:
    with pytest.raises(NotOneMap, match=f"0–{SLOTS - 1}"):
        map_of({})
