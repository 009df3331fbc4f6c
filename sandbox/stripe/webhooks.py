"""Signed delivery of events to webhook endpoints, with retries, as Stripe does it.

A delivery is a row from the transaction of its event until an endpoint answers 2xx or three days of the clock have
passed, so it survives a restart. No order is promised, and what was sent before a crash may be sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import hmac
import logging
from collections import Counter
from collections.abc import Callable

import aiohttp
import msgspec

from sandbox.store import KeyedRows, Table
from sandbox.stripe import model
from sandbox.stripe.forms import JsonObject
from sandbox.stripe.world import World

log = logging.getLogger("sandbox.webhooks")

CONCURRENT_MAX = 32
"""Deliveries under way at once; the others wait in their order."""
QUEUE_MAX = 50_000
"""Deliveries kept in memory; beyond it they wait in SQLite until the queue has drained by half."""
TIMEOUT_S = 20.0
RETRY_GAPS_S = (1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0, 21_600.0)
"""Seconds to the next try after the first, second, … failure; the last one repeats."""
GIVE_UP_S = 3 * 86_400.0
REORDER_S = (0.2, 1.5)
"""How much later a webhook comes that a fault reorders."""

_encode = msgspec.json.Encoder().encode


class Delivery(msgspec.Struct):
    """One event on its way to one endpoint. Times are the clock's."""

    ordinal: int
    event: str
    endpoint: str
    attempt: int
    first: float


def signature(secrets: list[str], timestamp: int, body: bytes) -> str:
    """The Stripe-Signature header: one v1 for each secret that signs now."""
    signed = str(timestamp).encode() + b"." + body
    parts = [f"t={timestamp}"]
    parts += ["v1=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets]
    return ",".join(parts)


class Webhooks:
    """All deliveries of the account. `show` renders an event."""

    def __init__(self, world: World, show: Callable[[model.Event], JsonObject]) -> None:
        self._world = world
        self._show = show
        self._rows = KeyedRows(world.store, "deliveries", ("ord", "event", "endpoint", "attempt", "due", "first"))
        self._heap: list[tuple[float, int, Delivery]] = []
        self._overflow = False
        self._active: set[asyncio.Task[None]] = set()
        self._handle: asyncio.TimerHandle | None = None
        self._session: aiohttp.ClientSession | None = None
        self._events: Table[model.Event] | None = None
        self.pending: Counter[str] = Counter()
        """Deliveries not yet answered 2xx, by event."""
        newest = world.store.connection.execute("SELECT max(ord) FROM deliveries").fetchone()[0]
        self._next = (newest or 0) + 1
        self._matches: dict[str, list[str]] = {}
        world.clock.on_advance(self._pump)

    def load_events(self, events: Table[model.Event]) -> None:
        """Where the events are kept; waiting deliveries are loaded."""
        self._events = events
        for event, count in self._world.store.query("SELECT event, count(*) FROM deliveries GROUP BY event"):
            self.pending[event] = count
        self._refill()

    def start(self) -> None:
        """Begin to send; needs the running loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONCURRENT_MAX, keepalive_timeout=60.0, ssl=False),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
                "Content-Type": "application/json; charset=utf-8",
            },
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

    def endpoints_changed(self) -> None:
        """An endpoint was made, changed or deleted."""
        self._matches.clear()

    def wanted(self, type_: str) -> list[str]:
        """The ids of the endpoints that get events of that type."""
        found = self._matches.get(type_)
        if found is None:
            rows = self._world.endpoints.page(1_000)
            found = [
                row.id for row in rows if row.status == "enabled" and ("*" in row.enabled_events or type_ in row.enabled_events)
            ]
            self._matches[type_] = found
        return found

    def enqueue(self, event: model.Event, *, lossless: bool = False) -> None:
        """Send `event` to every endpoint that wants it, subject to the faults (`lossless`: not to loss)."""
        faults = self._world.faults
        now = self._world.clock.now()
        for endpoint in self.wanted(event.type):
            if not lossless and faults.hits("webhook_lost", "delivery"):
                self._world.counts.webhooks["lost"] += 1
                continue
            due = now + faults.between("webhook_delay_s", "delivery")
            if faults.hits("webhook_reordered", "delivery"):
                low, high = REORDER_S
                due += low + (high - low) * faults.fraction("webhook_reordering", "delivery")
            delivery = Delivery(self._next, event.id, endpoint, 0, now)
            self._next += 1
            self.pending[event.id] += 1
            self._put(delivery, due)
        self._world.store.after_commit(self._pump)

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
        rows = self._world.store.query(
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
        now = self._world.clock.now()
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
        assert self._events is not None
        event = self._events.get(delivery.event)
        endpoint = self._world.endpoints.get(delivery.endpoint)
        if event is None or endpoint is None or endpoint.status != "enabled":
            self._over(delivery)
            return
        url = endpoint.url
        body = _encode(self._show(event))
        headers = {"Stripe-Signature": signature(self._signing(endpoint), self._world.now_s(), body)}
        self._world.counts.webhooks["sent"] += 1
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                await answer.read()
                done = 200 <= answer.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            done = False
        if done:
            self._over(delivery)
            return
        self._world.counts.webhooks["failed"] += 1
        gap = RETRY_GAPS_S[min(delivery.attempt, len(RETRY_GAPS_S) - 1)]
        due = self._world.clock.now() + gap
        delivery.attempt += 1
        if due > delivery.first + GIVE_UP_S:
            self._over(delivery)
        else:
            self._put(delivery, due)

    def _signing(self, endpoint: model.WebhookEndpoint) -> list[str]:
        return endpoint.secrets if self._world.clock.now() < endpoint.rolled_until else endpoint.secrets[:1]

    def _over(self, delivery: Delivery) -> None:
        self._rows.remove(delivery.ordinal)
        self.pending[delivery.event] -= 1
        if self.pending[delivery.event] <= 0:
            del self.pending[delivery.event]
