"""A shard's active worker: takes an epoch, then runs the feed, the cache and the poller under it."""

from __future__ import annotations

import asyncio

import aiohttp

from oncepay.driver import Driver
from oncepay.errors import ShardUnavailable, Unavailable
from oncepay.logs import get_logger
from oncepay.settings import Settings
from oncepay.stripe_client import StripeGateway
from oncepay.tipalti_client import TipaltiClient
from shard.store.batch import Batcher, EpochOver
from shard.store.payouts import PayoutStore
from shard.store.store import Shards
from shard.worker import metrics
from shard.worker.bulk import Bulk
from shard.worker.cache import PendingCache
from shard.worker.errors import FeedHalted, StandDown
from shard.worker.events import EventReader
from shard.worker.feed import Feed
from shard.worker.fill import fill
from shard.worker.forward import Forwarder
from shard.worker.handed import Handed
from shard.worker.lease import Seat
from shard.worker.moved import Moved
from shard.worker.payout_cache import PayoutCache
from shard.worker.payouts import PayoutDesk
from shard.worker.pgoutput import MalformedMessage
from shard.worker.poller import Poller
from shard.worker.resnapshot import Resnapshot
from shard.worker.transactions import Transaction

RETRY_S = 0.5
LEADER_S = 5.0
MEASURE_S = 1.0
BEHIND_S = 120.0
"""A feed that has not moved for so long is no longer ready."""
_FED = "select oncepay.feed_applied($1)"

_log = get_logger("worker")


