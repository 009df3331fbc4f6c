"""The poller: looks after every open payment until it is settled, whoever started it and whatever became of them.

A payment is due some time after its last change (a router that lives has driven it on by then), then with growing gaps.
Lists are asked first; what they leave open is driven on singly, which looks at Stripe before it does anything. Single looks
stand in two lines: what may have to be driven on goes first, and payments that only wait, however many they are, go after it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

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

IN_HAND_MAX = 256
"""Payments of the first line that are taken up at once; the others stay due."""
CONCURRENCY = 24
"""Payments that are driven at once."""
PATIENT_MAX = 16
"""Of these so many may be of the second line."""
FIRST_MAX = 22
"""And so many of the first, where others wait: some are in it for weeks, such as those with a dispute."""
IDLE_S = 0.5
"""How late a look may be noticed to be due."""
NOT_GIVEN_UP = frozenset({Status.PROCESSING, Status.REQUIRES_CAPTURE, Status.CANCELING, Status.SUCCEEDED})
"""In these the payment's time being over changes nothing."""

TO_BE_DRIVEN = frozenset({Status.CREATED, Status.CONFIRMING, Status.CANCELING, Status.SUCCEEDED})
"""In these the platform has the next move, or a fee to read."""

_log = get_logger("poller")


class _Look(NamedTuple):
    """A look that is to come: at a listed view, or singly. `first`: in the first line."""

    pending: Pending
    view: IntentView | None
    first: bool


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
        self._first: deque[_Look] = deque()
        self._second: deque[_Look] = deque()
        self._waiting: dict[str, _Look] = {}
        """By key, the look in one of the lines that counts: another one of the same payment may stand there still."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._patient = 0
        """Tasks that came from the second line."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Poll until canceled. Raises StandDown when the worker's epoch is over."""
        try:
            while not self._over.done():
                taken = self._take()
                metrics.CIRCUIT_OPEN.labels(self._shard).set(self.breaker.open)
                if taken:
                    await self._look_after(taken)
                    await asyncio.sleep(0)  # many may be due that cost no call
                else:
                    await asyncio.wait({self._over}, timeout=self._pause_s())
            self._over.result()
        finally:
            self._first.clear()  # or each task that ends would start another one
            self._second.clear()
            self._waiting.clear()
            for task in list(self._tasks.values()):
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _pause_s(self) -> float:
        due_s = self._cache.next_due_s()
        return IDLE_S if due_s is None else min(IDLE_S, max(0.02, due_s - time.time()))

    def _take(self) -> list[Pending]:
        allowed = self.breaker.allowance(IN_HAND_MAX - len(self._first) - len(self._tasks))
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
            self._start(_Look(taken[0], None, True))
            for pending in taken[1:]:  # due again later
                self._bulk.unsure(pending.key)
            return
        now_s = time.time()
        unsure = {pending.key for pending in taken if self._bulk.is_unsure(pending.key)}
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
                self._line_up(_Look(pending, view, True))
            alone += result.left
        for pending in alone:
            first = pending.tries == 0 or pending.status in TO_BE_DRIVEN or pending.key in unsure
            self._line_up(_Look(pending, None, first))
        self._start_some()

    # The lines

    def _line_up(self, look: _Look) -> None:
        """Put a look at the end of its line, unless one that says as much stands there: that one is still to come."""
        key = look.pending.key
        before = self._waiting.get(key)
        known = before is not None and before.view is None and before.pending.version == look.pending.version
        if known and before is not None and before.first >= look.first and look.view is None:
            return
        self._waiting[key] = look
        (self._first if look.first else self._second).append(look)

    def _start_some(self) -> None:
        """Start looks, the first line's first, while there are places."""
        while len(self._tasks) < CONCURRENCY:
            if self._first and (not self._second or len(self._tasks) - self._patient < FIRST_MAX):
                look = self._first.popleft()
            elif self._second and self._patient < PATIENT_MAX and not self.breaker.open:  # it stays, and goes on after the probe
                look = self._second.popleft()
            else:
                break
            key = look.pending.key
            if self._waiting.get(key) is not look:
                continue
            del self._waiting[key]
            if self.breaker.open or self._over.done() or key in self._tasks:
                self._bulk.unsure(key)  # due again later
            elif look.view is not None or self._is_as_it_was(look.pending):
                self._start(look)
        metrics.POLL_WAITING.labels(self._shard).set(len(self._waiting))

    def _is_as_it_was(self, pending: Pending) -> bool:
        """Whether the payment is pending as it was when it was lined up; one that has changed has its own look to come."""
        known = self._cache.get(pending.key)
        return known is not None and known.version == pending.version

    def _start(self, look: _Look) -> None:
        key, patient = look.pending.key, not look.first
        self._patient += patient

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(key, None)
            self._patient -= patient
            self._start_some()

        task = asyncio.create_task(self._one(look.pending, look.view), name=f"poll {key}")
        self._tasks[key] = task
        task.add_done_callback(ended)

    async def _one(self, pending: Pending, view: IntentView | None) -> None:
        """Look after one payment; whatever goes wrong, it is due again later."""
        how = "single" if view is None else "list"
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
