"""The change feed: follows the shard's leader, makes what it reads certain by barriers, hands it on in commit order.

Two takers: `on_certain` (the pending cache) gets every certain transaction once; the forwarder gets those too, for the
aggregator. While the aggregator is away the cache goes on.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from oncepay.errors import OncepayError
from oncepay.feed import lsn_text
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.store.batch import HURRY
from shard.worker import metrics
from shard.worker.ahead import AHEAD_BYTES, look_ahead
from shard.worker.errors import FeedDown, StandDown, WrongNode
from shard.worker.forward import Forwarder, lag_s
from shard.worker.pgoutput import MalformedMessage
from shard.worker.replication import ReplicationClosed
from shard.worker.sieve import Sieve
from shard.worker.stream import LeaderView, Stream, open_stream
from shard.worker.transactions import Assembler, Transaction

BARRIER_GAP_S = 0.25
"""The least time from one barrier's start to the next: what the aggregator gets comes in so many pieces a second."""
IDLE_BARRIER_S = 10.0
"""How often a barrier moves the slot when no row changes, if others wrote anything at all."""
IDLE_LOG_BYTES = 64 << 10
SEEN_S = 5.0
"""A barrier whose nonce didn't come back in a stream that was silent for so long is given up."""
RETRY_S, RETRY_MAX_S = 0.1, 2.0
LEADER_S = 10.0

_log = get_logger("feed")


class Place(NamedTuple):
    """Which leader's log something was read from."""

    host: str
    port: int
    timeline: int


