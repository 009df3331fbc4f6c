"""Reading what Patroni and etcd say, and putting the status together."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local import shard_map
from deploy.local.health import NodeState, node_state
from deploy.local.ports import Ports
from deploy.local.status import leader_of


def node(role: str, timeline: int = 1, running: bool = True) -> NodeState:
    return NodeState(running, role, timeline, role == "replica", 100, ())


def test_the_primary_leads() -> None:
    assert leader_of({"s0-1": node("replica"), "s0-2": node("primary")}) == "s0-2"


def test_a_deposed_primary_does_not() -> None:
    assert leader_of({"s0-1": node("primary", 3), "s0-2": node("primary", 4)}) == "s0-2"


def test_no_leader_without_a_running_primary() -> None:
    assert leader_of({"s0-1": node("primary", running=False), "s0-2": node("replica")}) is None
    assert leader_of({}) is None


def test_a_primarys_answer() -> None:
    state = node_state(
        {
            "state": "running",
            "role": "primary",
            "xlog": {"location": 4711},
            "timeline": 2,
            "replication": [
                {"application_name": "s0-1", "sync_state": "quorum", "state": "streaming"},
                {"application_name": "s0-3", "sync_state": "async", "state": "streaming"},
            ],
        }
    )
    assert state == NodeState(True, "primary", 2, False, 4711, ("s0-1",))


def test_a_standbys_answer() -> None:
    state = node_state(
        {
            "state": "running",
            "role": "replica",
            "replication_state": "streaming",
            "timeline": 2,
            "xlog": {"received_location": 4700, "replayed_location": 4600},
        }
    )
    assert state == NodeState(True, "replica", 2, True, 4700, ())


def test_an_answer_without_a_database() -> None:
    assert node_state({"state": "stopped", "role": "replica"}) == NodeState(False, "replica", 0, False, None, ())


@given(st.integers(1, 6))
def test_the_first_map_covers_every_slot_once_and_evenly(count: int) -> None:
    ranges = shard_map.even_ranges([f"s{n}" for n in range(count)])
    slots = [slot for owned in ranges.values() for first, last in owned for slot in range(first, last + 1)]
    assert slots == list(range(shard_map.SLOTS))
    sizes = [last - first + 1 for owned in ranges.values() for first, last in owned]
    assert max(sizes) - min(sizes) <= 1
    assert shard_map.parse_map(shard_map.render_map(ranges)) == ranges


def test_the_agreed_map() -> None:
    assert json.loads(shard_map.render_map(shard_map.even_ranges(["s0", "s1"]))) == {
        "version": 1,
        "ranges": [
            {"first": 0, "last": 32767, "shard": "s0"},
            {"first": 32768, "last": 65535, "shard": "s1"},
        ],
    }


def test_ranges_that_touch_are_one() -> None:
    text = json.dumps(
        {
            "version": 3,
            "ranges": [
                {"first": 100, "last": 199, "shard": "s1"},
                {"first": 0, "last": 49, "shard": "s0"},
                {"first": 50, "last": 99, "shard": "s0"},
                {"first": 200, "last": 65535, "shard": "s0"},
            ],
        }
    )
    assert shard_map.parse_map(text) == {"s0": [(0, 99), (200, 65535)], "s1": [(100, 199)]}


@pytest.mark.parametrize("text", ["{}", "[]", '{"ranges": [{"first": 1}]}', "no"])
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any that says so
        shard_map.parse_map(text)


def test_a_shards_record() -> None:
    record = json.loads(shard_map.shard_record(Ports(9000), 1, "s1", ["127.0.0.1"] * 3))
    assert record["scope"] == "s1"
    assert record["nodes"][2] == {"name": "s1-3", "host": "127.0.0.1", "port": 9038}
