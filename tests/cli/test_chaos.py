"""`oncepay chaos`: what it says, and the order of a campaign."""

from __future__ import annotations

import json

from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cli.campaign import BESIDE, Deck
from cli.main import main
from deploy.local.faults import FAULTS


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_the_same_seed_gives_the_same_course(seed: int, count: int) -> None:
    decks = [Deck(list(FAULTS), ["s0", "s1"], seed) for _ in range(2)]
    first, second = ([deck.draw() for _ in range(count)] for deck in decks)
    assert first == second


@given(st.integers(0, 2**32))
def test_every_fault_comes_before_any_comes_again(seed: int) -> None:
    deck = Deck(list(FAULTS), ["s0", "s1"], seed)
    for _ in range(2):
        drawn = [deck.draw() for _ in FAULTS]
        assert sorted(kind for kind, _, _ in drawn) == sorted(FAULTS)
        assert {shard for _, shard, _ in drawn} <= {"s0", "s1"}
        assert {beside for _, _, beside in drawn} <= {"", *BESIDE}


def test_every_fault_is_a_command_with_an_example() -> None:
    listed = json.loads(CliRunner().invoke(main, ["chaos", "list", "--output", "json"]).output)["faults"]
    assert [each["name"] for each in listed] == list(FAULTS)
    for name in FAULTS:
        shown = CliRunner().invoke(main, ["chaos", name, "--help"])
        assert shown.exit_code == 0
        assert f"oncepay chaos {name}" in shown.output
    assert CliRunner().invoke(main, ["chaos", "no-such-fault"]).exit_code == 2
