from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.apikeys import ApiKey
from oncepay.errors import RateLimited
from oncepay.keys import slot
from router import slots
from router.slots import SlotLimits


class Clock:
    """The clock of the limits, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


A, B = ApiKey("a"), ApiKey("b")


def test_a_seconds_worth_at_once_then_the_rate(clock: Clock) -> None:
    limits = SlotLimits(5.0)
    for _ in range(5):
        limits.take(A, "k")
    with pytest.raises(RateLimited, match="a may submit 5 payments a second") as caught:
        limits.take(A, "k")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    limits.take(B, "k")
    limits.take(A, "another")
    clock.now_s += 0.2
    limits.take(A, "k")
    with pytest.raises(RateLimited):
        limits.take(A, "k")


def test_keys_of_one_slot_share_its_bucket(clock: Clock) -> None:
    other = next(key for n in itertools.count() if slot(key := f"x{n}") == slot("k"))
    limits = SlotLimits(1.0)
    limits.take(A, "k")
    with pytest.raises(RateLimited):
        limits.take(A, other)


def test_a_slow_rate_says_when_to_come_back(clock: Clock) -> None:
    limits = SlotLimits(0.1)
    limits.take(A, "k")
    clock.now_s += 2.5
    with pytest.raises(RateLimited) as caught:
        limits.take(A, "k")
    assert caught.value.retry_after_s == 8
    clock.now_s += 8
    limits.take(A, "k")


def test_a_keys_own_limit_goes_before_the_deployments(clock: Clock) -> None:
    limits = SlotLimits(1.0)
    for _ in range(10):
        limits.take(ApiKey("free", slot_rate_limit_per_s=0.0), "k")
    for _ in range(3):
        limits.take(ApiKey("c", slot_rate_limit_per_s=3.0), "k")
    with pytest.raises(RateLimited):
        limits.take(ApiKey("c", slot_rate_limit_per_s=3.0), "k")


def test_no_limit_remembers_nothing(clock: Clock) -> None:
    limits = SlotLimits(0.0)
    for _ in range(100):
        limits.take(A, "k")
    assert not limits._full_at_s


def test_the_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "BUCKETS_MAX", 10)
    limits = SlotLimits(1.0)
    for n in range(1000):
        limits.take(A, f"k{n}")
    assert len(limits._full_at_s) == 10


@given(st.floats(0.05, 50), st.lists(st.floats(0, 3), max_size=200))
def test_never_more_than_the_rate_and_a_seconds_worth(rate: float, gaps_s: list[float]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        limits = SlotLimits(rate)
        began_s, taken = clock.now_s, 0
        for gap_s in gaps_s:
            clock.now_s += gap_s
            try:
                limits.take(A, "k")
            except RateLimited:
                continue
            taken += 1
            assert taken <= max(rate, 1.0) + rate * (clock.now_s - began_s) + 1e-3
