"""The aggregator's process: its door for feeds, crashes, and its API over real HTTP and Postgres."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from yarl import URL

from aggregator.cursor import Cursor
from aggregator.migrate import migrate
from aggregator.payout_docs import payout_paths
from oncepay.apikeys import PREFIX, ApiKey, digest
from oncepay.cart import Fee, Item, shares_of
from oncepay.etcd import Etcd
from oncepay.feed import FeedAnswer, FeedBatch, encode_batch, lsn_text
from oncepay.ledger import payment_entry, stripe_fee_entry
from tests.aggregator.database import expected, held
from tests.aggregator.process import TOKEN, Aggregator, Line, aggregator
from tests.aggregator.strategies import DAY_US, FIRST_US, History, entry_row, payment_row, refund_row
from tests.etcd_fixture import EtcdCluster
from tests.postgres_fixture import PostgresServer

pytestmark = pytest.mark.cluster
DAY = dt.date(2026, 9, 21)
ITEMS = [Item("ann", 1000), Item("bob", 250, 2)]


def history_of(count: int, shard: str = "s0") -> History:
    """`count` succeeded payments of one buyer, one a day."""
    history = History(shard)
    for n in range(count):
        key, at_us, lsn = f"{shard}-{n}", FIRST_US + n * DAY_US, history.commit()
        history.payments.append(payment_row(lsn, key, "succeeded", 2, ITEMS, captured=1500, at_us=at_us))
        history.entries.append(entry_row(lsn, key, payment_entry("usd", f"ch_{key}", shares_of(ITEMS, {}, Fee(1000))), at_us))
    return history


@pytest.fixture(scope="module")
def running(aggregator_dsn: str) -> Iterator[Aggregator]:
    with aggregator(aggregator_dsn.replace("postgres@", "oncepay_aggregator:a@")) as process:
        yield process


@pytest.fixture
async def http(running: Aggregator, connection: asyncpg.Connection) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the running aggregator, whose tables are empty."""
    async with aiohttp.ClientSession(running.url) as session:
        yield session


