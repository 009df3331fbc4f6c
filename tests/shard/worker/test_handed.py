"""Events that the account's reader hands to a shard, over a cache and rows in memory."""

from __future__ import annotations

import asyncio
import json
from typing import Literal, cast

import msgspec

from oncepay.driver import Driver
from oncepay.payment import Key, Payment, Status
from oncepay.settings import PollSettings
from oncepay.stripe_objects import EventData, EventObject, IntentList
from shard.store.store import Shards
from shard.worker.bulk import SINGLE_AT, Bulk
from shard.worker.cache import PendingCache
from shard.worker.events import HandOver
from shard.worker.handed import Handed
from tests.shard.worker.harness import new_payment
from tests.shard.worker.test_cache import Clock

LONG_S = 3 * PollSettings().max_s
FAR_S = 10**10


def event(type_: str, key: str, name: str) -> EventObject:
    body = {"id": f"{name}_{key}", "object": name, "payment_intent": f"pi_{key}", "metadata": {"oncepay_key": key}}
    return EventObject(f"evt_{type_}_{key}", type_, 1, EventData(msgspec.Raw(json.dumps(body).encode())))


class NoLists:
    """Stripe is asked for no list."""

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList:
        raise AssertionError(created_gte)


class Slow:
    """A store and a driver whose looks at refunds last until `go`."""

    def __init__(self) -> None:
        self.looking = asyncio.Event()
        self.go = asyncio.Event()

    async def get(self, key: str) -> Payment | None:
        return new_payment(key, status=Status.SUCCEEDED, intent=f"pi_{key}")

    async def look_after(self, key: str, what: Literal["refunds", "disputes"], reason: str) -> Payment | None:
        self.looking.set()
        await self.go.wait()
        return None


async def test_a_look_that_an_event_hurries_is_a_single_one_while_other_events_are_taken_in() -> None:
    clock, slow = Clock(10_000), Slow()
    cache = PendingCache(PollSettings(), clock)
    cache.put("old", "processing", 3, True, FAR_S)
    for _ in range(max(SINGLE_AT) + 1):
        clock.now_s += LONG_S
        cache.take_due(10)
    bulk = Bulk(NoLists(), cache, "s0", 5.0, clock)
    bulk.handed(0, clock.now_s, [])
    handed = Handed("s0", cast(Shards, slow), cast(Driver, slow), cache, bulk)
    events = [event("payment_intent.payment_failed", "old", "payment_intent"), event("refund.updated", "other", "charge")]
    taking = asyncio.create_task(handed.take(HandOver(clock.now_s, clock.now_s + 1, events)))
    try:
        await asyncio.wait_for(slow.looking.wait(), 10)
        clock.now_s += 2
        due = cache.take_due(10)
        assert [pending.key for pending in due] == [Key("old")]
        assert (await bulk.sort(due)).left == due
    finally:
        slow.go.set()
        assert await taking == {"hurried": 1, "looked": 1}


class Looked:
    """A store and a driver that remember what was looked at."""

    def __init__(self) -> None:
        self.looked: list[str] = []

    async def get(self, key: str) -> Payment | None:
        return new_payment(key, status=Status.SUCCEEDED, intent=f"pi_{key}")

    async def look_after(self, key: str, what: Literal["refunds", "disputes"], reason: str) -> Payment | None:
        self.looked.append(key)
        return None

    async def look(self, key: str, reason: str) -> Payment | None:
        self.looked.append(key)
        return None


def changed(of: EventObject, **members: object) -> EventObject:
    """The event, with other members in its object."""
    body = json.loads(bytes(of.data.object)) | members
    return EventObject(of.id, of.type, 1, EventData(msgspec.Raw(json.dumps(body).encode())))


async def test_an_event_that_can_not_be_read_holds_up_no_other_and_is_a_reason_to_look() -> None:
    """Events are rendered in the account's API version, not in the one that calls ask for."""
    clock, looked = Clock(10_000), Looked()
    cache = PendingCache(PollSettings(), clock)
    cache.put("open", "processing", 3, True, FAR_S)
    bulk = Bulk(NoLists(), cache, "s0", 5.0, clock)
    handed = Handed("s0", cast(Shards, looked), cast(Driver, looked), cache, bulk)
    events = [
        changed(event("refund.updated", "null", "refund"), status=None),
        changed(event("refund.updated", "number", "refund"), status=7),
        changed(event("charge.dispute.created", "odd", "dispute"), status="won", balance_transactions="none"),
        changed(event("refund.updated", "head", "refund"), metadata={"oncepay_key": 5}),
        changed(event("payment_intent.succeeded", "open", "payment_intent"), id="pi_open", amount="ten"),
        event("refund.updated", "fine", "refund"),
    ]
    assert await handed.take(HandOver(1.0, 2.0, events)) == {"looked": 5, "unreadable": 1}
    assert sorted(looked.looked) == ["fine", "null", "number", "odd", "open"]
