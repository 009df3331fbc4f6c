"""The account's events, read once for all shards: one elected worker reads Stripe's list from a cursor on, and hands each event
to its shard's active worker.

Nobody is elected for good, and two may read for a moment: what is handed over twice does no harm. The cursor, in etcd, moves
only when every shard has taken what was its own. An event is handed over some seconds after it was first seen, because
Stripe may list one late, and because its webhook mostly comes first; then it costs the shard nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp
import msgspec
from prometheus_client import Counter, Gauge

from oncepay.driver import Driver
from oncepay.errors import OncepayError, Unavailable
from oncepay.etcd import Etcd, EtcdRefused
from oncepay.incoming import HANDLED, head_of, key_of
from oncepay.keys import slot
from oncepay.logs import get_logger
from oncepay.payment import Payment
from oncepay.settings import Settings
from oncepay.shardmap import ShardMap
from oncepay.stripe_client import PAGE_MAX, StripeRefused
from oncepay.stripe_objects import EventList, EventObject
from shard.worker.lease import Holder, Seat

SEAT = "stripe/reader"
CURSOR = "stripe/events"
TYPES = HANDLED - {"charge.refunded"}
"""Read in the list. `charge.refunded` says nothing that the refund's own events don't."""
PAGES_MAX = 20
"""Pages in one round; then the shards get what was read."""
EVENTS_MAX = PAGES_MAX * PAGE_MAX
START_S = 600
"""How far back the very first round looks: webhooks and polls have cared for all before."""
PART_BYTES_MAX = 8 << 20
PART_EVENTS_MAX = 200
"""What a shard gets at once, or one event that is larger."""
HAND_S = 30.0
"""How long a shard may take for a part."""

READ = Counter("oncepay_worker_events_read", "Events read in the account's list.")
HANDED = Counter("oncepay_worker_events_handed", "Events handed to shards, by outcome.", ["shard", "outcome"])
BEHIND = Gauge("oncepay_worker_events_behind_seconds", "Since the reader had last handed over all events. 0 on others.")

_log = get_logger("events")


class Cursor(msgspec.Struct, frozen=True):
    """All events up to `event` (empty: those before `since_s`) were handed over. `until_s`: they were all there were then."""

    event: str
    since_s: int
    until_s: float


class HandOver(msgspec.Struct, frozen=True):
    """What a shard gets: its events, oldest first, and from when to when they are all that Stripe made."""

    from_s: float
    to_s: float
    events: list[EventObject]


class Lists(Protocol):
    """The list of `oncepay.stripe_client.StripeGateway`."""

    async def events(
        self, *, types: frozenset[str], created_gte: int, starting_after: str = "", ending_before: str = ""
    ) -> EventList: ...


class Owners(Protocol):
    """What tells whose an event is: `shard.store.store.Shards`."""

    async def by_intent(self, intent: str) -> Payment | None: ...


class HandOverFailed(Unavailable):
    """A shard's worker didn't take its events."""

    slug = "hand-over-failed"


class EventReader:
    """Reads and hands over, while this process is the elected one. `current_map` is the shard map as it is known here."""

    def __init__(
        self, etcd: Etcd, stripe: Lists, owners: Owners, driver: Driver, current_map: Callable[[], ShardMap],
        http: aiohttp.ClientSession, settings: Settings, name: str,
    ) -> None:  # fmt: skip
        self._etcd = etcd
        self._stripe = stripe
        self._owners = owners
        self._driver = driver
        self._current_map = current_map
        self._http = http
        self._headers = {"Authorization": f"Bearer {settings.internal_token}"} if settings.internal_token else {}
        self._pause_s = settings.poll.first_s
        self._lag_s = 2 * settings.poll.first_s
        self._seat = Seat(etcd, SEAT, name)
        self._seen: dict[str, float] = {}

    async def run(self) -> None:
        """Wait to be elected, then read, until canceled."""
        while True:
            await self._seat.take()
            reading = asyncio.create_task(self._read())
            lost = asyncio.create_task(self._seat.lost())
            try:
                await asyncio.wait({reading, lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reading, lost):
                    task.cancel()
                await asyncio.gather(reading, lost, return_exceptions=True)
                BEHIND.set(0)
                await self._seat.leave()

    async def _read(self) -> None:
        self._seen.clear()
        handed_at_s = time.monotonic()
        while True:
            try:
                more = await self.round()
                handed_at_s = time.monotonic()
            except (Unavailable, EtcdRefused) as error:
                more = False
                _log.info("events not handed over", error=str(error))
            except OncepayError as error:
                more = False
                _log.warning("events not handed over", error=str(error))
            except Exception:
                more = False
                _log.exception("events not handed over")
            BEHIND.set(time.monotonic() - handed_at_s)
            if not more:
                await asyncio.sleep(self._pause_s)

    async def round(self) -> bool:
        """Read what is new, hand over what is old enough, move the cursor. Whether there is more to do at once."""
        stored = await self._etcd.get(CURSOR)
        now_s = time.time()
        cursor = msgspec.json.decode(stored.value, type=Cursor) if stored else Cursor("", int(now_s) - START_S, 0.0)
        try:
            events, whole = await self._since(cursor)
        except StripeRefused as refused:
            # the event is older than Stripe's thirty days: begin where the list does
            _log.error("the cursor's event is gone: events before the list's beginning are lost", error=str(refused))
            events, whole = await self._since(Cursor("", 0, 0.0))
        READ.inc(len(events))
        ready = self._old_enough(events)
        until_s = now_s - self._lag_s if whole else cursor.until_s
        await self._hand(ready, cursor.until_s, until_s)
        following = Cursor(ready[-1].id if ready else cursor.event, cursor.since_s, until_s)
        if following != cursor:
            revision = stored.mod_revision if stored else 0
            await self._etcd.compare_and_put(CURSOR, msgspec.json.encode(following), revision)
        for event in ready:
            self._seen.pop(event.id, None)
        return not whole and bool(ready)

    async def _since(self, cursor: Cursor) -> tuple[list[EventObject], bool]:
        """The events after the cursor, oldest first, and whether these are all."""
        found: list[EventObject] = []
        if cursor.event:
            after = cursor.event
            for _ in range(PAGES_MAX):
                page = await self._stripe.events(types=TYPES, created_gte=0, ending_before=after)
                found += reversed(page.data)
                if not page.has_more or not page.data:
                    return found, True
                after = page.data[0].id
            return found, False
        before, whole = "", True
        while True:  # from the newest back to the beginning, once in a deployment's life
            page = await self._stripe.events(types=TYPES, created_gte=cursor.since_s, starting_after=before)
            found += page.data
            if len(found) > EVENTS_MAX:  # the oldest go over first, and the others follow their cursor
                del found[:-EVENTS_MAX]
                whole = False
            if not page.has_more or not page.data:
                return found[::-1], whole
            before = page.data[-1].id

    def _old_enough(self, events: Sequence[EventObject]) -> list[EventObject]:
        """Those before the first one that was seen only just now. By this process's clock: Stripe's may be another."""
        now_s = time.monotonic()
        for number, event in enumerate(events):
            if now_s - self._seen.setdefault(event.id, now_s) < self._lag_s:
                for later in events[number:]:
                    self._seen.setdefault(later.id, now_s)
                return list(events[:number])
        return list(events)

    async def _hand(self, events: Sequence[EventObject], from_s: float, to_s: float) -> None:
        """Give each shard its own. Raises HandOverFailed when one didn't take them."""
        shards = self._current_map().shards()
        own: dict[str, list[EventObject]] = {shard: [] for shard in shards}
        for event in events:
            try:
                key = await key_of(head_of(event), self._owners, self._driver)
            except msgspec.DecodeError as error:  # the same again would be no better, and all others wait behind it
                _log.error("event can't be read", event_id=event.id, type=event.type, error=str(error))
                HANDED.labels("", "unreadable").inc()
                from_s = to_s  # these weren't all: no payment is taken for unchanged by them
                continue
            if key:
                own.setdefault(self._current_map().range_of(slot(key)).shard, []).append(event)
        results = await asyncio.gather(
            *(self._give_all(shard, from_s, to_s, mine) for shard, mine in own.items()), return_exceptions=True
        )
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            raise failed[0]

    async def _give_all(self, shard: str, from_s: float, to_s: float, events: Sequence[EventObject]) -> None:
        """In parts; only with the last one they are all up to `to_s`."""
        *first, last = parts(events)
        for part in first:
            await self._give(shard, HandOver(from_s, from_s, part))
        await self._give(shard, HandOver(from_s, to_s, last))

    async def _give(self, shard: str, batch: HandOver) -> None:
        record = await self._etcd.get(f"workers/{shard}")
        url = msgspec.json.decode(record.value, type=Holder).url if record else ""
        outcome = "failed"
        try:
            if not url:
                raise HandOverFailed(f"shard {shard} has no active worker that takes events")
            timeout = aiohttp.ClientTimeout(total=HAND_S)
            body = msgspec.json.encode(batch)
            async with self._http.post(f"{url}/v1/events", data=body, headers=self._headers, timeout=timeout) as answer:
                if answer.status != 200:
                    raise HandOverFailed(f"{url} answered {answer.status}: {(await answer.read())[:200]!r}")
            outcome = "taken"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HandOverFailed(f"{url} can't be reached: {error!r}") from error
        finally:
            HANDED.labels(shard, outcome).inc(len(batch.events))


def parts(events: Sequence[EventObject]) -> list[list[EventObject]]:
    """Events in pieces that a shard takes at once; one empty piece when there are none."""
    pieces: list[list[EventObject]] = [[]]
    size_bytes = 0
    for event in events:
        of_event_bytes = len(bytes(event.data.object))
        if pieces[-1] and (size_bytes + of_event_bytes > PART_BYTES_MAX or len(pieces[-1]) == PART_EVENTS_MAX):
            pieces.append([])
            size_bytes = 0
        pieces[-1].append(event)
        size_bytes += of_event_bytes
    return pieces
