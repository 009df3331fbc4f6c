"""Delivery of notifications to endpoints, with retries that grow apart, surviving a restart.

A delivery is a row from the transaction of its event until an endpoint answers 2xx or three days of the clock have
passed. No order is promised, and what was sent before a crash may be sent again.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import Counter
from collections.abc import Callable, Iterable

import aiohttp
import msgspec

from sandbox.clock import Clock
from sandbox.counts import Counts
from sandbox.faults import Faults
from sandbox.store import KeyedRows, Store

log = logging.getLogger("sandbox.delivery")

SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (ord INTEGER PRIMARY KEY, event TEXT NOT NULL, endpoint TEXT NOT NULL,
  attempt INTEGER NOT NULL, due REAL NOT NULL, first REAL NOT NULL);
"""
CONCURRENT_MAX = 32
"""Deliveries under way at once; the others wait in their order."""
QUEUE_MAX = 50_000
"""Deliveries kept in memory; beyond it they wait in SQLite until the queue has drained by half."""
TIMEOUT_S = 20.0
RETRY_GAPS_S = (1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0, 21_600.0)
"""Seconds to the next try after the first, second, … failure; the last one repeats."""
GIVE_UP_S = 3 * 86_400.0
REORDER_S = (0.2, 1.5)
"""How much later a notification comes that a fault reorders."""


class Outgoing(msgspec.Struct):
    """What to post, where."""

    url: str
    body: bytes
    headers: dict[str, str]


class Delivery(msgspec.Struct):
    """One event on its way to one endpoint. Times are the clock's."""

    ordinal: int
    event: str
    endpoint: str
    attempt: int
    first: float


class Deliveries:
    """All deliveries of a stand-in. `render` makes the request for (event, endpoint) afresh, or None when it's off."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        counts: Counts,
        faults: Faults,
        user_agent: str,
        render: Callable[[str, str], Outgoing | None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._counts = counts
        self._faults = faults
        self._user_agent = user_agent
        self._render = render
        self._rows = KeyedRows(store, "deliveries", ("ord", "event", "endpoint", "attempt", "due", "first"))
        self._heap: list[tuple[float, int, Delivery]] = []
        self._overflow = False
        self._active: set[asyncio.Task[None]] = set()
        self._handle: asyncio.TimerHandle | None = None
        self._session: aiohttp.ClientSession | None = None
        self.pending: Counter[str] = Counter()
        """Deliveries not yet answered 2xx, by event."""
        newest = store.connection.execute("SELECT max(ord) FROM deliveries").fetchone()[0]
        self._next = (newest or 0) + 1
        for event, count in store.query("SELECT event, count(*) FROM deliveries GROUP BY event"):
            self.pending[event] = count
        self._refill()
        clock.on_advance(self._pump)

    def start(self) -> None:
        """Begin to send; needs the running loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONCURRENT_MAX, keepalive_timeout=60.0, ssl=False),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self._user_agent, "Content-Type": "application/json; charset=utf-8"},
        )
        self._pump()

    async def stop(self) -> None:
        """Send nothing more; what is under way is cut off and stays to be sent after the next start."""
        if self._handle is not None:
            self._handle.cancel()
        session, self._session = self._session, None
        for task in list(self._active):
            task.cancel()
        await asyncio.gather(*self._active, return_exceptions=True)
        if session is not None:
            await session.close()

    def enqueue(self, event: str, endpoints: Iterable[str], *, lossless: bool = False) -> None:
        """Send `event` to `endpoints`, subject to the faults (`lossless`: not to loss)."""
        faults = self._faults
        now = self._clock.now()
        for endpoint in endpoints:
            if not lossless and faults.hits("webhook_lost", "delivery"):
                self._counts.webhooks["lost"] += 1
                continue
            due = now + faults.between("webhook_delay_s", "delivery")
            if faults.hits("webhook_reordered", "delivery"):
                low, high = REORDER_S
                due += low + (high - low) * faults.fraction("webhook_reordering", "delivery")
            delivery = Delivery(self._next, event, endpoint, 0, now)
            self._next += 1
            self.pending[event] += 1
            self._put(delivery, due)
        self._store.after_commit(self._pump)

    def _put(self, delivery: Delivery, due: float) -> None:
        self._rows.put(delivery.ordinal, delivery.event, delivery.endpoint, delivery.attempt, due, delivery.first)
        if len(self._heap) >= QUEUE_MAX:
            self._overflow = True
        else:
            heapq.heappush(self._heap, (due, delivery.ordinal, delivery))

    def _refill(self) -> None:
        """Load what waits in SQLite only, the earliest due first."""
        known = {ordinal for _, ordinal, _ in self._heap}
        known.update(int(task.get_name()) for task in self._active)
        rows = self._store.query(
            "SELECT due, ord, event, endpoint, attempt, first FROM deliveries ORDER BY due LIMIT ?", (QUEUE_MAX + len(known),)
        )
        for due, ordinal, event, endpoint, attempt, first in rows:
            if ordinal not in known:
                self._heap.append((due, ordinal, Delivery(ordinal, event, endpoint, attempt, first)))
        heapq.heapify(self._heap)
        self._overflow = len(rows) == QUEUE_MAX + len(known)

    def _pump(self) -> None:
        """Start what is due, as far as there is room, and wake up for the next."""
        if self._session is None:
            return
        if self._overflow and len(self._heap) < QUEUE_MAX // 2:
            self._refill()
        now = self._clock.now()
        heap = self._heap
        while heap and heap[0][0] <= now and len(self._active) < CONCURRENT_MAX:
            _, ordinal, delivery = heapq.heappop(heap)
            task = asyncio.create_task(self._send(delivery), name=str(ordinal))
            self._active.add(task)
            task.add_done_callback(self._finished)
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if heap and len(self._active) < CONCURRENT_MAX:
            self._handle = asyncio.get_running_loop().call_later(max(0.001, heap[0][0] - now), self._pump)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._active.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("delivery %s failed", task.get_name(), exc_info=task.exception())
        self._pump()

    async def _send(self, delivery: Delivery) -> None:
        """Send once; then the delivery is over, or due again later."""
        assert self._session is not None
        outgoing = self._render(delivery.event, delivery.endpoint)
        if outgoing is None:
            self._over(delivery)
            return
        self._counts.webhooks["sent"] += 1
        if await self._accepted(self._session, outgoing):
            self._over(delivery)
            return
        self._counts.webhooks["failed"] += 1
        gap = RETRY_GAPS_S[min(delivery.attempt, len(RETRY_GAPS_S) - 1)]
        due = self._clock.now() + gap
        delivery.attempt += 1
        if due > delivery.first + GIVE_UP_S:
            self._over(delivery)
        else:
            self._put(delivery, due)

    async def _accepted(self, session: aiohttp.ClientSession, outgoing: Outgoing) -> bool:
        try:
            async with session.post(outgoing.url, data=outgoing.body, headers=outgoing.headers, allow_redirects=False) as answer:
                await answer.read()
                return 200 <= answer.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _over(self, delivery: Delivery) -> None:
        self._rows.remove(delivery.ordinal)
        self.pending[delivery.event] -= 1
        if self.pending[delivery.event] <= 0:
            del self.pending[delivery.event]
