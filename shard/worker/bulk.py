"""Asking Stripe about many payments at once: lists first, so that single look-ups are left for what they don't answer.

Young payments are found in the list of intents by when they were made. For old ones the list of events tells which have
not changed since they were last looked at. Both give up early when they would cost more calls than they save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from oncepay.logs import get_logger
from oncepay.payment import IntentView, Key, Status
from oncepay.stripe_objects import EventList, EventObject, IntentList, ObjectHead
from shard.worker import metrics
from shard.worker.cache import JITTER, Pending, PendingCache

YOUNG_TRIES = 1
"""Payments with at most so many looks since their last change are sought among the newest intents."""
BULK_MIN = 8
"""Fewer than this are asked for singly."""
HITS_MIN = 3
"""A page of intents with fewer hits is the last one: single calls cost less from there on."""
INTENT_PAGES_MAX = 10
EVENT_PAGES_MAX = 10
SLACK_S = 60
EVENT_OVERLAP_S = 30
"""Events this close to a sweep's edge count for both sides: they may be listed late, and clocks differ."""
EVENT_REST_S = 60.0
"""After a sweep that was too long the events list is left alone for this long."""
SINGLE_EACH = 8
"""Every so many looks a payment is asked for singly, whatever the events say."""

Decision = Literal["unchanged", "apply", "drive"]

_head = msgspec.json.Decoder(ObjectHead).decode
_log = get_logger("poller")


class Lists(Protocol):
    """The lists of `oncepay.stripe_client.StripeGateway`."""

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList: ...

    async def events(self, *, created_gte: int, starting_after: str = "", ending_before: str = "") -> EventList: ...


class Sorted(NamedTuple):
    """What the lists say: views to apply, payments that haven't changed, and those that have to be asked for singly."""

    apply: list[tuple[Pending, IntentView]]
    unchanged: list[Pending]
    left: list[Pending]


def decide(pending: Pending, view: IntentView) -> Decision:
    """What a view means for a payment that the cache knows in some state: nothing new, a fact, or work to be done."""
    status = pending.status
    if view.status == "succeeded":
        fee_known = view.charge is not None and bool(view.charge.balance_transaction) and view.charge.fee >= 0
        return "unchanged" if status is Status.SUCCEEDED and not fee_known else "apply"
    if view.status == "canceled":
        return "apply"
    if view.status == "processing":
        return "unchanged" if status in {Status.PROCESSING, Status.CANCELING} else "apply"
    if view.status in {"requires_action", "requires_capture"}:
        if status is Status.CANCELING:
            return "drive"
        return "unchanged" if status.value == view.status else "apply"
    waits = status in {Status.REQUIRES_PAYMENT_METHOD, Status.ATTEMPTED}
    return "unchanged" if waits and pending.tries else "drive"  # the first time somebody may have left it behind


class Bulk:
    """One worker's use of Stripe's lists. What is sorted must be due, and no fact in it older than the cache's."""

    def __init__(
        self, stripe: Lists, cache: PendingCache, shard: str, first_s: float, now: Callable[[], float] = time.time
    ) -> None:
        self._stripe = stripe
        self._cache = cache
        self._shard = shard
        self._first_s = first_s
        self._now = now
        self._changed: dict[Key, float] = {}
        self._covered_from_s = 0.0
        self._covered_to_s = 0.0
        self._rest_until_s = 0.0

    async def sort(self, due: Sequence[Pending]) -> Sorted:
        """Sort what is due by what the lists say. Raises StripeUnavailable."""
        young = [pending for pending in due if pending.tries <= YOUNG_TRIES]
        old = [pending for pending in due if pending.tries > YOUNG_TRIES]
        from_intents = await self._by_intents(young) if len(young) >= BULK_MIN else Sorted([], [], young)
        from_events = await self._by_events(old) if len(old) >= BULK_MIN else Sorted([], [], old)
        return Sorted(from_intents.apply, from_intents.unchanged + from_events.unchanged, from_intents.left + from_events.left)

    # Intents

    async def _by_intents(self, due: Sequence[Pending]) -> Sorted:
        wanted = {pending.key: pending for pending in due}
        result = Sorted([], [], [])
        now_s = self._now()
        newest_s = int(now_s - 0.9 * self._first_s)
        oldest_s = int(now_s - self._first_s * 2 ** (YOUNG_TRIES + 1) - SLACK_S)
        after = ""
        for _ in range(INTENT_PAGES_MAX):
            page = await self._stripe.intents(created_gte=oldest_s, created_lte=newest_s, starting_after=after)
            metrics.LISTED.labels(self._shard, "intents").inc(len(page.data))
            hits = 0
            for item in page.data:
                view = item.view()
                pending = wanted.pop(Key(view.key), None)
                if pending is not None:
                    hits += 1
                    _sort_one(result, pending, view)
            if not wanted or not page.has_more or hits < HITS_MIN or not page.data:
                break
            after = page.data[-1].id
        result.left.extend(wanted.values())
        return result

    # Events

    async def _by_events(self, due: Sequence[Pending]) -> Sorted:
        if self._now() >= self._rest_until_s:
            await self._sweep()
        result = Sorted([], [], [])
        for pending in due:
            quiet = self._covers(pending) and pending.key not in self._changed and pending.tries % SINGLE_EACH
            fee_open = pending.status in {Status.SUCCEEDED, Status.CANCELING}  # no event of the intent tells of these
            (result.unchanged if quiet and not fee_open else result.left).append(pending)
        for pending in due:
            self._changed.pop(pending.key, None)
        return result

    def _covers(self, pending: Pending) -> bool:
        """Whether all events since this payment was last looked at have been read."""
        looked_s = self._now() - self._cache.distance_s(pending.status, pending.tries) * (1 + JITTER) - SLACK_S
        return self._covered_from_s + EVENT_OVERLAP_S < looked_s and self._covered_to_s > self._now() - EVENT_OVERLAP_S

    async def _sweep(self) -> None:
        """Read the events since the last sweep, the newest first."""
        now_s = self._now()
        start_s = self._covered_to_s - EVENT_OVERLAP_S if self._covered_to_s else now_s - EVENT_OVERLAP_S
        after = ""
        for _ in range(EVENT_PAGES_MAX):
            page = await self._stripe.events(created_gte=int(start_s), starting_after=after)
            metrics.LISTED.labels(self._shard, "events").inc(len(page.data))
            for event in page.data:
                self._note(event)
            if not page.has_more or not page.data:
                self._covered_from_s = self._covered_from_s or start_s
                self._covered_to_s = now_s
                return
            after = page.data[-1].id
        _log.info("too many events to sweep", since_s=int(start_s), pages=EVENT_PAGES_MAX)
        self._covered_from_s, self._covered_to_s = float(page.data[-1].created), now_s
        self._rest_until_s = now_s + EVENT_REST_S

    def _note(self, event: EventObject) -> None:
        """Remember that a pending payment has an event."""
        head = _head(event.data.object)
        key = (head.metadata or {}).get("oncepay_key", "")
        if key and key in self._cache:
            self._changed[Key(key)] = float(event.created)


def _sort_one(result: Sorted, pending: Pending, view: IntentView) -> None:
    decision = decide(pending, view)
    if decision == "apply":
        result.apply.append((pending, view))
    elif decision == "unchanged":
        result.unchanged.append(pending)
    else:
        result.left.append(pending)
