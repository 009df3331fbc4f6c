"""The order of a rolling restart, whatever the shard's size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.planned import NotNow, Step, restart_steps


@given(st.lists(st.integers(1, 99), min_size=3, max_size=7, unique=True))
def test_no_node_restarts_before_another_has_everything(numbers: list[int]) -> None:
    leader, *standbys = [f"s0-{number}" for number in numbers]
    steps = restart_steps(leader, standbys)
    restarts = [n for n, step in enumerate(steps) if step.do == "restart"]
    assert sorted(steps[n].node for n in restarts) == sorted([leader, *standbys])
    leads = leader
    for n, step in enumerate(steps):
        if step.do == "switchover":
            assert step.node == leads
            assert steps[n - 1] == Step("wait", leader, step.other)
            leads = step.other
        if step.do == "restart":
            assert step.node != leads, "a leader is never restarted"
            before = steps[n - 1]
            assert before.do == "wait"
            assert before.other not in (step.node, leads), "what the leader itself has is no second copy"
    assert steps[-1] == Step("restart", leader)


@pytest.mark.parametrize("standbys", [[], ["s0-2"]])
def test_a_shard_that_would_stand_still_is_not_restarted(standbys: list[str]) -> None:
    with pytest.raises(NotNow, match="needs two"):
        restart_steps("s0-1", standbys)
