"""Forwarding certain transactions to the aggregator, in order, each once; the slot is confirmed behind it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import msgspec

from oncepay.errors import OncepayError
from oncepay.feed import FEED_ROWS_MAX, FeedAnswer, FeedBatch, FeedPosition, encode_batch, lsn_text
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.store.batch import EpochOver
from shard.worker import metrics
from shard.worker.errors import FeedDown, FeedHalted, StandDown
from shard.worker.stream import Stream
from shard.worker.transactions import Transaction

QUEUE_BYTES_MAX = 32 << 20
"""Certain transactions that wait for the aggregator. While it takes batches, reading stops beyond this; while it takes
none, all are let go of and read again from the slot later."""
BATCH_BYTES_MAX = 8 << 20
POST_S = 30.0
RETRY_S, RETRY_MAX_S = 0.2, 5.0
RECHECK_S = 5.0
"""How often a halted feed looks whether an operator has acted."""
KEEP_AGAIN_S = 5.0
"""How long after a failure the shard is asked again to keep that its feed was applied."""

T = TypeVar("T")
_log = get_logger("feed")


class Forwarder:
    """The queue to the aggregator. `watermark` is the position up to which the aggregator has applied this shard's feed.

    It posts only batches that begin at the watermark, and confirms the slot only to where the aggregator has applied.
    """

    def __init__(self, http: aiohttp.ClientSession, settings: Settings, shard: str, epoch: int) -> None:
        self.watermark: int | None = None
        self.problem: FeedDown | FeedHalted | None = FeedDown("the aggregator has not answered yet")
        """Why nothing is forwarded now."""
        self.reread = asyncio.Event()
        """Set when what comes next has to be read again from the slot."""
        self._http = http
        self._url = f"{settings.aggregator_url.rstrip('/')}/v1/feed"
        self._headers = {"Authorization": f"Bearer {settings.internal_token}"} if settings.internal_token else {}
        self._shard = shard
        self._epoch = epoch
        self._stream: Stream | None = None
        self._located = False
        self._applied = asyncio.Event()
        """The aggregator has had something of the shard's feed."""
        self._queue: deque[Transaction] = deque()
        self._queue_bytes = 0
        self._certain_lsn = 0
        self._dropped_lsn = 0
        self._dropped_ms: int | None = None
        self._work = asyncio.Event()
        self._space = asyncio.Event()
        self._turn = asyncio.Lock()
        self._again = asyncio.Event()

    def connected(self, stream: Stream) -> None:
        """A new stream: what waited from the one before comes again."""
        self._stream = stream
        self._located = False
        self._clear()
        self._certain_lsn = self._dropped_lsn = 0
        self._dropped_ms = None
        self.reread.clear()
        self._work.set()

    def offer(self, transactions: Sequence[Transaction], certain_lsn: int) -> None:
        """Certain transactions, in commit order; all before `certain_lsn` have been offered now."""
        self._certain_lsn = max(self._certain_lsn, certain_lsn)
        for transaction in transactions:
            if transaction.rows and transaction.end_lsn > (self.watermark or 0):
                self._queue.append(transaction)
                self._queue_bytes += transaction.size_bytes
        if self._queue_bytes > QUEUE_BYTES_MAX and self.problem is not None:
            self._dropped_lsn = self._queue[-1].end_lsn
            self._dropped_ms = self._dropped_ms or self._queue[0].committed_at_ms
            self._clear()
            self._located = False
        self._work.set()

    @property
    def has_space(self) -> bool:
        """Whether another transaction may be offered."""
        return self._queue_bytes <= QUEUE_BYTES_MAX or self.problem is not None

    async def space(self) -> None:
        """Return when another transaction may be offered."""
        while not self.has_space:
            self._space.clear()
            await self._space.wait()

    @property
    def oldest_ms(self) -> int | None:
        """When the oldest change that the aggregator still lacks was committed, of those that came this far."""
        return self._dropped_ms or (self._queue[0].committed_at_ms if self._queue else None)

    async def run(self) -> None:
        """Forward until canceled. Raises StandDown when the aggregator knows a later epoch."""
        pause_s = RETRY_S
        while True:
            await self._wait_for_work()
            try:
                async with self._turn:
                    if not self._located:
                        await self._locate()
                    await self._forward()
                    self._set_problem(None)
                pause_s = RETRY_S
            except FeedHalted as problem:
                self._set_problem(problem)
                await self._pause(RECHECK_S)
            except FeedDown as problem:
                self._set_problem(problem)
                await self._pause(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def remember(self, keep: Callable[[], Awaitable[object]]) -> None:
        """Have the shard keep, by `keep`, that its feed was applied, as soon as that is so: a later worker's feed then doesn't
        begin anew beside an aggregator that has lost everything. Raises EpochOver.
        """
        await self._applied.wait()
        while True:
            try:
                await keep()
                return
            except EpochOver:
                raise
            except OncepayError as error:
                _log.warning("the shard doesn't know yet that its feed was applied", problem=str(error))
            await asyncio.sleep(KEEP_AGAIN_S)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nothing is forwarded and the slot stands still meanwhile; afterwards the aggregator is asked where it is."""
        async with self._turn:
            self._set_problem(FeedDown("what the aggregator derives from the shard is being rebuilt"))
            try:
                yield
            finally:
                self._located = False
                self._work.set()
                self._again.set()

    async def _pause(self, seconds: float) -> None:
        """Wait, at most until a rebuild has ended."""
        self._again.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._again.wait()

    async def _wait_for_work(self) -> None:
        while self._stream is None or self.reread.is_set() or (self._located and self._certain_lsn <= (self.watermark or 0)):
            self._work.clear()
            await self._work.wait()

    def _set_problem(self, problem: FeedDown | FeedHalted | None) -> None:
        if type(problem) is not type(self.problem) or (problem and str(problem) != str(self.problem)):
            level = "error" if isinstance(problem, FeedHalted) else "warning" if problem else "info"
            getattr(_log, level)("feed does not move" if problem else "feed moves", problem=str(problem or ""))
        self.problem = problem
        metrics.HALTED.labels(self._shard).set(isinstance(problem, FeedHalted))
        self._space.set()

    # Where the aggregator is

    async def _locate(self) -> None:
        """Ask the aggregator how far it is, and check that the slot doesn't begin past that."""
        stream = self._stream
        assert stream is not None
        answer = await self._call("GET", f"{self._url}/{self._shard}", None)
        position = _read(answer, FeedPosition)
        if stream is not self._stream:
            return
        if position.epoch > self._epoch:
            raise StandDown(f"epoch {self._epoch} is over: the aggregator knows {position.epoch}")
        self._move_to(self._checked(position, stream))
        if self._dropped_lsn > (self.watermark or 0):
            self.reread.set()
            return
        self._located = True

    def _checked(self, position: FeedPosition, stream: Stream) -> int:
        """The watermark to go on from; FeedHalted when what is between it and the stream's start can't come any more."""
        if position.watermark is None:
            if self._applied.is_set() or stream.fed:
                raise FeedHalted("the aggregator has lost what it had applied: run `oncepay shards resnapshot`")
            return stream.start_lsn  # the first batch begins where the slot does
        self._applied.set()
        if position.incarnation != stream.incarnation:
            raise FeedHalted(
                f"the aggregator follows history {position.incarnation}, the shard is {stream.incarnation}:"
                " run `oncepay shards resnapshot`"
            )
        if position.watermark < stream.start_lsn:
            raise FeedHalted(
                f"the slot at {lsn_text(stream.start_lsn)} jumped ahead of the aggregator at"
                f" {lsn_text(position.watermark)}: run `oncepay shards resnapshot`"
            )
        if position.watermark < (self.watermark or 0):
            self.watermark = position.watermark  # it was restored, and the slot still has what it lost
            self.reread.set()
            raise FeedDown(f"the aggregator went back to {lsn_text(position.watermark)}")
        if position.watermark > max(stream.log_end_lsn, stream.connection.server_lsn):
            self.reread.set()
            raise FeedDown(f"the shard's log ends before the aggregator's position {lsn_text(position.watermark)}")
        return position.watermark

    def _move_to(self, watermark: int) -> None:
        """The aggregator is at `watermark`: forget what it has, and let the slot forget it too."""
        self.watermark = watermark
        while self._queue and self._queue[0].end_lsn <= watermark:
            self._queue_bytes -= self._queue.popleft().size_bytes
        if self._stream is not None:
            self._stream.connection.confirm(watermark)
        self._space.set()

    # Batches

    async def _forward(self) -> None:
        """Post one batch, if there is something to post, and take the answer in."""
        stream, start = self._stream, self.watermark
        if not self._located:
            return  # another stream came while the aggregator was asked: its slot may begin past the watermark
        if stream is None or start is None or self.reread.is_set() or self._certain_lsn <= start:
            return
        batch, rows = self._batch(stream, start)
        answer = _read(await self._call("POST", self._url, encode_batch(batch)), FeedAnswer)
        metrics.BATCHES.labels(self._shard, answer.reason or "applied").inc()
        if answer.applied:
            self._applied.set()
            metrics.FORWARDED.labels(self._shard).inc(rows)
            self._move_to(batch.to_lsn)
            return
        _log.warning("batch not applied", reason=answer.reason, start=start, at=answer.watermark, epoch=answer.epoch)
        if answer.epoch > self._epoch:
            raise StandDown(f"epoch {self._epoch} is over: the aggregator knows {answer.epoch}")
        self._located = False  # a batch whose answer was lost, or another history: ask again, and check

    def _batch(self, stream: Stream, start: int) -> tuple[FeedBatch, int]:
        """The next batch and its number of rows. It ends with a whole transaction, or at the last certain barrier."""
        taken: list[Transaction] = []
        rows = size_bytes = 0
        for transaction in self._queue:
            if rows >= FEED_ROWS_MAX or size_bytes >= BATCH_BYTES_MAX:
                break
            taken.append(transaction)
            rows += transaction.rows
            size_bytes += transaction.size_bytes
        to_lsn = self._certain_lsn if len(taken) == len(self._queue) else taken[-1].end_lsn
        batch = FeedBatch(
            shard=self._shard,
            incarnation=stream.incarnation,
            epoch=self._epoch,
            from_lsn=start,
            to_lsn=to_lsn,
            payments=tuple(row for transaction in taken for row in transaction.payments),
            entries=tuple(row for transaction in taken for row in transaction.entries),
            links=tuple(row for transaction in taken for row in transaction.links),
            payouts=tuple(row for transaction in taken for row in transaction.payouts),
        )
        return batch, rows

    async def _call(self, method: str, url: str, body: bytes | None) -> bytes:
        headers = self._headers | {"Content-Type": "application/msgpack"} if body is not None else self._headers
        try:
            timeout = aiohttp.ClientTimeout(total=POST_S)
            async with self._http.request(method, url, data=body, headers=headers, timeout=timeout) as response:
                answer = await response.read()
                if response.status != 200:
                    raise FeedDown(f"the aggregator answered {response.status}: {answer[:200]!r}")
                return answer
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise FeedDown(f"the aggregator can't be reached: {error!r}") from error

    def _clear(self) -> None:
        self._queue.clear()
        self._queue_bytes = 0
        self._space.set()


def _read(answer: bytes, kind: type[T]) -> T:
    """Raises FeedDown for what no aggregator says, such as the page of a load balancer."""
    try:
        return msgspec.json.decode(answer, type=kind)
    except msgspec.DecodeError as error:
        raise FeedDown(f"this is not the aggregator's answer ({error}): {answer[:200]!r}") from error


def lag_s(oldest_ms: int | None) -> float:
    """Seconds since `oldest_ms`; 0 when there is nothing."""
    return max(0.0, time.time() - oldest_ms / 1000) if oldest_ms else 0.0
