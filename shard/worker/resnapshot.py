"""`oncepay shards resnapshot`: rebuilds what the aggregator derives from this shard, out of its tables, while payments go on.

The order makes it exact. The forwarder stands still, so the slot is not confirmed past what the aggregator has. Then the
tables are frozen at a position of the log and sent whole; then a barrier passes the feed on the same leader, so that what
was read is on the quorum; only then the aggregator commits. It is at that position then, and the feed, which begins
before it, goes on from there. No range leaves the shard meanwhile: what its new owner brought would be replaced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

import aiohttp
import msgspec

from oncepay.errors import OncepayError, ShardUnavailable
from oncepay.feed import REBUILD_END, FeedPosition, framed, lsn_text
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.worker import metrics
from shard.worker.errors import FeedDown, StandDown
from shard.worker.feed import Feed
from shard.worker.forward import Forwarder
from shard.worker.snapshot import Connect, Snapshot, no_range_leaves, open_snapshot
from shard.worker.stream import LeaderView

LEADER_S = 10.0
FENCE_S = 120.0
"""How long the barrier after the last row may take: the feed may have to connect first, and to read what its slot holds."""
ANSWER_S = 7_200.0
"""How long the aggregator may take after it has all rows."""

_log = get_logger("resnapshot")

State = Literal["idle", "running", "done", "failed"]


class Progress(msgspec.Struct):
    """How far a rebuild is. `expected` rows is an estimate; `position` is where the aggregator goes on, in the end."""

    state: State = "idle"
    run: int = 0
    rows: int = 0
    expected: int = 0
    position: str = ""
    problem: str = ""
    seconds: float = 0.0


class Resnapshot:
    """One worker's rebuilds, one at a time, for as long as it holds `epoch`."""

    def __init__(
        self, shard: str, name: str, epoch: int, settings: Settings, leaders: LeaderView, connect: Connect,
        http: aiohttp.ClientSession, feed: Feed, forwarder: Forwarder,
    ) -> None:  # fmt: skip
        self.progress = Progress()
        self._shard = shard
        self._name = name
        self._epoch = epoch
        self._settings = settings
        self._leaders = leaders
        self._connect = connect
        self._http = http
        self._feed = feed
        self._forwarder = forwarder
        self._asked = asyncio.Event()

    def ask(self) -> Progress:
        """Begin, unless one is running."""
        if self.progress.state != "running":
            self.progress = Progress("running", self.progress.run + 1)
            self._asked.set()
        return self.progress

    async def run(self) -> None:
        """Do what is asked for, until canceled. Raises StandDown when the epoch is over."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            progress, began_s = self.progress, time.monotonic()
            try:
                await self.rebuild()
                progress.state = "done"
            except StandDown:
                raise
            except (OncepayError, TimeoutError) as error:
                progress.state, progress.problem = "failed", str(error) or repr(error)
                _log.warning("rebuild failed", problem=progress.problem)
            progress.seconds = time.monotonic() - began_s
            metrics.REBUILDS.labels(self._shard, progress.state).inc()

    async def rebuild(self) -> int:
        """Rebuild once; the position from which the feed goes on. Raises what stood in the way: nothing has changed then."""
        async with self._forwarder.held():
            node = await self._leaders.wait(self._shard, LEADER_S)
            settings, name = self._settings, f"{self._name} rebuild"
            async with (
                no_range_leaves(node, self._connect) as still,
                open_snapshot(self._shard, node, settings, name, self._epoch, self._connect) as snapshot,
            ):
                self.progress.expected = snapshot.expected
                position = await self._post(self._body(snapshot, still))
        _log.info("rebuilt", rows=self.progress.rows, lsn=lsn_text(position))
        self.progress.position = lsn_text(position)
        return position

    async def _body(self, snapshot: Snapshot, still: Callable[[], Awaitable[None]]) -> AsyncIterator[bytes]:
        async for part in snapshot.parts():
            yield framed(part.frame)
            self.progress.rows += part.rows
        await snapshot.close()
        async with asyncio.timeout(FENCE_S):
            place = await self._feed.fence()
            await still()
        if (place.host, place.port, place.timeline) != (snapshot.node.host, snapshot.node.port, snapshot.timeline):
            raise ShardUnavailable("the leader changed while the tables were read: run it again")
        yield REBUILD_END

    async def _post(self, body: AsyncIterator[bytes]) -> int:
        settings = self._settings
        url = f"{settings.aggregator_url.rstrip('/')}/v1/feed/{self._shard}/rebuild"
        headers = {"Content-Type": "application/octet-stream"}
        if settings.internal_token:
            headers["Authorization"] = f"Bearer {settings.internal_token}"
        failed: list[Exception] = []

        async def watched() -> AsyncIterator[bytes]:
            """What goes wrong while the body is made would else be told as a broken connection."""
            try:
                async for part in body:
                    yield part
            except Exception as error:
                failed.append(error)
                raise

        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_read=ANSWER_S)
            async with self._http.post(url, data=watched(), headers=headers, timeout=timeout) as response:
                answer = await response.read()
                if response.status != 200:
                    raise FeedDown(f"the aggregator answered {response.status}: {answer[:300]!r}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if failed:
                raise failed[0] from error
            raise FeedDown(f"the aggregator can't be reached: {error!r}") from error
        try:
            watermark = msgspec.json.decode(answer, type=FeedPosition).watermark
        except msgspec.DecodeError:
            watermark = None
        if watermark is None:
            raise FeedDown(f"this is not the aggregator's answer: {answer[:300]!r}")
        return watermark
