"""The poller: looks after every open payment until it is settled, whoever started it and whatever became of them.

A payment is due some time after its last change (a router that lives has driven it on by then), then with growing gaps.
Lists are asked first; what they leave open is driven on singly, which looks at Stripe before it does anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from oncepay.breaker import Breaker
from oncepay.errors import OncepayError, StripeUnavailable
from oncepay.keys import slot
from oncepay.logs import get_logger
from oncepay.payment import IntentView, Payment, Status
from oncepay.stripe_client import StripeStored
from shard.store.batch import EpochOver
from shard.worker import metrics
from shard.worker.bulk import Bulk
from shard.worker.cache import Pending, PendingCache
from shard.worker.errors import StandDown

IN_FLIGHT_MAX = 256
"""Payments that are taken up at once; the others stay due."""
CONCURRENCY = 24
"""Payments that are driven at once."""
IDLE_S = 0.5
"""How late a look may be noticed to be due."""
NOT_GIVEN_UP = frozenset({Status.PROCESSING, Status.REQUIRES_CAPTURE, Status.CANCELING, Status.SUCCEEDED})
"""In these the payment's time being over changes nothing."""

_log = get_logger("poller")


class Drives(Protocol):
    """What the poller needs of `oncepay.driver.Driver`."""

    async def drive(self, payment: Payment) -> Payment: ...

    async def drive_on(self, key: str) -> Payment | None: ...

    async def see(self, payment: Payment, view: IntentView, event: str) -> Payment: ...


class Reads(Protocol):
    """What the poller needs of the store."""

    async def get(self, key: str) -> Payment | None: ...


class Poller:
    """Polls the payments of one shard's cache. `owns` tells whether a slot is (still) the shard's."""

    def __init__(
        self, shard: str, cache: PendingCache, store: Reads, driver: Drives, bulk: Bulk, owns: Callable[[int], bool]
    ) -> None:
        self.breaker = Breaker()
        self._shard = shard
        self._cache = cache
        self._store = store
        self._driver = driver
        self._bulk = bulk
        self._owns = owns
        self._places = asyncio.Semaphore(CONCURRENCY)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Poll until canceled. Raises StandDown when the worker's epoch is over."""
        try:
            while not self._over.done():
                taken = self._take()
                metrics.CIRCUIT_OPEN.labels(self._shard).set(self.breaker.open)
                if taken:
                    await self._look_after(taken)
                else:
                    await asyncio.wait({self._over}, timeout=self._pause_s())
            self._over.result()
        finally:
            for task in list(self._tasks.values()):
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _pause_s(self) -> float:
        due_s = self._cache.next_due_s()
        return IDLE_S if due_s is None else min(IDLE_S, max(0.02, due_s - time.time()))

    def _take(self) -> list[Pending]:
        allowed = self.breaker.allowance(IN_FLIGHT_MAX - len(self._tasks))
        taken = self._cache.take_due(allowed) if allowed > 0 else []
        mine = []
        for pending in taken:
            if not self._owns(slot(pending.key)):
                self._cache.forget(pending.key)
                self._note(pending, "cache", "moved")
            elif pending.key in self._tasks:
                self._bulk.unsure(pending.key)  # that look may have read the row before it changed
            else:
                mine.append(pending)
        return mine

    async def _look_after(self, taken: Sequence[Pending]) -> None:
        """Sort by what the lists say, then start what has to be done for each."""
        probing = self.breaker.open
        if probing:
            self.breaker.probing()
            self._start(taken[0], None)
            for pending in taken[1:]:  # due again later
                self._bulk.unsure(pending.key)
            return
        now_s = time.time()
        alone = [p for p in taken if p.status is Status.CREATED or _may_be_over(p, now_s)]
        rest = [p for p in taken if not (p.status is Status.CREATED or _may_be_over(p, now_s))]
        try:
            result = await self._bulk.sort(rest)
        except OncepayError as error:  # a clear no, too: made again and again it must not end the worker
            if isinstance(error, StripeUnavailable):
                self.breaker.failure()
            _log.warning("lists not read", error=str(error))
            alone += rest
        else:
            for pending in result.unchanged:
                self._note(pending, "list", "unchanged")
            for pending, view in result.apply:
                self._start(pending, view)
            alone += result.left
        for pending in alone:
            self._start(pending, None)

    def _start(self, pending: Pending, view: IntentView | None) -> None:
        task = asyncio.create_task(self._one(pending, view), name=f"poll {pending.key}")
        self._tasks[pending.key] = task
        task.add_done_callback(lambda _: self._tasks.pop(pending.key, None))

    async def _one(self, pending: Pending, view: IntentView | None) -> None:
        """Look after one payment; whatever goes wrong, it is due again later."""
        how = "single" if view is None else "list"
        async with self._places:
            try:
                payment = await (self._single(pending) if view is None else self._seen(pending, view))
            except EpochOver as error:
                if not self._over.done():
                    self._over.set_exception(StandDown(str(error)))
                self.breaker.unanswered()
                return
            except StripeUnavailable as error:
                if isinstance(error, StripeStored):
                    self.breaker.unanswered()
                else:
                    self.breaker.failure()
                self._failed(pending, how, error.slug, error)
                return
            except OncepayError as error:
                self.breaker.unanswered()
                self._failed(pending, how, error.slug, error)
                return
            except Exception as error:
                self.breaker.unanswered()
                _log.exception("poll failed", key=pending.key)
                self._failed(pending, how, "error", error)
                return
        self.breaker.success()
        if payment is None:
            self._note(pending, how, "no-row")
        else:
            self._note(pending, how, "unchanged" if payment.version == pending.version else payment.status.value)

    async def _single(self, pending: Pending) -> Payment | None:
        payment = await self._driver.drive_on(pending.key)
        if payment is not None and payment.open_work:
            self._cache.expires(pending.key, payment.expires_at_ms / 1000)
        return payment

    async def _seen(self, pending: Pending, view: IntentView) -> Payment | None:
        """Apply a listed view. The row is read after the list, so a view that isn't final counts only for the version
        that the cache knew before: then the row was the same when the list was read."""
        payment = await self._store.get(pending.key)
        if payment is None or not payment.open_work:
            return payment
        if payment.version == pending.version or view.status in {"succeeded", "canceled"}:
            payment = await self._driver.see(payment, view, "poll")
        if payment.terminal and payment.open_work:
            return await self._driver.drive_on(pending.key)  # a refund or a dispute, of which the intent doesn't tell
        return payment if payment.settled else await self._driver.drive(payment)

    def _failed(self, pending: Pending, how: str, outcome: str, error: Exception) -> None:
        """This look was counted, and said nothing: the next one has to."""
        self._bulk.unsure(pending.key)
        self._note(pending, how, outcome, error)

    def _note(self, pending: Pending, how: str, outcome: str, error: BaseException | None = None) -> None:
        metrics.POLLS.labels(self._shard, how, outcome).inc()
        log = _log.warning if error else _log.debug if outcome == "unchanged" else _log.info
        problem = {"error": str(error)} if error else {}
        known = {"key": pending.key, "status": pending.status, "version": pending.version, "tries": pending.tries}
        log("polled", **known, how=how, outcome=outcome, **problem)


def _may_be_over(pending: Pending, now_s: float) -> bool:
    """Whether the payment may be past its time, so that its row has to be read."""
    return pending.expires_s <= now_s and pending.status not in NOT_GIVEN_UP
