"""What the stand-in has done: calls by endpoint and second, faults applied, webhooks sent, lost and doubled."""

from __future__ import annotations

import time
from collections import Counter

SECONDS_MAX = 3_600
"""Seconds for which an endpoint's calls are kept one by one; older ones remain in the totals."""


class Counts:
    """Counters since the start of the process."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[int, int]] = {}
        self.totals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.webhooks: Counter[str] = Counter({"sent": 0, "lost": 0, "doubled": 0, "failed": 0})
        self.statuses: Counter[str] = Counter()

    def call(self, endpoint: str) -> int:
        """Count a call of `endpoint`; the number of its calls in this second, this one included."""
        second = int(time.time())
        self.totals[endpoint] += 1
        seconds = self.calls.get(endpoint)
        if seconds is None:
            seconds = self.calls[endpoint] = {}
        count = seconds.get(second, 0) + 1
        seconds[second] = count
        if count == 1 and len(seconds) > SECONDS_MAX:
            del seconds[next(iter(seconds))]
        return count

    def report(self) -> dict[str, object]:
        """Everything, as `GET /_control/counts` shows it."""
        return {
            "calls": {endpoint: {str(second): n for second, n in seconds.items()} for endpoint, seconds in self.calls.items()},
            "totals": dict(self.totals),
            "statuses": dict(self.statuses),
            "webhooks": dict(self.webhooks),
            "faults": dict(self.faults),
        }
