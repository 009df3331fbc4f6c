"""The stand-in's own clock, which can be advanced, and its timers, which survive a restart."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Callable

from sandbox.store import KeyedRows, Store

log = logging.getLogger("sandbox.clock")

SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS timers (ord INTEGER PRIMARY KEY, due REAL NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL);
"""

FIRE_MAX = 200
"""Timers that fire in one step of the loop; the rest waits for the next step."""

Action = Callable[[str], None]


class Clock:
    """Wall-clock time plus an offset that only grows; seconds since 1970."""

    def __init__(self, store: Store) -> None:
        self._settings = KeyedRows(store, "settings", ("name", "value"))
        row = store.connection.execute("SELECT value FROM settings WHERE name = 'clock_offset_s'").fetchone()
        self.offset_s: float = row[0] if row else 0.0
        self._listeners: list[Callable[[], None]] = []

    def now(self) -> float:
        """Seconds since 1970 by this clock."""
        return time.time() + self.offset_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward by `seconds` (not negative)."""
        assert seconds >= 0
        self.offset_s += seconds
        self._settings.put("clock_offset_s", self.offset_s)
        for listener in self._listeners:
            listener()

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the clock was advanced."""
        self._listeners.append(listener)


class Timers:
    """Things to do later, by the stand-in's clock. Each is a row, deleted in the transaction of what it did."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._clock = clock
        self._store = store
        self._rows = KeyedRows(store, "timers", ("ord", "due", "kind", "subject"))
        self._actions: dict[str, Action] = {}
        self._handle: asyncio.TimerHandle | None = None
        self._armed_for = 0.0
        loaded = store.connection.execute("SELECT due, ord, kind, subject FROM timers").fetchall()
        self._heap: list[tuple[float, int, str, str]] = [(row[0], row[1], row[2], row[3]) for row in loaded]
        heapq.heapify(self._heap)
        self._next = max((row[1] for row in self._heap), default=0) + 1
        clock.on_advance(self.arm)

    def on(self, kind: str, action: Action) -> None:
        """Timers of `kind` call `action` with their subject."""
        self._actions[kind] = action

    def add(self, kind: str, subject: str, delay_s: float) -> None:
        """Fire `kind` for `subject` in `delay_s` seconds of the clock."""
        assert kind in self._actions
        due = self._clock.now() + delay_s
        self._rows.put(self._next, due, kind, subject)
        heapq.heappush(self._heap, (due, self._next, kind, subject))
        self._next += 1
        self.arm()

    def arm(self) -> None:
        """Wake up for the next timer."""
        if not self._heap:
            return
        due = self._heap[0][0]
        if self._handle is not None:
            if self._armed_for <= due and self._armed_for > self._clock.now():
                return
            self._handle.cancel()
        self._armed_for = due
        self._handle = asyncio.get_running_loop().call_later(max(0.0, due - self._clock.now()), self._fire)

    def _fire(self) -> None:
        self._handle = None
        now = self._clock.now()
        for _ in range(FIRE_MAX):
            if not self._heap or self._heap[0][0] > now:
                break
            _, ordinal, kind, subject = heapq.heappop(self._heap)
            self._rows.remove(ordinal)
            try:
                self._actions[kind](subject)
            except Exception:
                log.exception("timer %s for %s failed", kind, subject)
        self.arm()

    def stop(self) -> None:
        """Fire nothing more in this process."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
