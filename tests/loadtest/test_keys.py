"""The campaign on key services, a short run of it; and that it would notice a key that comes twice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loadtest.keys import CHI_SQUARED_MOST, KINDS, Seen
from oncepay.keys import issue

SECONDS = 120
"""For a machine that does other work at the same time; some 20 s otherwise."""


def some(first: int, count: int) -> list[str]:
    return issue(b"s" * 32, first, count, 1, b"m" * 32)


def test_a_key_that_comes_twice_is_noticed() -> None:
    seen = Seen()
    seen.add(some(0, 5_000))
    seen.add(some(5_000, 5_000))
    assert (len(seen), seen.doubles()) == (10_000, 0)
    seen.add(some(4_999, 2))
    assert seen.doubles() == 2


def test_keys_that_lean_to_some_slots_are_noticed() -> None:
    seen = Seen()
    seen.add(some(0, 50_000))
    assert seen.chi_squared() < CHI_SQUARED_MOST
    seen.bins[7] *= 2
    assert seen.chi_squared() > CHI_SQUARED_MOST


@pytest.mark.cluster
def test_no_key_comes_twice_whatever_is_killed_and_frozen() -> None:
    command = [sys.executable, "-m", "loadtest.keys", "--count", "300000", "--rounds", "1", "--rate", "40000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["doubles"] == 0
    assert found["keys"] >= 300_000
    assert len(found["faults"]) == KINDS
    assert found["takeovers"] > 0
