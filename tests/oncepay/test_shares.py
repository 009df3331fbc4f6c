"""Dealing the rate budget out: whatever processes do, and whatever of it they hear late, they never go faster together."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from oncepay.budget import HEADROOM, Role, dealt, share_of
from oncepay.shares import PARK_S, Member, Policy, Record, deal, slowed, without

LIMIT = 100.0
ROLES: dict[str, Role] = {"r1": "router", "r2": "router", "w1": "worker", "w2": "worker"}
NAMES = tuple(ROLES)


def policy(role: Role) -> Policy:
    def fair(endpoint: str, roles: Mapping[str, int]) -> float:
        return share_of(LIMIT, endpoint, role, {key: roles[key] for key in ROLES.values() if key in roles})

    return Policy(("create",), lambda endpoint, members: dealt(LIMIT, members), fair)


class World:
    """The record, and how fast each process goes."""

    def __init__(self) -> None:
        self.record = Record()
        self.rates: dict[str, dict[str, float]] = {}

    def deal(self, name: str, alive: set[str], *, grow: bool, conflict: bool = False, now_s: float = 1.0) -> None:
        """One round of a process, as Budget does it; with `conflict` somebody else's write came in between."""
        current = slowed(self.rates.get(name, {"create": 0.0}), self.record, name)
        grow = grow and alive <= self.record.members.keys()
        made = deal(self.record, name, ROLES[name], current, alive, policy(ROLES[name]), now_s, grow=grow)
        mine = made.members[name].rates
        self.rates[name] = {endpoint: min(rate, mine[endpoint]) for endpoint, rate in current.items()}
        if not conflict:
            self.record = made
            self.rates[name] = dict(mine)

    @property
    def total(self) -> float:
        return sum(rates["create"] for rates in self.rates.values())


steps = st.tuples(
    st.sampled_from(["deal", "deal", "deal", "conflict", "kill", "stop", "again"]),
    st.sampled_from(NAMES),
    st.sets(st.sampled_from(NAMES)),
    st.booleans(),
)


@given(st.lists(steps, max_size=60))
def test_nothing_is_exceeded_whatever_comes_in_whichever_order(history: list[tuple[str, str, set[str], bool]]) -> None:
    """Who is alive is heard late or wrongly: only the record counts."""
    world = World()
    for what, name, alive, grow in history:
        if what in ("deal", "conflict"):
            world.deal(name, alive | {name}, grow=grow, conflict=what == "conflict")
        elif what == "kill":
            world.rates.pop(name, None)  # its share stays in the record
        elif what == "again":
            world.rates[name] = {"create": 0.0}
        elif name in world.rates:
            del world.rates[name]
            world.record = without(world.record, name)
        assert world.total <= HEADROOM * LIMIT + 1e-6
        assert sum(member.rates["create"] for member in world.record.members.values()) <= HEADROOM * LIMIT + 1e-6


@given(st.lists(steps, max_size=30), st.permutations(NAMES))
def test_in_the_end_everybody_has_what_is_fair(history: list[tuple[str, str, set[str], bool]], order: list[str]) -> None:
    world = World()
    for what, name, alive, grow in history:
        if what == "deal":
            world.deal(name, alive | {name}, grow=grow)
    for _ in range(3):
        for name in order:
            world.deal(name, set(NAMES), grow=True)
    roles: dict[Role, int] = {"router": 2, "worker": 2}
    for name, rates in world.rates.items():
        assert abs(rates["create"] - share_of(LIMIT, "create", ROLES[name], roles)) < 1e-6


def test_one_that_vanished_keeps_its_share_for_a_while_and_one_that_gave_it_back_does_not() -> None:
    world = World()
    for _ in range(3):
        for name in NAMES:
            world.deal(name, set(NAMES), grow=True)
    had = world.record.members["r1"].rates
    alive = set(NAMES) - {"r1"}
    world.deal("r2", alive, grow=True, now_s=100.0)
    assert world.record.members["r1"] == Member("router", had, gone_s=100.0)
    world.deal("r2", alive, grow=True, now_s=100.0 + PARK_S - 1)
    assert world.record.members["r1"].rates == had
    world.deal("r2", alive, grow=True, now_s=100.0 + PARK_S + 1)
    assert "r1" not in world.record.members
    world.record = without(world.record, "w1")
    assert set(world.record.members) == {"r2", "w2"}


def test_a_record_that_was_lost_gives_everybody_what_it_uses() -> None:
    world = World()
    for _ in range(3):
        for name in NAMES:
            world.deal(name, set(NAMES), grow=True)
    before = world.total
    world.record = Record()
    for name in NAMES:
        world.deal(name, set(NAMES), grow=True)
        assert world.total <= HEADROOM * LIMIT + 1e-6
    assert abs(world.total - before) < 1e-6


@given(st.integers(25, 2_000), st.integers(1, 60))
def test_what_is_dealt_out_keeps_room_for_a_request_more_of_each(limit: int, members: int) -> None:
    """A process sends at most 1.05 times its rate in a second, and one request more."""
    whole = dealt(limit, members)
    assert 0.5 * limit <= whole <= 0.9 * limit
    if members <= limit / 3:
        assert 1.05 * whole + members <= limit + 1e-6