class Feed:
    """One shard's feed, for as long as its worker holds `epoch`."""

    def __init__(
        self,
        shard: str,
        leaders: LeaderView,
        settings: Settings,
        name: str,
        epoch: int,
        barrier: Callable[[str], Awaitable[None]],
        barrier_lost: asyncio.Event,
        forwarder: Forwarder,
        on_certain: Callable[[Transaction], None],
    ) -> None:
        self.problem: OncepayError | None = FeedDown("the feed is not connected yet")
        """Why nothing is read now."""
        self.certain_lsn = 0
        """All transactions up to here went to `on_certain`; it outlives connections and failovers."""
        self._shard = shard
        self._leaders = leaders
        self._settings = settings
        self._name = name
        self._epoch = epoch
        self._barrier = barrier
        self._barrier_lost = barrier_lost
        self._forwarder = forwarder
        self._on_certain = on_certain
        self._sieve = Sieve()
        self._stream: Stream | None = None
        self._incarnation = ""
        self._wanted = asyncio.Event()
        self._free = asyncio.Event()
        self._read_at = 0.0
        self._fences: list[asyncio.Future[Place]] = []
        self._fenced = False
        """A fence was passed: from there on somebody relies on every change."""
        self._commit: asyncio.Future[None] | None = None
        leaders.on_change(self._leader_changed)

    async def run(self) -> None:
        """Follow the leader until canceled. Raises StandDown when the epoch is over, or `on_certain` has missed something."""
        pause_s = RETRY_S
        while True:
            began_s = time.monotonic()
            try:
                node = await self._leaders.wait(self._shard, LEADER_S)
                stream = await open_stream(node, self._settings, self._name, self._epoch)
            except StandDown:
                raise
            except OncepayError as error:
                self._set_problem(error)
            else:
                self._set_problem(await self._follow(stream))
            if time.monotonic() - began_s > RETRY_MAX_S:
                pause_s = RETRY_S
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def fence(self) -> Place:
        """Return when every change that was committed before this call has been handed to `on_certain`, and where."""
        fence: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._fences.append(fence)
        self._wanted.set()
        return await fence

    def measure(self) -> None:
        """Set the gauges of the lag."""
        held_ms, queued_ms = self._sieve.oldest_ms if self._sieve.held_rows else None, self._forwarder.oldest_ms
        metrics.LAG_SECONDS.labels(self._shard).set(lag_s(queued_ms or held_ms))
        if self._stream is not None and self._forwarder.watermark is not None:
            behind = max(0, self._stream.connection.server_lsn - self._forwarder.watermark)
            metrics.LAG_BYTES.labels(self._shard).set(behind)

    def _set_problem(self, problem: OncepayError | None) -> None:
        if problem is not None and str(problem) != str(self.problem):
            outcome = getattr(problem, "slug", "error")
            metrics.CONNECTS.labels(self._shard, outcome).inc()
            log = _log.error if isinstance(problem, MalformedMessage) else _log.info
            log("feed not connected", reason=outcome, problem=str(problem))
        self.problem = problem

    def _leader_changed(self, shard: str) -> None:
        """A deposed leader keeps its sockets open: leave it at once."""
        stream = self._stream
        if shard == self._shard and stream is not None and self._leaders.current(shard) != stream.node:
            stream.connection.close()

    # One connection

    async def _follow(self, stream: Stream) -> OncepayError | None:
        """Read until the connection ends, or has to. Returns why, None when it is to be opened again at once."""
        if self._incarnation not in ("", stream.incarnation):
            stream.connection.close()
            raise StandDown(f"the shard's history is {stream.incarnation} now: what is known of {self._incarnation} is void")
        self._incarnation = stream.incarnation
        if stream.timeline < self._sieve.certain_timeline:
            stream.connection.close()
            return WrongNode(f"{stream.node.name} is on timeline {stream.timeline}, {self._sieve.certain_timeline} is known")
        if self._fenced and stream.start_lsn > self.certain_lsn:
            # The slot is confirmed to the aggregator's position alone. That is never past the first fence's barrier, but by what
            # this feed has delivered: so this is another slot, which was made later.
            stream.connection.close()
            at, known = lsn_text(stream.start_lsn), lsn_text(self.certain_lsn)
            raise StandDown(f"the slot begins at {at} now, what is known ends at {known}: all is to be read anew")
        self._sieve.connected(stream.timeline)
        self._forwarder.connected(stream)
        self._stream = stream
        await self._look_ahead(stream)
        self._set_problem(None)
        metrics.CONNECTS.labels(self._shard, "open").inc()
        if self._leaders.current(self._shard) not in (None, stream.node):
            stream.connection.close()
        self._barrier_lost.clear()
        self._wanted.set()  # one barrier at once, so that there is a session whose end would be seen
        tasks = [
            asyncio.create_task(self._read(stream), name="feed-read"),
            asyncio.create_task(self._leave_a_closing_node(), name="feed-leave"),
            asyncio.create_task(self._barriers(stream), name="feed-barriers"),
            asyncio.create_task(self._forwarder.reread.wait(), name="feed-reread"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stream = None
            stream.connection.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            error = task.exception()
            if isinstance(error, ReplicationClosed | MalformedMessage):
                return error
            if error is not None:
                raise error
        return None

    async def _look_ahead(self, stream: Stream) -> None:
        """Make a large backlog certain before it is read. Without that all is read once more, and nothing else changes."""
        if stream.log_end_lsn - max(stream.start_lsn, self._sieve.certain_lsn) < AHEAD_BYTES:
            return
        try:
            found = await look_ahead(stream.node, self._settings, self._name, self._epoch, self._barrier)
        except BaseException:
            stream.connection.close()
            raise
        if found is not None and found.timeline == stream.timeline:
            self._sieve.proved(found.lsn)

    async def _leave_a_closing_node(self) -> None:
        """Return when the barrier's session has ended.

        A node that shuts down waits for its walsenders until they have confirmed everything, and keeps them alive. What
        no barrier has made certain is never confirmed, so a planned change of leader would wait for ever.
        """
        await self._barrier_lost.wait()

    async def _read(self, stream: Stream) -> None:
        """Take messages in; reading stops while the forwarder has too much."""
        assembler = Assembler()
        while True:
            for payload in await stream.connection.read():
                transaction = assembler.feed(payload)
                if transaction is not None:
                    if any(nonce.endswith(HURRY) for nonce in transaction.nonces):
                        self._wanted.set()  # somebody waits for the aggregator to be so far, though no row has changed
                    self._deliver(self._sieve.add(transaction))
            self._read_at = time.monotonic()
            self._after_change()
            await self._forwarder.space()

    def _deliver(self, transactions: list[Transaction]) -> None:
        """Hand certain transactions on. The cache gets none twice; the forwarder sorts that out by its watermark."""
        for transaction in transactions:
            if transaction.end_lsn > self.certain_lsn:
                self.certain_lsn = transaction.end_lsn
                self._on_certain(transaction)
        if transactions:
            self._forwarder.offer(transactions, transactions[-1].end_lsn)

    def _after_change(self) -> None:
        if self._sieve.held_rows or self._sieve.dropped:
            self._wanted.set()
        if not self._sieve.waits:
            self._free.set()

    # Barriers

    async def _barriers(self, stream: Stream) -> None:
        """One barrier after the other: soon when a row waits for it, now and then when only the log grew."""
        self._after_change()
        while True:
            try:
                async with asyncio.timeout(IDLE_BARRIER_S):  # wait_for can lose a cancel that comes when it is done
                    await self._wanted.wait()
            except TimeoutError:
                grown = stream.connection.server_lsn - max(self._sieve.certain_lsn, stream.start_lsn)
                if not self._sieve.foreign and grown < IDLE_LOG_BYTES:
                    continue
            began_s = time.monotonic()
            self._wanted.clear()
            fences, self._fences = self._fences, []
            certain = False
            try:
                certain = await self._one_barrier()
            finally:
                if not certain:
                    self._fences = fences + self._fences
            if certain:
                if self._sieve.dropped:
                    self._fences = fences + self._fences
                    self._forwarder.reread.set()  # what was let go of is certain now: read it again
                    return
                for fence in fences:
                    if not fence.done():
                        self._fenced = True
                        fence.set_result(Place(stream.node.host, stream.node.port, stream.timeline))
            if self._fences or self._sieve.held_rows or self._sieve.dropped:
                self._wanted.set()
            await asyncio.sleep(max(0.0, began_s + BARRIER_GAP_S - time.monotonic()))

    async def _one_barrier(self) -> bool:
        """Commit a barrier and wait until it is certain; False when it proved nothing."""
        nonce = f"{self._name}:{self._epoch}:{uuid.uuid4().hex}"
        began_s = time.monotonic()
        self._sieve.begun(nonce)
        self._commit = asyncio.ensure_future(self._barrier(nonce))
        try:
            await asyncio.shield(self._commit)  # a commit in flight is never canceled
        except OncepayError as error:
            self._sieve.failed(nonce)
            metrics.BARRIERS.labels(self._shard, error.slug).inc()
            _log.info("barrier failed", problem=str(error))
            await asyncio.sleep(RETRY_S)
            return False
        self._deliver(self._sieve.acknowledged(nonce))
        while self._sieve.waits:
            self._free.clear()
            try:
                async with asyncio.timeout(SEEN_S):
                    await self._free.wait()
            except TimeoutError:
                if self._sieve.waits and time.monotonic() - self._read_at > SEEN_S and self._forwarder.has_space:
                    self._sieve.failed(nonce)
                    metrics.BARRIERS.labels(self._shard, "not-seen").inc()
                    _log.warning("barrier not seen in the stream", nonce=nonce)
                    return False
        metrics.BARRIERS.labels(self._shard, "certain").inc()
        metrics.BARRIER_SECONDS.labels(self._shard).observe(time.monotonic() - began_s)
        return True
