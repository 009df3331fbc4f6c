"""Asking Stripe about many payments at once: lists first, so that single look-ups are left for what they don't answer.

Young payments are found in the list of intents by when they were made; that gives up early when it would cost more calls
than it saves. For old ones the events that the account's reader hands to the shard tell which have not changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Literal, NamedTuple, Protocol

from oncepay.payment import IntentView, Key, Status
from oncepay.stripe_objects import IntentList
from shard.worker import metrics
from shard.worker.cache import JITTER, Pending, PendingCache

YOUNG_TRIES = 1
"""Payments with at most so many looks since their last change are sought among the newest intents."""
BULK_MIN = 8
"""Fewer young ones than this are asked for singly."""
HITS_MIN = 3
"""A page of intents with fewer hits is the last one: single calls cost less from there on."""
INTENT_PAGES_MAX = 10
OURS = frozenset({Status.SUCCEEDED, Status.CANCELING, Status.CONFIRMING})
"""No event of the intent tells of what is to be done here: a fee to be read, a cancel or a confirm that was never answered."""
SLACK_S = 60
EVENT_OVERLAP_S = 30
"""What was handed over must reach this close to now: an event is handed over only some seconds after it was made."""
CHANGED_MAX = 10_000
"""So many payments that have to be asked for are remembered before those that are settled are forgotten."""
SINGLE_AT = frozenset({8, 32})
"""At these looks a payment is asked for singly, whatever the events say."""

Decision = Literal["unchanged", "apply", "drive"]


class Lists(Protocol):
    """The lists of `oncepay.stripe_client.StripeGateway`."""

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList: ...


class Sorted(NamedTuple):
    """What the lists say: views to apply, payments that haven't changed, and those that have to be asked for singly."""

    apply: list[tuple[Pending, IntentView]]
    unchanged: list[Pending]
    left: list[Pending]


def decide(pending: Pending, view: IntentView, *, unsure: bool = False) -> Decision:
    """What a view means for a payment that the cache knows in some state: nothing new, a fact, or work to be done.

    Somebody may have left work behind: that is found out at the first look, and again when the payment is `unsure`.
    """
    status, looked = pending.status, pending.tries > 0 and not unsure
    if view.status == "succeeded":
        fee_known = view.charge is not None and bool(view.charge.balance_transaction) and view.charge.fee >= 0
        return "unchanged" if status is Status.SUCCEEDED and not fee_known else "apply"
    if view.status == "canceled":
        return "apply"
    if view.status == "processing":
        return "unchanged" if status in {Status.PROCESSING, Status.CANCELING} else "apply"
    if view.status in {"requires_action", "requires_capture"}:
        if status is Status.CANCELING or (status is Status.REQUIRES_CAPTURE and not looked):
            return "drive"
        return "unchanged" if status.value == view.status else "apply"
    waits = status in {Status.REQUIRES_PAYMENT_METHOD, Status.ATTEMPTED}
    return "unchanged" if waits and looked else "drive"


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
        self._changed: set[Key] = set()
        self._changed_max = CHANGED_MAX
        self._covered_from_s = 0.0
        self._covered_to_s = 0.0

    def is_unsure(self, key: Key) -> bool:
        """Whether this payment had an event since it was sorted last, or a look at it brought no answer."""
        return key in self._changed

    async def sort(self, due: Sequence[Pending]) -> Sorted:
        """Sort what is due by what the lists say. Raises StripeUnavailable or StripeRefused: then each is asked for singly."""
        unsure = self._changed.intersection(pending.key for pending in due)
        self._changed -= unsure  # what happens from here on is for the next look
        young = [pending for pending in due if pending.tries <= YOUNG_TRIES]
        old = [pending for pending in due if pending.tries > YOUNG_TRIES]
        from_events = self._by_events(old, unsure)
        from_intents = await self._by_intents(young, unsure) if len(young) >= BULK_MIN else Sorted([], [], young)
        return Sorted(from_intents.apply, from_intents.unchanged + from_events.unchanged, from_intents.left + from_events.left)

    # Intents

    async def _by_intents(self, due: Sequence[Pending], unsure: Set[Key]) -> Sorted:
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
                    _sort_one(result, pending, view, unsure=pending.key in unsure)
            if not wanted or not page.has_more or hits < HITS_MIN or not page.data:
                break
            after = page.data[-1].id
        result.left.extend(wanted.values())
        return result

    # Events

    def _by_events(self, due: Sequence[Pending], unsure: Set[Key]) -> Sorted:
        result = Sorted([], [], [])
        for pending in due:
            quiet = self._covers(pending) and pending.key not in unsure and pending.tries not in SINGLE_AT
            (result.unchanged if quiet and pending.status not in OURS else result.left).append(pending)
        return result

    def _covers(self, pending: Pending) -> bool:
        """Whether all events since this payment was last looked at have been handed over."""
        since_s = self._cache.distance_s(pending.status, pending.tries) * (1 + JITTER) + pending.late_s
        looked_s = self._now() - since_s - SLACK_S
        return self._covered_from_s + EVENT_OVERLAP_S < looked_s and self._covered_to_s > self._now() - EVENT_OVERLAP_S

    def handed(self, from_s: float, to_s: float, keys: Iterable[Key]) -> None:
        """All events that Stripe made from `from_s` to `to_s` have been handed to this shard; these payments had some."""
        for key in keys:
            self.unsure(key)
        if len(self._changed) > self._changed_max:
            self._changed = {key for key in self._changed if key in self._cache}
            self._changed_max = max(CHANGED_MAX, 2 * len(self._changed))
        if from_s > self._covered_to_s:
            self._covered_from_s = from_s  # something is missing in between
        self._covered_to_s = max(self._covered_to_s, to_s)

    def unsure(self, key: Key) -> None:
        """This payment had an event, or a look at it brought no answer: the next one may not find it unchanged without asking."""
        if key in self._cache:
            self._changed.add(key)


def _sort_one(result: Sorted, pending: Pending, view: IntentView, *, unsure: bool) -> None:
    decision = decide(pending, view, unsure=unsure)
    if decision == "apply":
        result.apply.append((pending, view))
    elif decision == "unchanged":
        result.unchanged.append(pending)
    else:
        result.left.append(pending)
