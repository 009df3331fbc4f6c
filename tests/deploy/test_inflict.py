"""A fault that somebody has had enough of is undone at once, and not when its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.local.faults.base import Fault, inflict


class Lasting(Fault):
    name = "lasting"
    does = "lasts"
    hold_s = 600.0

    def __init__(self, hands: Any, *, follows: bool) -> None:
        super().__init__(hands)
        self.follows = follows
        self.seen: list[str] = []

    def begin(self) -> None:
        self.seen.append("begun")

    def is_done(self) -> bool:
        return self.follows

    def undo(self) -> None:
        self.seen.append("undone")


def until(condition: Callable[[], bool], _what: str, within_s: float, _pause_s: float = 0.0) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("follows", [True, False])
def test_it_is_undone_at_once(follows: bool) -> None:
    hands: Any = SimpleNamespace(until=until, is_whole=lambda: False)
    fault, enough, moments = Lasting(hands, follows=follows), threading.Event(), list[str]()

    def on_moment(moment: Any) -> None:
        moments.append(moment.what)
        if moment.what == "broken":
            threading.Timer(0.1, enough.set).start()

    began_s = time.monotonic()
    inflict(fault, on_moment=on_moment, enough=enough)
    assert time.monotonic() - began_s < 30
    assert fault.seen == ["begun", "undone"]
    assert moments == ["begun", "broken", *(["done"] if follows else []), "undone"]
