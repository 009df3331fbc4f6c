"""The pending cache's payouts: every payout of the shard with open work, in memory, ordered by its next look.

Filled once from the table, then kept by the change feed alone, by the rule of versions of `PendingCache`. There are few of
them beside payments: one a seller and currency at most is usual.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from oncepay.feed import PayoutRow
from oncepay.keys import slot
from oncepay.payout import PayoutStatus
from oncepay.settings import PayoutSettings

JITTER = 0.2


class PendingPayout(msgspec.Struct):
    """A payout with open work. `tries`: looks since its last change."""

    key: str
    status: PayoutStatus
    version: int
    due_s: float
    tries: int = 0


class PayoutCache:
    """Not for threads. `now` is the clock in seconds since 1970."""

    def __init__(self, settings: PayoutSettings, now: Callable[[], float] = time.time) -> None:
        self._first_s = settings.poll_first_s
        self._max_s = settings.poll_max_s
        self._now = now
        self._pending: dict[str, PendingPayout] = {}
        self._due: list[tuple[float, str]] = []
        self._settled: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[PendingPayout]:
        """All that is pending, in no order."""
        return iter(self._pending.values())

    def get(self, key: str) -> PendingPayout | None:
        """What is known of a pending payout."""
        return self._pending.get(key)

    def begin_fill(self) -> None:
        """Start over: empty, and remembering what gets settled until `end_fill`."""
        self._pending.clear()
        self._due.clear()
        self._settled = {}

    def begin_load(self) -> None:
        """More is going to be read from the table: from now on remember what gets settled, until `end_fill`."""
        self._settled = {}

    def end_fill(self) -> None:
        """The feed has passed a barrier that was committed after the snapshot: everything is known."""
        self._settled = None

    def changed_all(self, rows: Iterable[PayoutRow]) -> None:
        """The rows of one commit, from the feed."""
        for row in rows:
            self.put(row.key, row.status, row.version, row.open_work)

    def put(self, key: str, status: str, version: int, open_work: bool) -> None:
        """A payout's state, unless a state of the same or a higher version is known."""
        before = self._pending.get(key)
        known = before.version if before is not None else (self._settled or {}).get(key, 0)
        if known >= version:
            return
        if not open_work:
            self._pending.pop(key, None)
            if self._settled is not None:
                self._settled[key] = version
            return
        # What was just made is told to Tipalti soon, together with the rest of its run.
        wait_s = 0.0 if status == PayoutStatus.CREATED else self._first_s * (1.0 + JITTER * random.random())
        self._place(PendingPayout(key, PayoutStatus(status), version, self._now() + wait_s))

    def forget(self, key: str) -> None:
        """The payout is another shard's now."""
        self._pending.pop(key, None)

    def forget_slots(self, first: int, last: int) -> int:
        """Payouts of these slots are another shard's now; how many there were."""
        gone = [key for key in self._pending if first <= slot(key) <= last]
        for key in gone:
            del self._pending[key]
        return len(gone)

    def next_due_s(self) -> float | None:
        """When the next look is due; it may have settled meanwhile."""
        return self._due[0][0] if self._due else None

    def take_due(self, limit: int) -> list[PendingPayout]:
        """Payouts whose look is due, at most `limit`. Each is put off to its next look at once."""
        now_s = self._now()
        taken: list[PendingPayout] = []
        while self._due and self._due[0][0] <= now_s and len(taken) < limit:
            due_s, key = heapq.heappop(self._due)
            pending = self._pending.get(key)
            if pending is None or pending.due_s != due_s:
                continue  # it changed or settled since
            taken.append(pending)
            tries = pending.tries + 1
            self._place(PendingPayout(key, pending.status, pending.version, now_s + self._gap_s(pending.status, tries), tries))
        return taken

    def _gap_s(self, status: PayoutStatus, tries: int) -> float:
        """Seconds to the next look: doubled with each; where an operator has the next move the maximum."""
        patient = status is PayoutStatus.AWAITING_APPROVAL
        gap_s = self._max_s if patient else min(self._max_s, self._first_s * 2.0 ** min(tries, 30))
        return gap_s * (1.0 - JITTER + 2 * JITTER * random.random())

    def _place(self, pending: PendingPayout) -> None:
        self._pending[pending.key] = pending
        heapq.heappush(self._due, (pending.due_s, pending.key))