class Worker:
    """The worker `name` of `shard`."""

    def __init__(
        self, shard: str, name: str, settings: Settings, shards: Shards, stripe: StripeGateway, tipalti: TipaltiClient,
        driver: Driver, reader: EventReader, seat: Seat, http: aiohttp.ClientSession,
    ) -> None:  # fmt: skip
        self.shard = shard
        self.name = name
        self.cache = PendingCache(settings.poll)
        self.payouts = PayoutCache(settings.payouts)
        self.active = False
        self.filled = False
        self.feed: Feed | None = None
        self.forwarder: Forwarder | None = None
        self.resnapshot: Resnapshot | None = None
        self.handed: Handed | None = None
        """Takes the events of this shard, once the cache is filled."""
        self._settings = settings
        self._shards = shards
        self._stripe = stripe
        self._tipalti = tipalti
        self._driver = driver
        self._reader = reader
        self._seat = seat
        self._http = http

    async def run(self) -> None:
        """Be active until canceled. Raises StandDown, in a group, when the seat or the epoch is lost."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._until_lost(), name="seat")
                self._be_active(group, await self._epoch())
        except* EpochOver as group:
            raise StandDown(str(group.exceptions[0])) from group
        finally:
            self._set_active(False)

    async def _epoch(self) -> int:
        """Take the shard over: ends the epoch before, once its transactions are through.

        The leader is waited for before: a write that waits for it goes on when it is canceled, and who lost the seat meanwhile
        would end the turn of the one that has it. Raises StandDown then.
        """
        while True:
            try:
                await self._shards.start()
                await self._shards.leaders.wait(self.shard, LEADER_S)
                if not await self._seat.held():
                    raise StandDown("another worker has the seat")
                epoch = await self._shards.batcher(self.shard).take_epoch(self.name)
            except Unavailable as error:
                _log.info("epoch not taken", error=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                _log.info("epoch taken", epoch=epoch)
                metrics.EPOCH.labels(self.shard).set(epoch)
                return epoch

    def _be_active(self, group: asyncio.TaskGroup, epoch: int) -> None:
        """Start all parts; none returns, and the group ends when one raises. StandDown and EpochOver are the usual ways."""
        batcher = self._shards.batcher(self.shard)
        self.cache = PendingCache(self._settings.poll)
        self.payouts = PayoutCache(self._settings.payouts)
        self.cache.begin_fill()
        self.payouts.begin_fill()
        self.forwarder = Forwarder(self._http, self._settings, self.shard, epoch)
        self.feed = Feed(
            self.shard, self._shards.leaders, self._settings, self.name, epoch, batcher.barrier, batcher.barrier_lost,
            self.forwarder,
            self._changed,
        )  # fmt: skip
        self.resnapshot = Resnapshot(
            self.shard, self.name, epoch, self._settings, self._shards.leaders, self._shards.connect, self._http, self.feed,
            self.forwarder,
        )  # fmt: skip
        self._set_active(True)
        group.create_task(self.feed.run(), name="feed")
        group.create_task(self.forwarder.run(), name="forwarder")
        group.create_task(self.forwarder.remember(lambda: batcher.write(_FED, epoch)), name="fed")
        group.create_task(self._poll(batcher, self.feed), name="poller")
        group.create_task(self.resnapshot.run(), name="resnapshot")
        group.create_task(self._reader.run(), name="events")
        group.create_task(self._measure(self.feed), name="measure")

    def _changed(self, transaction: Transaction) -> None:
        """A certain transaction, from the feed."""
        self.cache.changed_all(transaction.payments)
        self.payouts.changed_all(transaction.payouts)

    async def _until_lost(self) -> None:
        await self._seat.lost()
        raise StandDown("another worker has the seat")

    async def _poll(self, batcher: Batcher, feed: Feed) -> None:
        """Fill the cache, then poll from it. What is moved to or from the shard is loaded and dropped meanwhile."""
        moved = Moved(self.shard, self.cache, self.payouts, feed, self._shards.maps, self._shards.connect)
        while True:
            try:
                await fill(self.cache, self.payouts, feed, self._shards.connect, moved.owned)
                break
            except ShardUnavailable as error:
                _log.info("cache not filled", error=str(error))
                self.cache.begin_fill()
                self.payouts.begin_fill()
                await asyncio.sleep(RETRY_S)
        self.filled = True
        bulk = Bulk(self._stripe, self.cache, self.shard, self._settings.poll.first_s)
        self.handed = Handed(self.shard, self._shards, self._driver, self.cache, bulk)
        desk = PayoutDesk(self.shard, self.payouts, PayoutStore(self._shards, self.name), self._tipalti, self._owns)
        poller = Poller(self.shard, self.cache, self._shards, self._driver, bulk, self._owns)
        async with asyncio.TaskGroup() as group:
            group.create_task(poller.run(), name="payments")
            group.create_task(desk.run(), name="payouts")
            group.create_task(moved.run(), name="moved")

    def _owns(self, slot: int) -> bool:
        """Whether the shard owns the slot, by the map as it is known here."""
        return self._shards.maps.current.range_of(slot).shard == self.shard

    async def _measure(self, feed: Feed) -> None:
        while True:
            feed.measure()
            for status, count in self.cache.counts.items():
                metrics.PENDING.labels(self.shard, status.value).set(count)
            await asyncio.sleep(MEASURE_S)

    def _set_active(self, active: bool) -> None:
        self.active = active
        self.filled = False
        metrics.ACTIVE.labels(self.shard).set(active)
        if not active:
            self.feed = self.forwarder = self.resnapshot = self.handed = None

    # Health

    @property
    def problem(self) -> str:
        """Why the feed doesn't move; empty when it does."""
        parts = (self.feed, self.forwarder)
        return next((str(part.problem) for part in parts if part is not None and part.problem is not None), "")

    async def check_feed(self) -> None:
        """Raises what an operator has to know: the feed is halted, or can't read the shard."""
        if self.feed is None or self.forwarder is None:
            return
        for problem in (self.feed.problem, self.forwarder.problem):
            if isinstance(problem, FeedHalted | MalformedMessage):
                raise problem
        if self.feed.problem is not None:
            raise self.feed.problem

    async def check_cache(self) -> None:
        """Raises Unavailable while the active worker has not filled its cache."""
        if self.active and not self.filled:
            raise Unavailable("the pending cache is being filled")
