"""The account's reader of events: a real etcd, real HTTP to two shards' workers, and Stripe's list over given events."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web

from oncepay.driver import Driver
from oncepay.etcd import Etcd
from oncepay.incoming import HANDLED
from oncepay.keys import slot
from oncepay.payment import Payment
from oncepay.settings import EtcdSettings, PollSettings, Settings
from oncepay.shardmap import ShardMap, even_map
from oncepay.stripe_objects import EventData, EventList, EventObject
from shard.worker.events import (
    CURSOR,
    PAGES_MAX,
    PART_BYTES_MAX,
    PART_EVENTS_MAX,
    TYPES,
    Cursor,
    EventReader,
    HandOver,
    HandOverFailed,
    parts,
)
from shard.worker.lease import Holder
from tests.etcd_fixture import EtcdCluster, etcd_cluster, free_ports

__all__ = ["etcd_cluster"]

pytestmark = pytest.mark.cluster
SHARDS = ("s0", "s1")
MAP: ShardMap = even_map(SHARDS)


class Stripe:
    """The account's events, newest first, 100 a page."""

    def __init__(self) -> None:
        self.made: list[EventObject] = []
        self.calls = 0

    def event(self, key: str, number: int | None = None) -> str:
        name = f"evt_{len(self.made) if number is None else number}"
        body = json.dumps({"id": f"pi_{key}", "object": "payment_intent", "metadata": {"oncepay_key": key}})
        self.made.append(EventObject(name, "payment_intent.succeeded", 1, EventData(msgspec.Raw(body.encode()))))
        return name

    async def events(
        self, *, types: frozenset[str], created_gte: int, starting_after: str = "", ending_before: str = ""
    ) -> EventList:
        self.calls += 1
        ids = [event.id for event in self.made]
        if ending_before:
            start = ids.index(ending_before) + 1
            return EventList(self.made[start : start + 100][::-1], len(ids) > start + 100)
        end = ids.index(starting_after) if starting_after else len(ids)
        return EventList(self.made[max(0, end - 100) : end][::-1], end > 100)


class Foreign:
    """No event here needs to be found by its intent."""

    async def by_intent(self, intent: str) -> Payment | None:
        raise AssertionError(intent)


class Account:
    """A reader, the shards that it hands to, and what they got."""

    def __init__(self, etcd: Etcd, http: aiohttp.ClientSession) -> None:
        self.stripe = Stripe()
        self.got: dict[str, list[HandOver]] = {shard: [] for shard in SHARDS}
        self.refusing: set[str] = set()
        self._etcd = etcd
        self._http = http
        self.reader = self.another("worker-s0-1")

    def another(self, name: str) -> EventReader:
        """A reader; `key_of` never comes to ask Stripe, since each event has its key."""
        settings = Settings(poll=PollSettings(first_s=0.0), internal_token="between services")
        driver = cast(Driver, None)
        return EventReader(self._etcd, self.stripe, Foreign(), driver, lambda: MAP, self._http, settings, name)

    def ids(self, shard: str) -> list[str]:
        return [event.id for batch in self.got[shard] for event in batch.events]

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer between services"
        shard = request.match_info["shard"]
        if shard in self.refusing:
            return web.Response(status=503)
        self.got[shard].append(msgspec.json.decode(await request.read(), type=HandOver))
        return web.json_response({})


