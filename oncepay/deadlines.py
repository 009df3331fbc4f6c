"""Bounds on waiting for thousands of tasks at once, with one timer for all of them.

Like `asyncio.timeout`, which makes a timer of its own each time, but only as fine as TICK_S: for bounds of many seconds that
hardly ever come to pass.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

TICK_S = 0.25

T = TypeVar("T")


class _Wait:
    """A task that waits, at most until `until_s` (monotonic)."""

    __slots__ = ("expired", "task", "until_s")

    def __init__(self, task: asyncio.Task[Any], until_s: float) -> None:
        self.task = task
        self.until_s = until_s
        self.expired = False


class Deadlines:
    """The waits of one event loop."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def within(self, seconds: float, work: Awaitable[T]) -> T:
        """What `work` returns. Raises TimeoutError when it takes longer than `seconds`, to TICK_S; it is canceled then.

        A cancel that comes from outside stays a CancelledError, also when both come together.
        """
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        wait = _Wait(task, time.monotonic() + seconds)
        self._waits.add(wait)
        if self._timer is None:
            self._timer = task.get_loop().call_later(TICK_S, self._tick)
        try:
            return await work
        except asyncio.CancelledError:
            if wait.expired and task.uncancel() <= cancelling:
                raise TimeoutError from None
            raise
        finally:
            self._waits.discard(wait)

    def _tick(self) -> None:
        now_s = time.monotonic()
        for wait in [wait for wait in self._waits if wait.until_s <= now_s]:
            wait.expired = True
            self._waits.discard(wait)
            wait.task.cancel()
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick) if self._waits else None
