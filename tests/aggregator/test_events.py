"""Events out: the published signature, whom they may be sent to, and that each is delivered, in order per key."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator import apply
from aggregator.database import Database, DatabaseUnavailable
from aggregator.events import deliver, endpoints
from aggregator.events.calls import EventCalls
from aggregator.events.endpoints import PREFIX, Endpoint, Endpoints, Secret, new_endpoint, rolled
from aggregator.events.guard import PrivateAddress, PublicResolver, check_url, is_public, may_reach
from aggregator.events.record import events_of
from aggregator.events.signing import headers, new_secret, signature
from oncepay.errors import EtcdUnavailable, InvalidField, TooBusy
from oncepay.etcd import Etcd, EtcdOutcomeUnknown, Mirror
from oncepay.settings import EtcdSettings
from tests.aggregator.database import empty
from tests.aggregator.strategies import History, histories, payment_row
from tests.aggregator.test_apply import ITEMS, REAL, paid
from tests.aggregator.test_payout_balances import payout_row
from tests.etcd_fixture import EtcdCluster

CLUSTER = pytest.mark.cluster
QUICK = (0.02, 0.02, 0.02)


def test_the_signature_is_that_of_the_published_scheme() -> None:
    """As the reference library (standardwebhooks 1.1.0) signs it."""
    secret, event = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxTek"
    assert signature(secret, event, 1614265330, b'{"test": 2432232314}') == "v1,5fs26vBgKvmsKxCVxwV5w2v530u1q0VVD95LB0UcdAs="
    sent = headers([secret, new_secret()], event, 1614265330, b"{}")
    assert (sent["webhook-id"], sent["webhook-timestamp"], len(sent["webhook-signature"].split())) == (event, "1614265330", 2)


def test_a_rolled_secret_signs_for_a_day() -> None:
    first = Endpoint("we_1", "https://x.example/", (Secret(new_secret()),))
    after = rolled(first)
    now_ms = after.secrets[1].until_ms - 1
    assert after.current_secrets(now_ms) == [after.secrets[0].value, first.secrets[0].value]
    assert after.current_secrets(now_ms + 1) == [after.secrets[0].value]
    assert len(rolled(after).secrets) == 2


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"),
        *("ff02::1", "240.0.0.1", "not an address"),
    ],
)
def test_no_address_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *("http://shop.example/", "ftp://shop.example/", "https://", "https://user:pw@shop.example/", "https://shop.example/#x"),
        *("https://127.0.0.1/", "https://[::1]/", "https://localhost/", "https://10.0.0.8:8443/", "https://shop.example:99999/"),
        *("https://shop.example/ x", "https://" + "a" * 2_000, "not a url", "https://LOCALHOST./"),
    ],
)
def test_an_endpoint_that_may_not_be(url: str) -> None:
    with pytest.raises(InvalidField):
        check_url(url, allow_private=False)


def test_an_endpoint_that_may_be() -> None:
    assert check_url("https://shop.example:8443/hooks?x=1", allow_private=False)
    assert check_url("http://127.0.0.1:9000/", allow_private=True)
    assert not may_reach("127.0.0.1")


async def test_names_are_checked_by_what_they_resolve_to() -> None:
    """Also spellings that only a resolver takes for an address."""
    resolver = PublicResolver()
    for host in ("localhost", "127.1", "2130706433", "0x7f000001"):
        with contextlib.suppress(socket.gaierror):
            with pytest.raises(PrivateAddress):
                await resolver.resolve(host, 80)
    await resolver.close()


async def test_a_guarded_session_connects_to_no_private_address() -> None:
    reached = False

    async def handle(request: web.BaseRequest) -> web.Response:
        nonlocal reached
        reached = True
        return web.Response()

    async with listening(handle) as url:
        named = url.replace("127.0.0.1", "localhost")
        connector = aiohttp.TCPConnector(resolver=PublicResolver())
        async with aiohttp.ClientSession(connector=connector) as http:
            with pytest.raises((PrivateAddress, aiohttp.ClientError)):
                await http.post(named)
    assert not reached


@given(histories(), st.data())
def test_the_same_events_however_the_log_is_cut(history: History, data: st.DataObject) -> None:
    commits = list(range(1000, history.lsn + 1, 100))
    cuts = sorted(data.draw(st.sets(st.sampled_from(commits))) | {1000, history.lsn})
    whole = [event.id for event in events_of(history.whole())]
    pieces, states = list[str](), dict[str, str]()
    for start, end in itertools.pairwise(cuts):
        batch = history.batch(start, end)
        pieces += [event.id for event in events_of(batch, states)]
        states |= {row.key: row.status for row in batch.payments}
    assert pieces == whole
    assert len(set(whole)) == len(whole)
    of_key: dict[str, list[str]] = defaultdict(list)
    for event in events_of(history.whole()):
        of_key[event.key].append(event.type)
    assert all(types[0] == "payment.created" for key, types in of_key.items() if not key.startswith("payout:"))


def test_what_only_the_platform_cares_about_is_no_event() -> None:
    history = History("s0")
    for version, status in enumerate(("created", "attempted", "confirming", "succeeded", "succeeded"), 1):
        history.payments.append(payment_row(history.commit(), "k", status, version, ITEMS, captured=1500))
    assert [event.type for event in events_of(history.whole())] == ["payment.created", "payment.succeeded"]
    assert Endpoint("e", "u", (), ("payment.*",)).wants("payment.created")
    assert not Endpoint("e", "u", (), ("payment.*",)).wants("refund.created")


@contextlib.asynccontextmanager
async def listening(handle: Callable[[web.BaseRequest], Any]) -> AsyncIterator[str]:
    """A server on a free port."""
    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


class Shop:
    """Takes events, while it is `open`; `answer` says with which status. `seen` has those that it took, by key, in order."""

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, Any]], int] = lambda event, body: 204
        self.seen: dict[str, list[str]] = defaultdict(list)
        self.bodies: dict[str, dict[str, Any]] = {}
        self.signatures: list[tuple[bytes, dict[str, str]]] = []
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()
        self._changed = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        raw = await request.read()
        self.asked += 1
        self._changed.set()
        await self.open.wait()
        body, event = json.loads(raw), request.headers["webhook-id"]
        status = self.answer(event, body)
        if status < 300:
            self.seen[body["data"]["key"]].append(event)
            self.bodies[event] = body
            self.signatures.append((raw, dict(request.headers)))
        self._changed.set()
        return web.Response(status=status)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def delivered(self) -> set[str]:
        return {event for events in self.seen.values() for event in events}


@pytest.fixture(scope="module")
def etcd_settings() -> Iterator[EtcdSettings]:
    with EtcdCluster(1) as cluster:
        yield cluster.settings()


class Sending:
    """A sender with one endpoint, whose process can be killed: `stop` gives it no time for anything."""

    def __init__(self, etcd: Etcd, database: Database, endpoints: Endpoints, endpoint: Endpoint) -> None:
        self.etcd = etcd
        self.database = database
        self.endpoints = endpoints
        self.endpoint = endpoint
        self.sender = deliver.Sender(database, endpoints, allow_private=True)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.sender = deliver.Sender(self.database, self.endpoints, allow_private=True)
        self._task = asyncio.create_task(self.sender.work())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def query(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with self.database.connection("work") as connection:
            found: list[asyncpg.Record] = await connection.fetch(deliver.SQL[name], *arguments)
            return found


@pytest.fixture
async def shop() -> AsyncIterator[tuple[Shop, str]]:
    box = Shop()
    async with listening(box.handle) as url:
        yield box, url


@pytest.fixture
async def sending(
    monkeypatch: pytest.MonkeyPatch, aggregator_dsn: str, connection: asyncpg.Connection, etcd_settings: EtcdSettings,
    shop: tuple[Shop, str],
) -> AsyncIterator[Sending]:  # fmt: skip
    monkeypatch.setattr(deliver, "GAPS_S", QUICK)
    monkeypatch.setattr(deliver, "LOCK_EVERY_S", 0.05)
    dsn = aggregator_dsn.replace("postgres@", "oncepay_aggregator:a@")
    async with Etcd(etcd_settings) as etcd, Database(dsn) as database:
        records = Endpoints(etcd)
        records.start()
        endpoint = new_endpoint(shop[1], (), "")
        await records.add(endpoint)
        made = Sending(etcd, database, records, endpoint)
        made.start()
        yield made
        await made.stop()
        await records.remove(endpoint.id)
        await records.stop()


@CLUSTER
async def test_events_are_delivered_signed_with_items_and_in_order(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    history, box = paid(), shop[0]
    await apply.apply(connection, history.whole(), recording=True)
    sending.sender.poke()
    await box.until(lambda: len(box.delivered()) == 2)
    created, succeeded = (box.bodies[event] for event in box.seen["k"])
    assert (created["type"], succeeded["type"]) == ("payment.created", "payment.succeeded")
    assert succeeded["data"]["items"] == [
        {"seller": "ann", "amount": 1000},
        {"seller": "bob", "amount": 250, "quantity": 2},
    ]
    assert (succeeded["data"]["platform_fee"], succeeded["data"]["amount_captured"]) == (130 + 80, 1500)
    raw, sent = box.signatures[-1]
    secret = sending.endpoint.secrets[0].value
    assert sent["webhook-signature"] == signature(secret, sent["webhook-id"], int(sent["webhook-timestamp"]), raw)
    assert "hush" not in raw.decode()
    async with asyncio.timeout(5):
        while len(log := await sending.query("deliveries", sending.endpoint.id, None, 10)) < 2:
            await asyncio.sleep(0.02)
    assert [(row["status"], row["problem"], row["attempt"]) for row in log] == [(204, "", 1)] * 2


@CLUSTER
async def test_a_key_that_fails_holds_up_only_itself_and_keeps_its_order(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    box, refused = shop[0], list[str]()

    def answer(event: str, body: dict[str, Any]) -> int:
        if body["data"]["key"] == "bad" and len(refused) < 2:
            refused.append(event)
            return 500
        return 200

    box.answer = answer
    for shard, key in (("s0", "bad"), ("s1", "good")):
        await apply.apply(connection, paid(shard, key).whole(), recording=True)
    sending.sender.poke()
    await box.until(lambda: len(box.seen["good"]) == len(box.seen["bad"]) == 2)
    assert len(set(refused)) == 1, "the second event waited behind the first"
    assert [box.bodies[event]["type"] for event in box.seen["bad"]] == ["payment.created", "payment.succeeded"]


@CLUSTER
async def test_what_is_given_up_is_a_dead_letter_and_can_be_sent_again(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    box = shop[0]
    tries: dict[str, int] = defaultdict(int)

    def answer(event: str, body: dict[str, Any]) -> int:
        tries[event] += 1
        return 503

    box.answer = answer
    await apply.apply(connection, paid().whole(), recording=True)
    sending.sender.poke()
    name = sending.endpoint.id
    await box.until(lambda: sorted(tries.values()) == [len(QUICK) + 1] * 2)
    async with asyncio.timeout(5):
        while len(dead := await sending.query("dead_letters", name, 10)) < 2:
            await asyncio.sleep(0.02)
    assert dead[0]["problem"] == "answered 503"
    box.answer = lambda event, body: 200
    await sending.query("revive", name)
    sending.sender.poke()
    await box.until(lambda: len(box.seen["k"]) == 2)
    first = await connection.fetchval("select min(recorded_at) from oncepay.events")
    await sending.query("replay_since", name, first)
    sending.sender.poke()
    await box.until(lambda: len(box.seen["k"]) == 4)
    assert box.seen["k"][:2] == box.seen["k"][2:]
    await sending.query("replay_one", name, box.seen["k"][0])
    sending.sender.poke()
    await box.until(lambda: len(box.seen["k"]) == 5)


@CLUSTER
async def test_a_replay_is_not_undone_by_a_page_that_was_under_way(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    box, history = shop[0], paid()
    await apply.apply(connection, history.whole(), recording=True)
    sending.sender.poke()
    await box.until(lambda: len(box.seen["k"]) == 2)
    first = await connection.fetchval("select min(recorded_at) from oncepay.events")
    box.open.clear()
    before = history.lsn
    history.payments.append(payment_row(history.commit(), "late", "created", 1, ITEMS))
    await apply.apply(connection, history.batch(before, history.lsn), recording=True)
    sending.sender.poke()
    await box.until(lambda: box.asked == 3)
    assert [row["shard"] for row in await sending.query("replay_since", sending.endpoint.id, first)] == ["s0"]
    box.open.set()
    sending.sender.poke()
    await box.until(lambda: len(box.seen["k"]) == 4 and len(box.seen["late"]) == 2)
    assert box.seen["k"][:2] == box.seen["k"][2:]


OF_OTHERS = "select endpoint from oncepay.event_cursors where endpoint <> $1"


class Posted:
    """A request, as far as a handler reads it."""

    def __init__(self, body: object) -> None:
        self._body = json.dumps(body).encode()

    async def read(self) -> bytes:
        return self._body


def made_over(sending: Sending, database: Database, url: str) -> Awaitable[web.Response]:
    """An endpoint made by the call."""
    calls = EventCalls(sending.endpoints, database, sending.sender, allow_private=True)
    return calls.make(cast(web.Request, Posted({"url": url})))


def failing(error: Exception) -> Callable[..., Awaitable[None]]:
    """A method that raises it."""

    async def method(*_: object) -> None:
        raise error

    return method


@CLUSTER
async def test_an_endpoint_has_its_cursors_before_a_sender_can_find_it(
    monkeypatch: pytest.MonkeyPatch, connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    history, begun = paid(), list[tuple[int, int]]()
    await apply.apply(connection, history.whole(), recording=True)
    put = Etcd.put

    async def looked(etcd: Etcd, key: str, value: bytes, lease: int = 0) -> int:
        begun.extend((row["lsn"], row["ordinal"]) for row in await sending.query("shards", key.removeprefix(PREFIX)))
        return await put(etcd, key, value, lease)

    monkeypatch.setattr(Etcd, "put", looked)
    made = json.loads(cast(bytes, (await made_over(sending, sending.database, shop[1])).body))
    await sending.endpoints.remove(made["id"])
    assert begun == [(history.lsn, 2**31 - 1)], "it begins at what is applied"


@CLUSTER
async def test_an_endpoint_that_could_not_be_made_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    await apply.apply(connection, paid().whole(), recording=True)
    async with Database("postgresql://127.0.0.1:1/nowhere") as away:
        with pytest.raises(DatabaseUnavailable):
            await made_over(sending, away, shop[1])
    assert await sending.etcd.count(PREFIX) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "wait_revision", failing(EtcdUnavailable("not seen")))
        with pytest.raises(EtcdUnavailable):
            await made_over(sending, sending.database, shop[1])
    assert await sending.etcd.count(PREFIX) == 1
    monkeypatch.setattr(endpoints, "ENDPOINTS_MAX", 1)
    with pytest.raises(TooBusy):
        await made_over(sending, sending.database, shop[1])
    assert await connection.fetchval(OF_OTHERS, sending.endpoint.id) is None


@CLUSTER
async def test_an_endpoint_that_may_have_been_made_keeps_its_cursors(
    monkeypatch: pytest.MonkeyPatch, connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    await apply.apply(connection, paid().whole(), recording=True)
    monkeypatch.setattr(Etcd, "put", failing(EtcdOutcomeUnknown("cut off")))
    with pytest.raises(EtcdOutcomeUnknown):
        await made_over(sending, sending.database, shop[1])
    assert await connection.fetchval(OF_OTHERS, sending.endpoint.id) is not None


@CLUSTER
async def test_an_endpoint_that_is_gone_is_turned_off(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    shop[0].answer = lambda event, body: 410
    await apply.apply(connection, paid().whole(), recording=True)
    sending.sender.poke()
    async with asyncio.timeout(10):
        while (found := sending.endpoints.find(sending.endpoint.id)) is None or found.enabled:
            await asyncio.sleep(0.02)
    assert found.reason == "it answered 410 Gone"


@CLUSTER
async def test_a_sender_that_is_killed_again_and_again_loses_nothing_and_keeps_the_order(
    connection: asyncpg.Connection, sending: Sending, shop: tuple[Shop, str]
) -> None:
    box, asked, failed = shop[0], itertools.count(), Counter[str]()

    def answer(event: str, _body: object) -> int:
        """Each third is refused; none so often that it is given up, which rounds of three would do to the same one."""
        if next(asked) % 3 or failed[event] == 2:
            return 200
        failed[event] += 1
        return 500

    box.answer = answer
    history = History("s0")
    for round_ in range(8):
        before = history.lsn
        for n in range(6):
            version = round_ + 1
            status = "created" if version == 1 else "requires_action" if version % 2 else "processing"
            history.payments.append(payment_row(history.commit(), f"k{n}", status, version, ITEMS))
        await apply.apply(connection, history.batch(before, history.lsn), recording=True)
        sending.sender.poke()
        count = len(box.delivered())
        with contextlib.suppress(TimeoutError):
            await box.until(lambda count=count: len(box.delivered()) > count, 2)  # type: ignore[misc]
        await sending.stop()
        sending.start()
    wanted = {event.id for event in events_of(history.whole())}
    await box.until(lambda: box.delivered() == wanted, 30)
    for key, events in box.seen.items():
        versions = [box.bodies[event]["data"]["version"] for event in dict.fromkeys(events)]
        assert versions == sorted(versions), key


@REAL
@CLUSTER
@given(history=histories(), data=st.data())
async def test_recorded_once_with_whatever_is_sent_again(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, data: st.DataObject
) -> None:
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    commits = list(range(1000, history.lsn + 1, 100))
    cuts = sorted(data.draw(st.sets(st.sampled_from(commits))) | {1000, history.lsn})
    for start, end in itertools.pairwise(cuts):
        for _ in range(2):
            await apply.apply(connection, history.batch(start, end), recording=True)
    rows = await connection.fetch("select id from oncepay.events order by shard, lsn, ordinal")
    assert [row["id"] for row in rows] == [event.id for event in events_of(history.whole())]


@CLUSTER
async def test_a_later_version_of_what_was_over_before_is_no_event(connection: asyncpg.Connection) -> None:
    """Nobody wanted events then, or they are forgotten."""
    history = paid()
    payouts = [payout_row(history.commit(), "ann", 1, status="paid", version=version) for version in (3, 4)]
    batch = history.batch(1000, payouts[0].lsn)
    await apply.apply(connection, replace(batch, payouts=(payouts[0],)))
    history.payments.append(payment_row(history.commit(), "k", "succeeded", 3, ITEMS, captured=1500))
    history.payments.append(payment_row(history.commit(), "new", "created", 1, ITEMS))
    batch = history.batch(payouts[0].lsn, history.lsn)
    await apply.apply(connection, replace(batch, payouts=(payouts[1],)), recording=True)
    assert [tuple(row) for row in await connection.fetch("select type, key from oncepay.events")] == [("payment.created", "new")]


@CLUSTER
@pytest.mark.parametrize("order", [("s0", "s1"), ("s1", "s0")])
async def test_a_moved_payments_states_are_events_in_either_order(connection: asyncpg.Connection, order: tuple[str, str]) -> None:
    """The source's earlier state is one also when the target has brought the same state's later version."""
    streams = {"s0": History("s0"), "s1": History("s1")}
    for shard, version, status in (
        *(("s0", 1, "created"), ("s0", 2, "requires_action"), ("s1", 3, "processing"), ("s1", 4, "requires_action")),
    ):
        history = streams[shard]
        history.payments.append(payment_row(history.commit(), "k", status, version, ITEMS))
    for shard in order:
        for lsn in (1000, 1100):
            await apply.apply(connection, streams[shard].batch(lsn, lsn + 100), recording=True)
    rows = await connection.fetch("select data::jsonb->>'version' as version from oncepay.events order by 1")
    assert [row["version"] for row in rows] == ["1", "2", "3", "4"]
