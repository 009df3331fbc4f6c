"""The pending cache: exact against a plain model, in order, small and fast."""

from __future__ import annotations

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oncepay.feed import PaymentRow
from oncepay.keys import ISSUED_PREFIX, issue
from oncepay.payment import TERMINAL, Status
from oncepay.settings import PollSettings
from shard.worker.cache import PendingCache, pack, unpack, unpack_all

POLL = PollSettings(first_s=5.0, max_s=300.0)
FAR_S = 1_000_000.0


class Clock:
    """Seconds that a test moves."""

    def __init__(self, now_s: float = 1_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def row(key: str, status: Status, version: int, *, open_work: bool = True) -> PaymentRow:
    moments = (0, 0, int(FAR_S * 1e6))
    return PaymentRow(1, 0, 0, key, status.value, version, "b", "usd", 1, 0, 0, None, "{}", "{}", *moments, open_work)


BASE64URL = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=32, max_size=32)


@given(BASE64URL.map(ISSUED_PREFIX.__add__))
def test_issued_keys_are_packed_and_come_back(key: str) -> None:
    assert len(pack(key)) == 27
    assert unpack(pack(key)) == key


ODD = st.text("+/=ab-_\x7f~ ", min_size=32, max_size=32).map(ISSUED_PREFIX.__add__)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=200) | ODD)
def test_any_key_comes_back_exactly(key: str) -> None:
    assert unpack(pack(key)) == key


@given(ODD, ODD | BASE64URL.map(ISSUED_PREFIX.__add__))
def test_no_two_keys_are_packed_alike(one: str, other: str) -> None:
    assert (pack(one) == pack(other)) == (one == other)


def test_what_is_due_comes_in_order_and_is_put_off_further_each_time() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    cache.put("a", "processing", 1, True, FAR_S)
    clock.now_s += 3
    cache.put("b", "processing", 1, True, FAR_S)
    assert cache.take_due(10) == []
    clock.now_s += 4
    assert [p.key for p in cache.take_due(10)] == ["a"]
    clock.now_s += 3
    assert [(p.key, p.tries) for p in cache.take_due(10)] == [("b", 0)]
    gaps = []
    for _ in range(9):
        before_s = clock.now_s
        while not (taken := [p for p in cache.take_due(10) if p.key == "a"]):
            clock.now_s += 1
        gaps.append(clock.now_s - before_s)
    assert taken[0].tries == 9
    for gap_s, distance_s in zip(gaps[1:], [20, 40, 80, 160, 300, 300, 300, 300], strict=True):
        assert 0.78 * distance_s - 6 <= gap_s <= 1.2 * distance_s + 6


@given(st.lists(BASE64URL.map(ISSUED_PREFIX.__add__) | st.text("ok1_é", min_size=1, max_size=40), max_size=20))
def test_many_keys_come_back_in_their_order(keys: list[str]) -> None:
    assert unpack_all([pack(key) for key in keys]) == keys


def test_none_is_taken_twice_though_it_left_its_place_and_came_back() -> None:
    """Each leaves a mark where it was; the same state at the same moment puts a second one beside it."""
    clock = Clock()
    cache = PendingCache(POLL, clock)
    for _ in range(5):
        for key in ("a", "b"):
            cache.put(key, "processing", 1, True, FAR_S)
        cache.forget("a")
        cache.put("a", "processing", 1, True, FAR_S)
    clock.now_s += 7
    assert sorted(p.key for p in cache.take_due(100)) == ["a", "b"]
    cache.hurry("a")
    cache.hurry("a")
    clock.now_s += 1
    assert [p.key for p in cache.take_due(100)] == ["a"]


def test_what_is_due_together_is_spread_over_its_next_look() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    for n in range(1_000):
        cache.put(f"k{n}", "attempted", 1, True, FAR_S)
    clock.now_s += 7
    assert len(cache.take_due(10_000)) == 1_000
    counts = list[int]()
    while sum(counts) < 1_000:
        clock.now_s += 5
        counts.append(len(cache.take_due(10_000)))
    assert max(counts) <= 300
    assert 40 <= len(counts) <= 74, "from 240 to 360 seconds, less the 7 and rounded"
    assert sum(1 for count in counts if count) >= 6


def test_where_people_have_the_next_move_looks_are_rare() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    cache.put("a", "requires_action", 1, True, FAR_S)
    clock.now_s += 8
    assert len(cache.take_due(10)) == 1
    clock.now_s += 230
    assert cache.take_due(10) == []
    clock.now_s += 140
    assert len(cache.take_due(10)) == 1


def test_a_change_starts_the_looks_anew_and_leaves_no_second_one() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    cache.put("a", "created", 1, True, FAR_S)
    clock.now_s += 4
    cache.put("a", "attempted", 2, True, FAR_S)
    clock.now_s += 3
    assert cache.take_due(10) == []
    clock.now_s += 4
    assert [(p.key, p.version, p.status) for p in cache.take_due(10)] == [("a", 2, Status.ATTEMPTED)]
    assert cache.take_due(10) == []


def test_settled_is_gone_and_never_due() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    cache.changed(row("a", Status.CONFIRMING, 3))
    cache.changed(row("a", Status.SUCCEEDED, 4))
    assert "a" in cache, "Stripe's fee is not booked yet"
    cache.changed(row("a", Status.SUCCEEDED, 5, open_work=False))
    assert len(cache) == 0
    clock.now_s += 1_000
    assert cache.take_due(10) == []
    assert sum(cache.counts.values()) == 0