@pytest.fixture
async def account(etcd_cluster: EtcdCluster, request: pytest.FixtureRequest) -> AsyncIterator[Account]:
    prefix = f"/events/{request.node.name}"
    settings = EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix=prefix)
    async with Etcd(settings) as etcd, aiohttp.ClientSession() as http:
        made = Account(etcd, http)
        app, port = web.Application(client_max_size=32 << 20), free_ports(1)[0]
        app.router.add_post("/{shard}/v1/events", made.take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        for shard in SHARDS:
            holder = Holder(f"worker-{shard}-1", "run", f"http://127.0.0.1:{port}/{shard}")
            await etcd.put(f"workers/{shard}", msgspec.json.encode(holder))
        try:
            yield made
        finally:
            await runner.cleanup()


async def cursor(account: Account) -> Cursor:
    record = await account.reader._etcd.get(CURSOR)
    assert record is not None
    return msgspec.json.decode(record.value, type=Cursor)


def keys_of(shard: str, count: int) -> list[str]:
    """Keys whose slot the shard owns."""
    names = (f"k{n}" for n in range(100_000))
    return [key for key in names if MAP.range_of(slot(key)).shard == shard][:count]


def test_the_list_is_asked_for_at_most_twenty_types() -> None:
    assert TYPES < HANDLED
    assert len(TYPES) <= 20


async def test_each_shard_gets_its_own_in_order_and_none_twice(account: Account) -> None:
    mine, theirs = keys_of("s0", 3), keys_of("s1", 2)
    first = [account.stripe.event(key) for key in (mine[0], theirs[0], mine[1])]
    assert not await account.reader.round()
    assert account.ids("s0") == [first[0], first[2]]
    assert account.ids("s1") == [first[1]]
    later = [account.stripe.event(key) for key in (theirs[1], mine[2])]
    await account.reader.round()
    assert account.ids("s0")[2:] == [later[1]]
    assert account.ids("s1")[1:] == [later[0]]
    await account.reader.round()
    assert len(account.ids("s0")) == 3, "nothing new: only the time up to which that is so"
    spans = [(batch.from_s, batch.to_s) for batch in account.got["s0"]]
    assert all(after[0] == before[1] for before, after in itertools.pairwise(spans)), "the spans join"


async def test_the_cursor_waits_for_every_shard_and_the_next_reader_goes_on_from_it(account: Account) -> None:
    [mine], [theirs] = keys_of("s0", 1), keys_of("s1", 1)
    account.stripe.event(mine)
    await account.reader.round()
    before = await cursor(account)
    refused = account.stripe.event(theirs)
    account.refusing.add("s1")
    with pytest.raises(HandOverFailed):
        await account.reader.round()
    assert await cursor(account) == before
    account.refusing.clear()
    await account.another("worker-s1-1").round()
    assert account.ids("s1") == [refused]
    assert (await cursor(account)).event == refused
    assert account.ids("s0") == ["evt_0"]


async def test_a_long_list_is_read_page_by_page(account: Account) -> None:
    [mine] = keys_of("s0", 1)
    account.stripe.event(mine)
    await account.reader.round()
    count = PAGES_MAX * 100 + 50
    for _ in range(count):
        account.stripe.event(mine)
    before = account.stripe.calls
    assert await account.reader.round(), "there is more"
    assert account.stripe.calls - before == PAGES_MAX
    span = account.got["s0"][-1]
    assert span.to_s == (await cursor(account)).until_s == account.got["s0"][0].to_s, "not all until then was read"
    assert not await account.reader.round()
    assert account.ids("s0") == [f"evt_{n}" for n in range(count + 1)]


async def test_a_long_list_without_a_cursor_is_handed_over_in_pieces(account: Account) -> None:
    """From its beginning: a shard takes so much at once, and who reads has so much memory."""
    [mine] = keys_of("s0", 1)
    count = PAGES_MAX * 100 + 50
    for _ in range(count):
        account.stripe.event(mine)
    assert await account.reader.round(), "there is more"
    assert account.ids("s0") == [f"evt_{n}" for n in range(PAGES_MAX * 100)]
    assert (await cursor(account)).event == f"evt_{PAGES_MAX * 100 - 1}"
    assert account.got["s0"][0].to_s == account.got["s0"][0].from_s, "not all until then was read"
    assert not await account.reader.round()
    assert account.ids("s0") == [f"evt_{n}" for n in range(count)]


async def test_an_event_that_can_not_be_read_stops_nobody(account: Account) -> None:
    """And the shards don't take it for one that wasn't there: no payment is unchanged by what they got."""
    [mine], [theirs] = keys_of("s0", 1), keys_of("s1", 1)
    account.stripe.event(mine)
    await account.reader.round()
    body = json.dumps({"id": "pi_odd", "object": "payment_intent", "metadata": {"oncepay_key": 7}}).encode()
    account.stripe.made.append(EventObject("evt_odd", "payment_intent.succeeded", 1, EventData(msgspec.Raw(body))))
    later = account.stripe.event(theirs)
    await account.reader.round()
    assert account.ids("s1") == [later]
    assert (await cursor(account)).event == later
    for shard in SHARDS:
        before, after = account.got[shard][-2:]
        assert before.to_s < after.from_s == after.to_s
    await account.reader.round()
    assert account.got["s0"][-1].from_s == account.got["s0"][-2].to_s


async def test_a_shard_gets_many_events_in_parts(account: Account) -> None:
    [mine] = keys_of("s0", 1)
    account.stripe.event(mine)
    await account.reader.round()
    count = 2 * PART_EVENTS_MAX + 1
    for _ in range(count):
        account.stripe.event(mine)
    await account.reader.round()
    got = account.got["s0"][1:]
    assert [len(batch.events) for batch in got] == [PART_EVENTS_MAX, PART_EVENTS_MAX, 1]
    assert account.ids("s0") == [f"evt_{n}" for n in range(count + 1)]
    assert [batch.to_s > batch.from_s for batch in got] == [False, False, True], "they are all only with the last part"


def test_parts_are_small_and_what_is_larger_goes_alone() -> None:
    def event(size_bytes: int) -> EventObject:
        return EventObject("evt", "charge.updated", 1, EventData(msgspec.Raw(b'"' + b"x" * size_bytes + b'"')))

    third = PART_BYTES_MAX // 3
    sizes = [
        [len(bytes(each.data.object)) for each in part]
        for part in parts([event(third)] * 4 + [event(2 * PART_BYTES_MAX), event(1)])
    ]
    assert [len(part) for part in sizes] == [2, 2, 1, 1]
    assert parts([]) == [[]]


async def test_what_nobody_foresaw_ends_no_reading(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    [mine] = keys_of("s0", 1)
    account.stripe.event(mine)
    events, failed = account.stripe.events, asyncio.Event()

    async def once(**query: Any) -> EventList:
        if not failed.is_set():
            failed.set()
            raise ValueError("an answer that can't be read")
        return await events(**query)

    monkeypatch.setattr(account.stripe, "events", once)
    monkeypatch.setattr(account.reader, "_pause_s", 0.05)
    reading = asyncio.create_task(account.reader._read())
    try:
        async with asyncio.timeout(10):
            while not account.ids("s0"):
                await asyncio.sleep(0.02)
    finally:
        reading.cancel()
    assert failed.is_set()


async def test_an_event_is_handed_over_only_some_time_after_it_was_first_seen(account: Account) -> None:
    """Stripe may list one late, before others: the cursor must not have passed it."""
    [mine] = keys_of("s0", 1)
    account.reader._lag_s = 0.3
    account.stripe.event(mine)
    await account.reader.round()
    late = account.stripe.event(mine, 100)
    account.stripe.made.sort(key=lambda event: event.id != late)  # it comes before the one that was seen
    await account.reader.round()
    assert account.ids("s0") == []
    await asyncio.sleep(0.35)  # the time itself is what is waited for
    await account.reader.round()
    assert account.ids("s0") == [late, "evt_0"]