async def post(session: aiohttp.ClientSession, batch: FeedBatch) -> FeedAnswer:
    async with session.post("/v1/feed", data=encode_batch(batch), headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        assert answer.status == 200, await answer.text()
        return msgspec.json.decode(await answer.read(), type=FeedAnswer)


async def get(session: aiohttp.ClientSession, path: str, *, status: int = 200) -> Any:
    async with session.get(path) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json(content_type=None)


async def test_the_feeds_door(http: aiohttp.ClientSession) -> None:
    history = history_of(2)
    auth = {"Authorization": f"Bearer {TOKEN}"}
    async with http.get("/v1/feed/s0", headers=auth) as answer:
        assert await answer.json() == {"watermark": None, "incarnation": "", "epoch": 0}
    assert await post(http, history.whole()) == FeedAnswer(True, history.lsn, "i1", 1)
    assert (await post(http, history.whole())).reason == "gap"
    async with http.get("/v1/feed/s0", headers=auth) as answer:
        assert await answer.json() == {"watermark": history.lsn, "incarnation": "i1", "epoch": 1}


async def test_only_who_knows_the_secret_feeds(http: aiohttp.ClientSession) -> None:
    body = encode_batch(history_of(1).whole())
    for headers in ({}, {"Authorization": "Bearer other"}):
        async with http.post("/v1/feed", data=body, headers=headers) as answer:
            assert answer.status == 401
        async with http.get("/v1/feed/s0", headers=headers) as answer:
            assert answer.status == 401


async def test_what_is_no_batch_is_refused(http: aiohttp.ClientSession) -> None:
    for body in (b"", b"{}", b"\x81", encode_batch(FeedBatch("s0", "i1", 1, 5, 4))):
        async with http.post("/v1/feed", data=body, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
            assert answer.status == 400
            assert (await answer.json(content_type=None))["type"].endswith("malformed-body")


async def test_a_crash_between_commit_and_answer_counts_once(
    aggregator_dsn: str, postgres_server: PostgresServer, connection: asyncpg.Connection
) -> None:
    history = history_of(3)
    async with Line(postgres_server.port).open() as line:
        dsn = aggregator_dsn.replace(f":{postgres_server.port}", f":{line.port}").replace("postgres@", "oncepay_aggregator:a@")
        with aggregator(dsn, wait=False) as first:
            await first.until_ready()
            line.hold = True
            async with aiohttp.ClientSession(first.url) as session:
                sending = asyncio.create_task(post(session, history.whole()))
                await asyncio.wait_for(line.held.wait(), 10)
                first.kill()
                with pytest.raises(aiohttp.ClientError):
                    await sending
    assert (await held(connection))["watermarks"] == {"s0": history.lsn}, "the commit was made"
    with aggregator(aggregator_dsn) as second:
        async with aiohttp.ClientSession(second.url) as session:
            answer = await post(session, history.whole())
    assert (answer.applied, answer.watermark) == (False, history.lsn)
    assert await held(connection) == expected([history])


async def test_a_crash_before_the_commit_leaves_nothing_and_the_resend_counts(
    aggregator_dsn: str, connection: asyncpg.Connection
) -> None:
    history = history_of(3)
    owner = await asyncpg.connect(aggregator_dsn)
    with aggregator(aggregator_dsn) as first:
        async with aiohttp.ClientSession(first.url) as session, owner.transaction():
            await owner.execute("lock table oncepay.kind_totals in access exclusive mode")
            sending = asyncio.create_task(post(session, history.whole()))
            waiting = "select exists (select from pg_locks where not granted and relation = 'oncepay.kind_totals'::regclass)"
            async with asyncio.timeout(10):
                while not await owner.fetchval(waiting):
                    await asyncio.sleep(0.02)
            first.kill()
            with pytest.raises(aiohttp.ClientError):
                await sending
    await owner.close()
    with aggregator(aggregator_dsn) as second:
        async with aiohttp.ClientSession(second.url) as session:
            assert (await post(session, history.whole())).applied
    assert await held(connection) == expected([history])


async def test_ready_only_with_its_database_and_schema(postgres_server: PostgresServer) -> None:
    with aggregator(postgres_server.new_database(), wait=False) as process:
        async with aiohttp.ClientSession(process.url) as session:
            async with asyncio.timeout(20):
                while True:
                    try:
                        problem = await get(session, "/readyz", status=503)
                        break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.05)
            assert "migration 0" in problem["checks"]["database"]
            assert (await get(session, "/livez"))["ok"] is True


async def test_revenue(http: aiohttp.ClientSession) -> None:
    history = history_of(9)
    history.entries.append(refund_row(history.commit(), "s0-0", history.entries[0], FIRST_US + 8 * DAY_US))
    await post(http, history.whole())
    body = await get(http, "/v1/sellers/ann/revenue?currency=usd")
    row = {"from": "2026-09-21", "payments": 9, "gross": 9000, "refunded": 1000, "disputed": 0, "fees": 800, "net": 7200}
    assert body == {
        "seller": "ann",
        "currency": "usd",
        "interval": None,
        "rows": [row],
        "positions": {"s0": lsn_text(history.lsn)},
        "timezone": "UTC",
        "cursor": None,
    }
    part = (await get(http, "/v1/sellers/ann/revenue?currency=usd&from=2026-09-22&to=2026-09-23"))["rows"]
    assert [(row["from"], row["gross"]) for row in part] == [("2026-09-22", 2000)]
    days = (await get(http, "/v1/sellers/bob/revenue?currency=usd&interval=day"))["rows"]
    assert [row["from"] for row in days] == [str(DAY + dt.timedelta(n)) for n in range(9)]
    assert (days[-1]["gross"], days[-1]["refunded"], days[-1]["fees"]) == (500, 500, 0)
    weeks = (await get(http, "/v1/sellers/ann/revenue?currency=usd&interval=week&from=2026-09-23"))["rows"]
    assert [(row["from"], row["payments"]) for row in weeks] == [("2026-09-23", 5), ("2026-09-28", 2)]
    months = (await get(http, "/v1/sellers/ann/revenue?currency=usd&interval=month"))["rows"]
    assert [(row["from"], row["payments"]) for row in months] == [("2026-09-01", 9)]
    assert (await get(http, "/v1/sellers/nobody/revenue?currency=usd"))["rows"] == []
    assert (await get(http, "/v1/sellers/ann/revenue?currency=eur"))["rows"] == []


async def test_revenue_adds_up_over_shards(http: aiohttp.ClientSession) -> None:
    for shard in ("s0", "s1"):
        await post(http, history_of(2, shard).whole())
    body = await get(http, "/v1/sellers/ann/revenue?currency=usd")
    assert (body["rows"][0]["gross"], sorted(body["positions"])) == (4000, ["s0", "s1"])
    assert (await get(http, "/v1/sellers/ann/balance"))["balances"] == [
        {"currency": "usd", "balance": 3600, "credited": 3600, "debited": 0, "pending": 0, "payable": 3600}
    ]


async def test_ids_in_paths_are_decoded(http: aiohttp.ClientSession, running: Aggregator) -> None:
    history, items = History("s0"), [Item("a/b%2F é", 700)]
    lsn = history.commit()
    history.entries.append(entry_row(lsn, "k", payment_entry("usd", "ch", shares_of(items, {}, Fee(0)))))
    await post(http, history.whole())

    path = URL(f"{running.url}/v1/sellers/a%2Fb%252F%20%C3%A9/revenue?currency=usd", encoded=True)
    async with http.get(path) as answer:
        body = await answer.json()
    assert (body["seller"], body["rows"][0]["gross"]) == ("a/b%2F é", 700)


async def test_orders_page_by_page(http: aiohttp.ClientSession) -> None:
    history = history_of(7)
    lsn = history.commit()
    history.payments.append(payment_row(lsn, "late", "failed", 3, ITEMS, at_us=FIRST_US - DAY_US, failure="card_declined"))
    history.payments.append(payment_row(lsn, "other", "created", 1, ITEMS, buyer="someone"))
    await post(http, history.whole())
    seen: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await get(http, f"/v1/buyers/buyer/orders?limit=3{cursor}")
        seen += page["orders"]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
        newer = History("s0", lsn=history.lsn)
        newer.payments.append(payment_row(newer.commit(), f"new{len(seen)}", "created", 1, ITEMS, at_us=FIRST_US + 100 * DAY_US))
        await post(http, newer.batch(history.lsn, newer.lsn))
        history.lsn = newer.lsn
    assert [order["key"] for order in seen] == [*(f"s0-{n}" for n in reversed(range(7))), "late"]
    assert seen[0] == {
        "key": "s0-6", "status": "succeeded", "buyer": "buyer", "currency": "usd", "amount": 1500, "amount_captured": 1500,
        "amount_refunded": 0, "items": [{"seller": "ann", "amount": 1000}, {"seller": "bob", "amount": 250, "quantity": 2}],
        "platform_fee": 150 + 60, "payment_intent": "pi_s0-6", "created_at": "2026-09-27T14:13:20.000Z",
        "updated_at": "2026-09-27T14:13:20.000Z", "version": 2,
    }  # fmt: skip
    assert seen[-1]["failure"] == {"code": "card_declined"}
    assert "hush" not in str(seen), "no client secret"


async def test_sellers_and_totals(http: aiohttp.ClientSession) -> None:
    history = history_of(2)
    lsn = history.commit()
    history.entries.append(entry_row(lsn, "s0-0", stripe_fee_entry("usd", "txn", 60)))
    await post(http, history.whole())
    top = (await get(http, "/v1/sellers?currency=usd&limit=1"))["sellers"]
    assert top == [{"seller": "ann", "currency": "usd", "payments": 2, "gross": 2000, "fees": 200, "net": 1800}]
    totals = await get(http, "/v1/totals")
    assert totals["currencies"] == [
        {"currency": "usd", "payments": 2, "money_in": 3000, "platform_fees": 300, "stripe_fees": 60, "owed": 2700}
    ]
    assert sum(account["balance"] for account in totals["accounts"]) == 0
    assert {account["account"] for account in totals["accounts"]} == {
        "platform:fees", "seller:*:payable", "stripe:clearing", "stripe:fees",
    }  # fmt: skip


async def test_min_position_waits_until_it_is_reached(http: aiohttp.ClientSession) -> None:
    history = history_of(2)
    first = history.payments[0].lsn
    await post(http, history.batch(1000, first))
    asking = asyncio.create_task(get(http, f"/v1/sellers/ann/revenue?currency=usd&min_position=s0:{lsn_text(history.lsn)}"))
    assert (await get(http, f"/v1/positions?min_position=s0:{lsn_text(first)}"))["positions"] == {"s0": lsn_text(first)}
    assert not asking.done()
    await post(http, history.batch(first, history.lsn))
    body = await asyncio.wait_for(asking, 5)
    assert (body["rows"][0]["payments"], body["positions"]) == (2, {"s0": lsn_text(history.lsn)})


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "currency"), ("?currency=xxx", "currency"), ("?currency=usd&currency=eur", "currency"),
        ("?currency=usd&from=2026-02-30", "from"), ("?currency=usd&to=yesterday", "to"),
        ("?currency=usd&from=2026-02-02&to=2026-02-01", "to"), ("?currency=usd&interval=year", "interval"),
        ("?currency=usd&min_position=s0", "min_position"), ("?currency=usd&min_position=s0:0/XYZ", "min_position"),
        ("?currency=usd&form=2026-01-01", "form"), ("?currency=usd&timezone=Mars/Olympus", "timezone"),
        ("?currency=usd&timezone=EST5", "timezone"), ("?currency=usd&cursor=2026-01-01", "cursor"),
        ("?currency=usd&to=9999-12-31", "to"), ("?currency=usd&limit=1001", "limit"),
    ],
)  # fmt: skip
async def test_a_parameter_that_cant_be_used_is_named(http: aiohttp.ClientSession, query: str, field: str) -> None:
    problem = await get(http, f"/v1/sellers/ann/revenue{query}", status=422)
    assert problem["field"] == field
    assert problem["detail"]


