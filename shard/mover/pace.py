"""How fast a move may go: rows a second, in its copy, its comparison and its deletes alike."""

from __future__ import annotations

import asyncio
import time

CHUNKS_A_SECOND = 8
"""A slow move takes smaller chunks: what it does at once shouldn't be felt."""
CHUNK_ROWS_MIN = 500
REST = 1.5
"""A move with a rate rests at least so many times as long as its last rows took, as gh-ost does with `--nice-ratio`: where the
machines are busy with payments, rows take longer, and the move leaves them more."""
REST_MAX_S = 2.0


def expected_s(rows: int, rows_per_s: int, rows_per_s_at_work: int) -> float:
    """How long `rows` take at a rate (0: none), rests included, where they are worked on at `rows_per_s_at_work`."""
    work_s = rows / rows_per_s_at_work
    return max(rows / rows_per_s, work_s * (1 + REST)) if rows_per_s else work_s


class Pace:
    """At most `rows_per_s` rows a second (0: no limit, and no rest), measured from when this was made."""

    def __init__(self, rows_per_s: int) -> None:
        self._rows_per_s = rows_per_s
        self._free_s = self._resumed_s = time.monotonic()

    def chunk(self, rows: int) -> int:
        """How many rows to take at once: `rows`, or fewer where that would be long work."""
        if not self._rows_per_s:
            return rows
        return min(rows, max(CHUNK_ROWS_MIN, self._rows_per_s // CHUNKS_A_SECOND))

    async def after(self, rows: int) -> None:
        """Return when the next rows may be taken, after `rows`. Time that was not used is lost, but for a second of it."""
        if self._rows_per_s:
            now_s = time.monotonic()
            rest_s = min(REST_MAX_S, (now_s - self._resumed_s) * REST)
            self._free_s = max(self._free_s, now_s - 1.0) + rows / self._rows_per_s
            await asyncio.sleep(max(rest_s, self._free_s - now_s))
            self._resumed_s = time.monotonic()
