"""The payouts' desk: tells Tipalti of what was committed, and looks after it until it is over.

The order that keeps a seller from being paid twice: `SubmissionStarted` is committed under the worker's epoch, then the batch
is sent at once, then what Tipalti answered is committed. Whatever has no answer is looked up by its reference code before
anything else, and is only ever sent again under that same code, of which Tipalti makes one payment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import Counter, Gauge

from oncepay.breaker import Breaker
from oncepay.errors import OncepayError
from oncepay.events import Contradiction
from oncepay.keys import slot
from oncepay.logs import get_logger
from oncepay.payout import PaymentView, Payout, PayoutStatus
from oncepay.payout_moves import PaymentSeen, SubmissionRefused, SubmissionStarted
from oncepay.tipalti_client import BATCH_MAX, LOOK_MAX, TipaltiRefused, TipaltiUnavailable
from oncepay.tipalti_objects import LineObject
from shard.store.batch import EpochOver
from shard.store.payouts import Change, StalePayout
from shard.worker.errors import StandDown
from shard.worker.payout_cache import PayoutCache, PendingPayout

IDLE_S = 0.5
"""How late a look may be noticed to be due."""
GATHER_S = 0.2
"""How long the first of a run waits for the others, so that they go in few batches."""
SEND_WITHIN_S = 10.0
"""A batch is sent only so soon after its rows were committed: who was frozen in between looks first."""
DUPLICATE = "DuplicateRefCode"
MADE = frozenset({"OK", "Warning"})

LOOKS = Counter("oncepay_payout_looks", "Payouts looked after, by what came of it.", ["shard", "outcome"])
PENDING = Gauge("oncepay_pending_payouts", "Payouts with open work, by status.", ["shard", "status"])
_log = get_logger("payouts")


class Payouts(Protocol):
    """What the desk needs of `shard.store.payouts.PayoutStore`."""

    async def get_many(self, keys: Sequence[str]) -> dict[str, Payout]: ...

    async def apply_many(self, changes: Sequence[Change], *, event: str) -> list[Payout | Exception]: ...


class Tipalti(Protocol):
    """What the desk needs of `oncepay.tipalti_client.TipaltiClient`."""

    @property
    def on(self) -> bool: ...

    async def submit(self, payouts: Sequence[Payout]) -> dict[str, LineObject]: ...

    async def payments(self, ref_codes: Sequence[str]) -> dict[str, PaymentView]: ...


class PayoutDesk:
    """Looks after the payouts of one shard's cache. `owns` tells whether a slot is (still) the shard's."""

    def __init__(self, shard: str, cache: PayoutCache, store: Payouts, tipalti: Tipalti, owns: Callable[[int], bool]) -> None:
        self.breaker = Breaker()
        self._shard = shard
        self._cache = cache
        self._store = store
        self._tipalti = tipalti
        self._owns = owns

    async def run(self) -> None:
        """Work until canceled. Raises StandDown when the worker's epoch is over."""
        while True:
            due_s = self._cache.next_due_s()
            if not self._tipalti.on or due_s is None or due_s > time.time() or not self.breaker.allowance(1):
                await asyncio.sleep(IDLE_S)
            else:
                await asyncio.sleep(GATHER_S)
                await self._once()
            self._measure()

    async def _once(self) -> None:
        """One round: what is due, at most a batch of it."""
        taken = []
        for pending in self._cache.take_due(BATCH_MAX):
            if self._owns(slot(pending.key)):
                taken.append(pending)
            else:
                self._cache.forget(pending.key)
        if not taken:
            return
        self.breaker.probing()
        try:
            await self.look_after(taken)
        except EpochOver as error:
            raise StandDown(str(error)) from error
        except TipaltiUnavailable as error:
            self.breaker.failure()
            self._note(taken, error.slug, error)
        except OncepayError as error:
            self.breaker.unanswered()
            self._note(taken, error.slug, error)
        else:
            self.breaker.success()

    async def look_after(self, taken: Sequence[PendingPayout]) -> None:
        """Read the rows, look at those that Tipalti may know, tell it of those that it doesn't."""
        rows = await self._store.get_many([pending.key for pending in taken])
        known = [row for row in rows.values() if not row.over and row.status is not PayoutStatus.AWAITING_APPROVAL]
        fresh = [row for row in known if row.status is PayoutStatus.CREATED]
        looked = [row for row in known if row.status is not PayoutStatus.CREATED]
        for start in range(0, len(looked), LOOK_MAX):
            fresh += await self._look(looked[start : start + LOOK_MAX])
        if fresh:
            await self._submit(fresh)

    async def _look(self, rows: Sequence[Payout]) -> list[Payout]:
        """Commit what Tipalti shows; the rows that it was (about to be) told of and doesn't know."""
        views = await self._tipalti.payments([row.ref_code for row in rows])
        found = [Change(row, (PaymentSeen(views[row.ref_code]),)) for row in rows if row.ref_code in views]
        await self._commit(found, "poll")
        absent = [row for row in rows if row.ref_code not in views]
        for row in absent:
            if row.status is not PayoutStatus.SUBMITTING:
                _log.error("Tipalti doesn't know a payment that it showed before", key=row.key, payment=row.progress.payment)
        return [row for row in absent if row.status is PayoutStatus.SUBMITTING]

    async def _submit(self, rows: Sequence[Payout]) -> None:
        """Commit that Tipalti is about to be told, tell it, commit what it says."""
        now_ms = time.time_ns() // 1_000_000
        started = [Change(row, (SubmissionStarted(now_ms),)) for row in rows]
        began_s = time.monotonic()
        ready = [row for row in await self._commit(started, "submit") if row is not None]
        if not ready:
            return
        if time.monotonic() - began_s > SEND_WITHIN_S:
            _log.warning("batch not sent: its rows were committed too long ago", rows=len(ready))
            return
        await self._send(ready)

    async def _send(self, ready: Sequence[Payout]) -> None:
        """Send a batch; when it is refused as a whole, halve it until the line that is to blame stands alone."""
        try:
            lines = await self._tipalti.submit(ready)
        except TipaltiRefused as error:
            if len(ready) > 1:
                middle = len(ready) // 2
                await self._send(ready[:middle])
                await self._send(ready[middle:])
                return
            lines = {ready[0].ref_code: LineObject(ready[0].ref_code, "Error", None, "Refused", str(error))}
        await self._answered(ready, lines)

    async def _answered(self, ready: Sequence[Payout], lines: dict[str, LineObject]) -> None:
        """Commit refusals at once; whatever was made, or was made before, is looked at."""
        now_ms = time.time_ns() // 1_000_000
        refused, made = [], []
        for row in ready:
            line = lines.get(row.ref_code)
            if line is not None and line.result == "Error" and line.errorCode != DUPLICATE:
                code, message = line.errorCode or "Error", line.errorMessage or ""
                refused.append(Change(row, (SubmissionRefused(row.progress.sends, code, message, now_ms),)))
            else:
                made.append(row)
        await self._commit(refused, "refused")
        for start in range(0, len(made), LOOK_MAX):
            await self._look(made[start : start + LOOK_MAX])

    async def _commit(self, changes: Sequence[Change], event: str) -> list[Payout | None]:
        """Commit changes; None for a row that another process has moved meanwhile, or whose change was refused."""
        results: list[Payout | None] = []
        if not changes:
            return results
        for change, result in zip(changes, await self._store.apply_many(changes, event=event), strict=True):
            if isinstance(result, EpochOver):
                raise result
            if isinstance(result, Exception):
                outcome = "stale" if isinstance(result, StalePayout) else getattr(result, "slug", "error")
                log = _log.error if isinstance(result, Contradiction) else _log.info
                log("payout not moved", key=change.payout.key, at=event, outcome=outcome, reason=str(result))
            else:
                outcome = "unchanged" if result.version == change.payout.version else result.status.value
            LOOKS.labels(self._shard, outcome).inc()
            results.append(None if isinstance(result, Exception) else result)
        return results

    def _note(self, taken: Sequence[PendingPayout], outcome: str, error: Exception) -> None:
        LOOKS.labels(self._shard, outcome).inc(len(taken))
        _log.warning("payouts not looked after", payouts=len(taken), outcome=outcome, error=str(error))

    def _measure(self) -> None:
        counts = dict.fromkeys(PayoutStatus, 0)
        for pending in self._cache:
            counts[pending.status] += 1
        for status, count in counts.items():
            PENDING.labels(self._shard, status.value).set(count)
