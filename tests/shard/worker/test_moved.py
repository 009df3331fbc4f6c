"""A worker's cache and ranges that come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oncepay.keys import slot
from oncepay.settings import PollSettings
from shard.worker.cache import PendingCache
from shard.worker.moved import Runs, without

LAST = 60


@st.composite
def runs(draw: st.DrawFn) -> Runs:
    slots = sorted(draw(st.sets(st.integers(0, LAST))))
    found: Runs = []
    for number in slots:
        if found and found[-1][1] + 1 == number:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def slots_of(found: Runs) -> set[int]:
    return {number for first, last in found for number in range(first, last + 1)}


@given(runs(), runs())
def test_without_is_the_difference_of_the_slots(one: Runs, other: Runs) -> None:
    left = without(one, other)
    assert slots_of(left) == slots_of(one) - slots_of(other)
    assert left == sorted(left)
    assert all(first <= last for first, last in left)


def cache_of(keys: list[str]) -> PendingCache:
    cache = PendingCache(PollSettings())
    for key in keys:
        cache.put(key, "attempted", 2, True, 4e9)
    return cache


def test_a_range_that_goes_takes_its_payments_along() -> None:
    keys = [f"order-{n}" for n in range(200)]
    cache = cache_of(keys)
    low = [key for key in keys if slot(key) < 32_768]
    assert cache.forget_slots(0, 32_767) == len(low)
    assert {item.key for item in cache} == set(keys) - set(low)
    assert sum(cache.counts.values()) == len(keys) - len(low)
    assert cache.forget_slots(0, 32_767) == 0


def test_what_settles_while_a_range_is_loaded_does_not_come_back() -> None:
    """The interleaving: the page was read before the payment settled, and is put after the feed told of that."""
    cache = cache_of(["stays"])
    cache.begin_load()
    cache.put("settles", "succeeded", 5, False, 4e9)
    cache.put("settles", "confirming", 4, True, 4e9)
    cache.put("pending", "attempted", 2, True, 4e9)
    cache.end_fill()
    assert {item.key for item in cache} == {"stays", "pending"}