def test_the_snapshot_never_brings_back_what_the_feed_settled() -> None:
    cache = PendingCache(POLL, Clock())
    cache.begin_fill()
    cache.changed(row("a", Status.FAILED, 5, open_work=False))
    cache.put("a", "confirming", 4, True, FAR_S)
    cache.put("b", "confirming", 4, True, FAR_S)
    cache.changed(row("b", Status.CREATED, 1))
    cache.end_fill()
    assert [(p.key, p.version) for p in cache] == [("b", 4)]


def test_expiry_is_a_reason_to_look_and_may_be_corrected() -> None:
    clock = Clock(0.0)
    cache = PendingCache(POLL, clock)
    cache.put("a", "attempted", 1, True, 20.5)
    clock.now_s = 7
    assert [p.expires_s for p in cache.take_due(10)] == [20]
    clock.now_s = 22
    assert [p.key for p in cache.take_due(10)] == ["a"], "long before the usual distance"
    cache.put("b", "attempted", 1, True, 100_000.0)
    pending = cache.get("b")
    assert pending is not None
    assert pending.expires_s <= 100_000 < pending.expires_s + 900
    clock.now_s = 99_500
    cache.expires("b", 100_000.0)
    pending = cache.get("b")
    assert pending is not None
    assert pending.expires_s == 100_000


def test_the_limit_bounds_a_taking() -> None:
    clock = Clock()
    cache = PendingCache(POLL, clock)
    for n in range(100):
        cache.put(f"k{n}", "created", 1, True, FAR_S)
        clock.now_s += 1
    clock.now_s += 10
    assert len(cache.take_due(10)) < 20
    assert len(cache.take_due(1_000)) > 80


OPEN = [s for s in Status if s not in TERMINAL]
CHANGES = st.tuples(st.sampled_from("abcd"), st.integers(1, 6), st.sampled_from(list(Status)), st.booleans())


@given(st.lists(CHANGES, max_size=40), st.lists(st.floats(0, 400), max_size=10))
@settings(max_examples=200)
def test_like_a_plain_model(changes: list[tuple[str, int, Status, bool]], waits: list[float]) -> None:
    """Whatever comes, in whatever order of versions: while filling the highest version counts, the first of equals."""
    clock = Clock()
    cache = PendingCache(POLL, clock)
    cache.begin_fill()
    model: dict[str, tuple[int, Status, bool]] = {}
    for key, version, status, fee_open in changes:
        open_work = status not in TERMINAL or (status is Status.SUCCEEDED and fee_open)
        cache.put(key, status.value, version, open_work, FAR_S)
        if key not in model or version > model[key][0]:
            model[key] = (version, status, open_work)
    cache.end_fill()
    pending = {key: (version, status) for key, (version, status, open_work) in model.items() if open_work}
    assert {p.key: (p.version, p.status) for p in cache} == pending
    assert {status: count for status, count in cache.counts.items() if count} == {
        status: sum(s is status for _, s in pending.values()) for status in {s for _, s in pending.values()}
    }
    for wait_s in waits:
        clock.now_s += wait_s
        assert {p.key for p in cache.take_due(100)} <= pending.keys()
        assert {p.key for p in cache} == pending.keys()
    clock.now_s += 1_000
    assert {p.key for p in cache.take_due(100)} == pending.keys()


STEPS = st.sampled_from("abcd") | st.floats(-10, 8) | st.just(0.05) | st.none()


@given(st.lists(STEPS, max_size=60), st.sampled_from([0.0, 0.5, 5.0, 100.0]))
@example(["a", 7.0, None, -6.95, "b"], 5.0)
@settings(max_examples=300)
def test_none_is_lost_whatever_the_clock_does(steps: list[str | float | None], first_s: float) -> None:
    """Payments that come and change (by their key) while the clock goes on, or back, and what is due is taken (None)."""
    clock = Clock()
    cache = PendingCache(PollSettings(first_s=first_s, max_s=300.0), clock)
    versions: dict[str, int] = {}
    for step in steps:
        if isinstance(step, str):
            versions[step] = versions.get(step, 0) + 1
            cache.put(step, "processing", versions[step], True, FAR_S)
        elif step is None:
            taken = [p.key for p in cache.take_due(100)]
            assert len(taken) == len(set(taken))
        else:
            clock.now_s += step
    clock.now_s += 2_000
    assert sorted((p.key, p.version) for p in cache.take_due(100)) == sorted(versions.items())


def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    """Under 150 bytes a pending payment with its key, at several fillings of the dictionary."""
    for count in (44_000, 88_000):
        clock = Clock(0.0)
        cache = PendingCache(POLL, clock)
        keys = issue(b"x" * 16, 0, count, 1, b"s" * 32)
        for n, key in enumerate(keys):
            clock.now_s = n / 1_000
            cache.put(key, "processing", 4, True, clock.now_s + 86_400)
        for _ in range(20):
            clock.now_s += 40
            cache.take_due(1_000_000)
        total = sys.getsizeof(cache._entries) + sum(map(sys.getsizeof, cache._entries))
        buckets = [bucket for at in cache._buckets.values() for bucket in at.values()]
        total += sum(sys.getsizeof(bucket) + sys.getsizeof(bucket.keys) + 150 for bucket in buckets)
        with capsys.disabled():
            print(f"{count} pending: {total / count:.0f} bytes each, {len(buckets)} buckets")
        assert total / count < 150
