"""The reserve: each index leaves it once, whatever is asked for in what order."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from keygen.reserve import Reserve
from keygen.turns import TURNS
from oncepay.keys import SLOTS, MacSecrets, issue, slot

SECRETS = MacSecrets(3, {3: b"m" * 32})
HALF = (10_000, 10_000 + SLOTS // 2)
BINS = 256
SPREAD_KEYS = 1 << 20
CHI_SQUARED_MOST = 335.0
"""With 255 degrees of freedom one evenly spread set in some 2,000 lies above (mean 255, standard deviation 22.6)."""

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40)),
        st.tuples(st.just("take"), st.integers(1, 60)),
        st.tuples(st.just("ready"), st.integers(-5, 60)),
        st.tuples(st.just("wait"), st.integers(0, 60)),
        st.tuples(st.just("search"), st.integers(1, 30)),
        st.tuples(st.just("give back"), st.integers(1, 30)),
    ),
    max_size=40,
)


@given(steps)
def test_every_key_once_and_nothing_else(actions: list[tuple[str, int]]) -> None:
    reserve = Reserve()
    expected: list[str] = []
    taken: list[str] = []
    for number, (action, count) in enumerate(actions):
        if action == "add":
            seed = number.to_bytes(32, "big")
            first = 7 * number
            reserve.add(seed, first, first + count)
            expected += issue(seed, first, count, 3, SECRETS.secrets[3])
        elif action == "ready":
            before = reserve.available
            reserve.make_ready(count, SECRETS)
            assert reserve.available == before
        elif action == "wait":
            before = reserve.available
            reserve.make_wait(count, SECRETS)
            assert reserve.available == before
        elif action in ("search", "give back"):
            found = reserve.take_aside(*HALF, count)
            found += reserve.search(*HALF, max(count - len(found), 1), 2 * count, SECRETS)
            assert all(HALF[0] <= slot(key) <= HALF[1] for key in found)
            if action == "search":
                taken += found
            else:
                reserve.put_aside(found)
        elif count <= reserve.available:
            keys = reserve.take(count, SECRETS)
            assert len(keys) == count
            taken += keys
        assert reserve.available == len(expected) - len(taken)
        assert reserve.ready + reserve.aside + reserve.waiting + reserve.left == reserve.available
    if reserve.available:
        taken += reserve.take(reserve.available, SECRETS)
    assert sorted(taken) == sorted(expected)
    assert len(set(taken)) == len(taken)


def test_a_new_secret_is_used_for_what_is_made_from_then_on() -> None:
    reserve = Reserve()
    reserve.add(b"s" * 32, 0, 10)
    reserve.make_ready(4, SECRETS)
    later = MacSecrets(4, {3: b"m" * 32, 4: b"n" * 32})
    assert sorted(reserve.take(10, later)) == sorted(
        issue(b"s" * 32, 0, 4, 3, SECRETS.secrets[3]) + issue(b"s" * 32, 4, 6, 4, later.secrets[4])
    )


def test_keys_that_wait_leave_turn_by_turn() -> None:
    """All sixteen turns come, one after the other, and each is as long as the keys that wait allow."""
    reserve = Reserve()
    reserve.add(b"turn" * 8, 0, 1 << 20)
    reserve.make_wait(80_000, SECRETS)
    seen: list[int] = []
    for _ in range(400):
        keys = reserve.take(500, SECRETS)
        seen += [slot(key) % TURNS for key in keys]
        reserve.make_wait(500, SECRETS)
    changes = sum(before != after for before, after in pairwise(seen))
    assert set(seen) == set(range(TURNS))
    assert changes < 2 * len(seen) / (80_000 / (TURNS / 2)), "200,000 keys at random would have 187,500"
    assert reserve.waiting == 80_000


def test_the_keys_of_a_turn_are_spread_evenly_over_all_ranges() -> None:
    """No shard has more of the new payments than its range is wide."""
    reserve = Reserve()
    reserve.add(b"wide" * 8, 0, SPREAD_KEYS)
    reserve.make_wait(SPREAD_KEYS, SECRETS)
    keys = reserve.take(60_000, SECRETS)
    assert len({slot(key) % TURNS for key in keys}) == 1
    bins = Counter(slot(key) * BINS // SLOTS for key in keys)
    assert chi_squared([bins[number] for number in range(BINS)]) < CHI_SQUARED_MOST


def test_what_is_given_up_is_gone() -> None:
    reserve = Reserve()
    reserve.add(b"gone" * 8, 0, 100)
    reserve.make_wait(60, SECRETS)
    reserve.give_up_waiting()
    assert (reserve.waiting, reserve.available) == (0, 40)
    assert sorted(reserve.take(40, SECRETS)) == sorted(issue(b"gone" * 8, 60, 40, 3, SECRETS.secrets[3]))


def chi_squared(counts: list[int]) -> float:
    """How far `counts` are from all the same."""
    even = sum(counts) / len(counts)
    return sum((count - even) ** 2 / even for count in counts)


def test_keys_are_spread_evenly_over_the_slots() -> None:
    """More than a million keys of one block, as they are given out: 65,536 slots in 256 bins."""
    reserve = Reserve()
    reserve.add(b"even" * 8, 0, SPREAD_KEYS)
    bins = Counter(slot(key) * BINS // SLOTS for _ in range(SPREAD_KEYS // 4096) for key in reserve.take(4096, SECRETS))
    assert chi_squared([bins[number] for number in range(BINS)]) < CHI_SQUARED_MOST


def test_what_a_search_takes_and_leaves_is_spread_evenly() -> None:
    """Neither the slots of a range nor what is left for others leans to one side."""
    reserve = Reserve()
    reserve.add(b"some" * 8, 0, 200_000)
    reserve.search(0, 63, 10, 100_000, SECRETS)
    found = reserve.take_aside(*HALF, 20_000)
    width = HALF[1] - HALF[0] + 1
    bins = Counter((slot(key) - HALF[0]) * BINS // width for key in found)
    assert len(found) == 20_000
    assert chi_squared([bins[number] for number in range(BINS)]) < CHI_SQUARED_MOST
    outside = Counter(slot(key) >= SLOTS // 2 for key in reserve.take(100_000, SECRETS))
    assert sum(outside.values()) == 100_000
