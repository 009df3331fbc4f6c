"""What a fault is: something that `begin` breaks, that is over when `is_done` says so, and that `undo` mends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from deploy.local.cluster import Cluster
from deploy.local.faults.hands import FaultFailed, Hands

DONE_S = 75.0
WHOLE_S = 150.0
WHOLE_LOOK_S = 0.5


class Fault:
    """One fault on one shard. A class is a kind; an instance is broken once, and undone once.

    `gap_s` is how long writes to the shard may stand still for it, `slowest_s` how long an answer may take; both are what
    docs/durability.md promises, and None where it promises nothing.
    """

    name: ClassVar[str]
    does: ClassVar[str]
    """What it does, for a person: continues "It …"."""
    undoes: ClassVar[str] = "nothing: what was killed is started again by itself"
    hold_s: ClassVar[float] = 0.0
    """How long it lasts at least."""
    gap_s: ClassVar[float | None] = None
    slowest_s: ClassVar[float | None] = None

    @classmethod
    def is_possible(cls, cluster: Cluster) -> bool:
        """Whether it can be made on that cluster, by this user."""
        del cluster
        return True

    def __init__(self, hands: Hands) -> None:
        self.hands = hands
        self.target = ""
        """Whom it hits; known once it has begun."""

    def prepare(self) -> None:
        """What must be so before it can break, and doesn't count. Raises FaultFailed."""

    def begin(self) -> None:
        """Break it. Raises FaultFailed when that can't be done here; then nothing is broken."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether what should follow has followed, such as that another node leads."""
        return True

    def undo(self) -> None:
        """Mend what doesn't mend itself. Safe to call again."""


class Moment(NamedTuple):
    """`what`: "begun", "broken", "done" (what should follow has followed), "undone" or "whole"; `at_s` of the monotonic clock."""

    what: str
    at_s: float


OnMoment = Callable[[Moment], None]


def inflict(
    fault: Fault,
    *,
    hold_s: float | None = None,
    on_moment: OnMoment = lambda _: None,
    enough: threading.Event | None = None,
) -> dict[str, float]:
    """The whole course of a fault: break, wait for what follows, hold, undo, wait until all is whole.

    Returns the times of its moments. It is undone whatever happens, and at once when another thread sets `enough`; then
    nothing more is waited for or told. Raises FaultFailed.
    """
    times: dict[str, float] = {}
    over = enough or threading.Event()

    def reached(what: str) -> None:
        times[what] = time.monotonic()
        on_moment(Moment(what, times[what]))

    try:
        fault.prepare()
        reached("begun")
        fault.begin()
        reached("broken")
        fault.hands.until(lambda: over.is_set() or fault.is_done(), f"what follows from {fault.name}", DONE_S)
        if not over.is_set():
            reached("done")
        left_s = (fault.hold_s if hold_s is None else hold_s) - (time.monotonic() - times["broken"])
        if left_s > 0:
            over.wait(left_s)  # a fault that lasts is nothing but time
    finally:
        fault.undo()
    reached("undone")
    fault.hands.until(lambda: over.is_set() or fault.hands.is_whole(), "everything is whole again", WHOLE_S, WHOLE_LOOK_S)
    if not over.is_set():
        reached("whole")
    return times


__all__ = ["Fault", "FaultFailed", "Moment", "OnMoment", "inflict"]