NUL = "cursor=" + Cursor(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "a\0b").encode()
"""Postgres takes no such text."""


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "cursor=AAAA", "cursor=%F0%9F", "cursor=", NUL])
async def test_a_page_that_cant_be_had(http: aiohttp.ClientSession, query: str) -> None:
    assert (await get(http, f"/v1/buyers/b/orders?{query}", status=422))["field"] == query.partition("=")[0]


async def test_a_period_that_no_calendar_has(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/reconciliations", json={"from": "9999-12-31", "to": "9999-12-31"}) as answer:
        assert (answer.status, (await answer.json())["field"]) == (422, "to")


async def test_the_api_document_names_every_call(http: aiohttp.ClientSession) -> None:
    document = await get(http, "/openapi.json")
    assert set(document["paths"]) == {
        "/v1/sellers/{seller}/revenue", "/v1/sellers/{seller}/balance", "/v1/buyers/{buyer}/orders", "/v1/sellers",
        "/v1/totals", "/v1/positions", "/v1/sellers/{seller}/statement", "/v1/sellers/{seller}/statement.csv",
        "/v1/payments/{payment}/history", "/v1/trial-balance", "/v1/profit", "/v1/reconciliations", "/v1/reconciliations/{id}",
        "/v1/reconciliations/{id}/differences", "/v1/reconciliations/{id}/differences.csv", *payout_paths(), "/v1/status",
        "/v1/event-endpoints",
        *(f"/v1/event-endpoints/{{id}}{rest}" for rest in ("", "/secret", "/replay", "/deliveries", "/dead-letters")),
    }  # fmt: skip
    await post(http, history_of(1).whole())
    body = await get(http, "/v1/sellers/ann/revenue?currency=usd")
    schema = document["components"]["schemas"]
    assert set(body) == set(schema["Revenue"]["properties"])
    assert set(body["rows"][0]) == set(schema["RevenueRow"]["properties"])


async def test_reading_takes_the_scope_read(aggregator_dsn: str) -> None:
    with EtcdCluster(1) as cluster:
        settings = cluster.settings()
        async with Etcd(settings) as etcd:
            for name, scopes in (("reader", ("read",)), ("payer", ("pay",))):
                await etcd.put(PREFIX + digest(name), msgspec.json.encode(ApiKey(name, scopes)))  # type: ignore[arg-type]
        with aggregator(aggregator_dsn, etcd=settings) as process:
            for key, status in (("reader", 200), ("payer", 403), ("nobody", 401)):
                async with aiohttp.ClientSession(process.url, headers={"Authorization": f"Bearer {key}"}) as session:
                    for path in ("/v1/positions", "/v1/totals", "/v1/sellers", "/v1/buyers/b/orders", "/v1/sellers/a/balance"):
                        await get(session, path, status=status)


async def test_a_sellers_own_key_sees_that_seller_alone(aggregator_dsn: str) -> None:
    with EtcdCluster(1) as cluster:
        settings = cluster.settings()
        async with Etcd(settings) as etcd:
            await etcd.put(PREFIX + digest("ann's"), msgspec.json.encode(ApiKey("ann", ("read",), seller="ann")))
        headers = {"Authorization": "Bearer ann's"}
        with aggregator(aggregator_dsn, etcd=settings) as process:
            async with aiohttp.ClientSession(process.url, headers=headers) as session:
                for path in ("balance", "revenue?currency=usd", "statement?currency=usd"):
                    await get(session, f"/v1/sellers/ann/{path}")
                    await get(session, f"/v1/sellers/bob/{path}", status=403)
                for path in ("positions", "totals", "sellers", "buyers/ann/orders", "trial-balance", "profit?currency=usd"):
                    await get(session, f"/v1/{path}", status=403)


async def test_statement_page_by_page_and_whole(http: aiohttp.ClientSession) -> None:
    history = history_of(5)
    await post(http, history.whole())
    path, cursor, closing = "/v1/sellers/ann/statement?currency=usd&from=2026-09-22&limit=3", "", 900
    for count in (3, 1):
        page = await get(http, path + cursor)
        assert (page["opening_balance"], len(page["entries"]), page["final"]) == (closing, count, False)
        closing, cursor = page["closing_balance"], f"&cursor={page['cursor']}"
        assert page["entries"][-1]["balance"] == closing
    assert (closing, page["cursor"]) == (4500, None)
    async with http.get("/v1/sellers/ann/statement.csv?currency=usd") as answer:
        assert answer.content_type == "text/csv"
        lines = (await answer.text()).splitlines()
    assert (len(lines), lines[1].split(",")[1:6:4]) == (8, ["opening_balance", "0"])
    assert lines[-1].split(",")[1:] == ["closing_balance", "", "", "", "4500", "", "45.00", "usd"]
    assert (await get(http, "/v1/sellers/platform/statement?currency=usd", status=422))["field"] == "seller"


async def test_trial_balance_and_profit(http: aiohttp.ClientSession) -> None:
    history = history_of(2)
    history.entries.append(entry_row(history.commit(), "s0-0", stripe_fee_entry("usd", "txn", 60)))
    await post(http, history.whole())
    (now,) = (await get(http, "/v1/trial-balance?currency=usd"))["currencies"]
    assert now["debit"] == now["credit"] == 3060
    at = f"s0:{lsn_text(history.payments[0].lsn)}"
    then = await get(http, f"/v1/trial-balance?at={at}")
    assert then["positions"] == {"s0": at.removeprefix("s0:")}
    assert {a["account"]: a["balance"] for a in then["currencies"][0]["accounts"]} == {
        "platform:fees": -150, "seller:*:payable": -1350, "stripe:clearing": 1500,
    }  # fmt: skip
    (profit,) = (await get(http, "/v1/profit?currency=usd"))["rows"]
    assert (profit["fees"], profit["stripe_fees"], profit["profit"]) == (300, 60, 240)
    days = await get(http, "/v1/profit?currency=usd&interval=day&limit=1")
    assert (days["rows"][0]["profit"], days["cursor"]) == (90, "2026-09-22")


async def test_a_crash_of_its_database_is_survived() -> None:
    history = history_of(4)
    half = history.payments[1].lsn
    with PostgresServer(fsync=True) as server:
        dsn = server.new_database()
        await migrate(dsn, passwords={})
        with aggregator(dsn) as process:
            async with aiohttp.ClientSession(process.url) as session:
                assert (await post(session, history.batch(1000, half))).applied
                server.stop()
                rest = history.batch(half, history.lsn)
                headers = {"Authorization": f"Bearer {TOKEN}"}
                for _ in range(3):  # also with the connections that the crash broke
                    async with session.post("/v1/feed", data=encode_batch(rest), headers=headers) as answer:
                        assert answer.status == 503
                        assert "Retry-After" in answer.headers
                    await get(session, "/v1/totals", status=503)
                await get(session, "/readyz", status=503)
                server.start()
                assert (await post(session, rest)).applied
                assert (await get(session, "/v1/totals"))["currencies"][0]["payments"] == 4
                assert (await get(session, "/readyz"))["ok"]
