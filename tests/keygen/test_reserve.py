"""The reserve: each index leaves it once, whatever is asked for in what order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keygen.reserve import Reserve
from oncepay.keys import MacSecrets, issue

SECRETS = MacSecrets(3, {3: b"m" * 32})

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40)),
        st.tuples(st.just("take"), st.integers(1, 60)),
        st.tuples(st.just("ready"), st.integers(-5, 60)),
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
        elif count <= reserve.available:
            keys = reserve.take(count, SECRETS)
            assert len(keys) == count
            taken += keys
        assert reserve.available == len(expected) - len(taken)
        assert reserve.ready <= reserve.available
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
