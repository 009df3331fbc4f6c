"""A circuit breaker: stops asking a provider that is down, and asks once in a while whether it is back."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES_MAX = 5
OPEN_S, OPEN_MAX_S = 1.0, 30.0


class Breaker:
    """Opens after FAILURES_MAX failures in a row; after a pause, which doubles each time, lets one probe through."""

    def __init__(self, failures_max: int = FAILURES_MAX, now: Callable[[], float] = time.monotonic) -> None:
        self._failures_max = failures_max
        self._now = now
        self._failures = 0
        self._pause_s = OPEN_S
        self._open_until_s: float | None = None
        self._probing = False

    @property
    def open(self) -> bool:
        """Whether calls are held back."""
        return self._open_until_s is not None

    def allowance(self, wanted: int) -> int:
        """How many of `wanted` calls may be made now: all, one probe, or none."""
        if self._open_until_s is None:
            return wanted
        if self._probing or self._now() < self._open_until_s or not wanted:
            return 0
        return 1

    def probing(self) -> None:
        """The probe is on its way: nothing else goes until it is answered."""
        self._probing = self.open

    def success(self) -> None:
        """A call was answered."""
        self._failures, self._pause_s, self._open_until_s, self._probing = 0, OPEN_S, None, False

    def failure(self) -> None:
        """A call got no usable answer."""
        self._failures += 1
        if self._probing or self._failures >= self._failures_max:
            if self.open and not self._probing:
                return  # one that was under way when it opened
            self._open_until_s = self._now() + self._pause_s
            self._pause_s = min(self._pause_s * 2, OPEN_MAX_S)
            self._probing = False

    def unanswered(self) -> None:
        """The probe ended without saying anything about the provider: another one may go."""
        self._probing = False
