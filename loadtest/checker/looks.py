"""The whole check: wait for work in flight, look at everything, look again at what differs.

The parts are read side by side and not at one moment, so what one look finds may only be on its way. A difference
counts when two looks in a row found the very same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from loadtest.checker.api import check_api
from loadtest.checker.books import Books, check_balanced, check_placement, check_ranges
from loadtest.checker.charges import check_charges, check_reconciled
from loadtest.checker.databases import read_counts, read_derived, read_positions, read_shard
from loadtest.checker.derived import check_derived
from loadtest.checker.model import (
    CheckerError,
    Derived,
    Difference,
    Findings,
    Progress,
    Report,
    Shard,
    Stripe,
    Target,
    Tipalti,
    silent,
)
from loadtest.checker.payouts import check_derived_payouts, check_payouts, check_tipalti, collect
from loadtest.checker.stripe import StripeLists
from loadtest.checker.tipalti import TipaltiLists

LOOKS_MAX = 30
PAUSE_S = 0.5
PAUSE_MAX_S = 5.0
"""From one look to the next; it grows while something is awaited."""
LAG_PAUSE_S = 0.2
LAG_WAIT_S = 5.0
"""How long one look waits for a feed that is behind before it goes on; the next look goes on waiting."""
STILL_S = 10.0
"""A feed that is behind and hasn't moved for so long stands still, and that is a difference."""


async def verify(target: Target, progress: Progress = silent) -> Report:
    """Check everything. Raises Unreachable or Misread when it can't be done."""
    began = time.monotonic()
    deadline = began + target.wait_s
    try:
        await _until_quiet(target, deadline, progress)
        looks = Looks(target, deadline, progress)
        report = await looks.until_sure()
    except BaseExceptionGroup as group:
        raise _first(group) from group
    report.seconds = time.monotonic() - began
    return report


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, out of its group; an error of the checker's own before others."""
    own, _ = group.split(CheckerError)
    found: BaseException = own or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


async def _until_quiet(target: Target, deadline: float, progress: Progress) -> None:
    """Until the platform has done all that it can do by itself, or the time is over."""
    most, pause_s = 0, 0.1
    while True:
        payouts = bool(target.tipalti_url)
        counts = await asyncio.gather(*(read_counts(shard, payouts=payouts) for shard in target.shards))
        driven = sum(count for _, count in counts)
        most = max(most, driven)
        if most:
            progress("work in flight", most - driven, most)
        left_s = deadline - time.monotonic()
        if driven == 0 or left_s <= 0:
            return
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(1.0, pause_s * 1.5)


class Looks:
    """Looks at everything until it is sure."""

    def __init__(self, target: Target, deadline: float, progress: Progress) -> None:
        self._target = target
        self._deadline = deadline
        self._progress = progress
        self._moved: dict[str, tuple[int, float]] = {}
        """Each feed's position, and since when it stands there."""

    async def until_sure(self) -> Report:
        """Looks until nothing is awaited and what differs was the same twice, or until the time is over."""
        before: set[Difference] | None = None
        last = LOOKS_MAX
        for number in range(1, LOOKS_MAX + 1):
            found, opened = await self._look()
            again = found.differences if before is None else found.differences & before
            sure = not found.differences or (before is not None and again == found.differences)
            over = time.monotonic() >= self._deadline
            if (sure and (over or not found.waiting)) or number >= last:
                break
            if over:
                last = min(last, number + 1)  # one more, to tell what differs from what was on its way
            before = found.differences
            await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_S * number) if found.waiting else PAUSE_S)
        self._note_still(found, again)
        found.checked["looks"] = number
        found.checked["awaited"] = len(found.waiting)
        return Report(dict(found.checked), opened + len(found.lagging), sorted(again))

    async def _look(self) -> tuple[Findings, int]:
        """One look: what differs, and how many payments are open."""
        guess: list[int] = []

        async def shards_and_derived() -> tuple[list[Shard], Derived]:
            read = await asyncio.gather(*(read_shard(shard, self._progress) for shard in self._target.shards))
            guess.append(sum(1 for shard in read for payment in shard.payments if payment.intent))
            return read, await read_derived(self._target.aggregator_dsn, self._progress)

        async def paid_out() -> Tipalti | None:
            return await TipaltiLists(self._target).read(self._progress) if self._target.tipalti_url else None

        lists = StripeLists(self._target.stripe_url, self._target.stripe_key, since=self._target.since)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(shards_and_derived())
            listing = group.create_task(lists.read(self._progress, lambda: guess[0] if guess else None))
            paying = group.create_task(paid_out())
        shards, derived = reading.result()
        return await self._check(shards, derived, listing.result(), paying.result())

    async def _check(
        self, shards: list[Shard], derived: Derived, stripe: Stripe, tipalti: Tipalti | None
    ) -> tuple[Findings, int]:
        found, books, target = Findings(), Books(shards), self._target
        payouts = collect(shards)
        check_ranges(shards, target, found)
        check_placement(shards, target, found)
        check_balanced(books, found)
        check_charges(books, stripe, target, found)
        check_reconciled(books, stripe, target, found)
        check_payouts(books, payouts, target, found)
        if tipalti is not None:
            check_tipalti(books, payouts, tipalti, target, found)
        lag = Findings()
        check_derived(books, derived, lag)
        check_derived_payouts(books, payouts, derived, lag)
        if lag.lagging and time.monotonic() < self._deadline:
            await self._until_past(shards)
            derived = await read_derived(target.aggregator_dsn, self._progress)
            lag = Findings()
            check_derived(books, derived, lag)
            check_derived_payouts(books, payouts, derived, lag)
        if target.aggregator_url:
            await check_api(target, derived, self._progress, lag)
        found.differences |= lag.differences
        found.waiting |= lag.waiting
        found.lagging |= lag.lagging
        found.checked.update(lag.checked)
        found.checked["shards"] = len(shards)
        self._note_moved(derived)
        return found, sum(1 for payment in books.payments.values() if payment.open)

    async def _until_past(self, shards: Sequence[Shard]) -> None:
        """Until every feed is past what was read of its shard."""
        deadline = min(self._deadline, time.monotonic() + LAG_WAIT_S)
        while time.monotonic() < deadline:
            positions = await read_positions(self._target.aggregator_dsn)
            if all(positions.get(shard.name, 0) >= shard.position for shard in shards):
                return
            await asyncio.sleep(LAG_PAUSE_S)

    def _note_moved(self, derived: Derived) -> None:
        for shard in self._target.shards:
            position = derived.positions.get(shard.name, 0)
            if self._moved.get(shard.name, (-1, 0.0))[0] != position:
                self._moved[shard.name] = position, time.monotonic()

    def _note_still(self, found: Findings, differences: set[Difference]) -> None:
        """Name the feeds that are behind and don't move."""
        for shard in self._target.shards:
            position, since = self._moved[shard.name]
            awaited = any(what.startswith(f"the feed of {shard.name} ") for what in found.waiting)
            if awaited and time.monotonic() - since >= STILL_S:
                what = f"its feed stands at {position >> 32:X}/{position & 0xFFFFFFFF:X} and brings nothing"
                differences.add(Difference(6, what, f"shard {shard.name}", "see the log of the shard's worker"))
