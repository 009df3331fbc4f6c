"""Sellers on the whole cluster: put, shown, and their fees frozen into payments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from deploy.local import Cluster
from oncepay.cart import Fee, Item
from oncepay.errors import InvalidField
from oncepay.etcd import Etcd
from oncepay.keys import seller_key, slot
from router.fees import FRESH_S, REFUSED_FRESH_S, STALE_S, STALE_WAIT_S, Fees
from shard.store.sellers import Seller, get_seller, put_seller
from shard.store.store import Shards
from tests.router.conftest import CART

pytestmark = pytest.mark.cluster

VISA = "pm_card_visa"
BODY: dict[str, Any] = {"payee": "payee-1", "currency": "usd", "fee": {"basis_points": 250, "fixed_minor": 30}}
Fresh = Callable[[], str]


@pytest.fixture
async def store(cluster: Cluster) -> AsyncIterator[Shards]:
    """A store as a router has it."""
    settings = cluster.settings
    async with Etcd(settings.etcd) as etcd:
        shards = Shards(etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor="test")
        await shards.start()
        try:
            yield shards
        finally:
            await shards.stop()


async def put(http: aiohttp.ClientSession, seller: str, body: Any) -> tuple[int, dict[str, Any], str]:
    async with http.put(f"/v1/sellers/{seller}", json=body) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers.get("ETag", "")


async def test_a_seller_is_put_shown_and_replaced(http: aiohttp.ClientSession, fresh: Fresh) -> None:
    seller = fresh()
    status, made, tag = await put(http, seller, BODY)
    assert (status, tag, made["version"]) == (201, '"1"', 1)
    assert {name: made[name] for name in ("id", *BODY)} == {"id": seller, **BODY}
    assert await put(http, seller, BODY) == (200, made, '"1"')
    status, replaced, tag = await put(http, seller, {"payee": "payee-2", "currency": "EUR"})
    assert (status, tag) == (200, '"2"')
    assert (replaced["payee"], replaced["currency"], replaced["fee"]) == ("payee-2", "eur", None)
    assert replaced["created_at"] == made["created_at"]
    async with http.get(f"/v1/sellers/{seller}") as answer:
        assert (answer.status, await answer.json(), answer.headers["ETag"]) == (200, replaced, '"2"')


async def test_what_a_client_has_already_is_not_sent_again(http: aiohttp.ClientSession, fresh: Fresh) -> None:
    seller = fresh()
    await put(http, seller, BODY)
    for sent, status in (('"1"', 304), ('W/"1"', 304), ('"7", "1"', 304), ("*", 304), ('"2"', 200), ("1", 200)):
        async with http.get(f"/v1/sellers/{seller}", headers={"If-None-Match": sent}) as answer:
            assert (sent, answer.status, answer.headers["ETag"]) == (sent, status, '"1"')
            assert bool(await answer.read()) == (status == 200)


async def test_puts_at_the_same_moment_make_one_seller(http: aiohttp.ClientSession, fresh: Fresh) -> None:
    seller = fresh()
    answers = await asyncio.gather(*(put(http, seller, BODY) for _ in range(8)))
    assert sorted(status for status, _, _ in answers) == [200] * 7 + [201]
    assert {made["version"] for _, made, _ in answers} == {1}
    answers = await asyncio.gather(*(put(http, seller, {**BODY, "payee": f"payee-{n}"}) for n in range(2, 8)))
    assert sorted(made["version"] for _, made, _ in answers) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"payee": ""}, 422, "payee"),
        ({"payee": "p" * 65}, 422, "payee"),
        ({"payee": "a\0b"}, 422, "payee"),
        ({"currency": "zzz"}, 422, "currency"),
        ({"fee": {"basis_points": -1}}, 422, "fee.basis_points"),
        ({"fee": {"basis_points": 10_001}}, 422, "fee.basis_points"),
        ({"fee": {"basis_points": 1, "fixed_minor": -1}}, 422, "fee.fixed_minor"),
        ({"fee": {"basis_points": 1, "fixed_minor": 10**30}}, 422, "fee.fixed_minor"),
        ({"fee": {"fixed_minor": 1}}, 400, "fee.basis_points"),
        ({"fee": {"basis_points": 1, "more": 1}}, 400, "fee.more"),
        ({"fee": {"basis_points": 1.5}}, 400, "fee.basis_points"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
async def test_a_bad_seller_is_a_problem_and_makes_no_row(
    http: aiohttp.ClientSession, fresh: Fresh, change: dict[str, Any], code: int, field: str
) -> None:
    seller = fresh()
    status, problem, _ = await put(http, seller, {**BODY, **change})
    assert (status, problem["field"]) == (code, field)
    async with http.get(f"/v1/sellers/{seller}") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("seller", ["platform", "s" * 65, "%00", "%7F"])
async def test_ids_that_no_seller_has(http: aiohttp.ClientSession, seller: str) -> None:
    code, problem, _ = await put(http, seller, BODY)
    assert (code, problem["field"]) == (422, "id")
    async with http.get(f"/v1/sellers/{seller}") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("name", ["é 中", "a%2Fb", "a%3Fb%23c", "{x}", "s" * 50])
async def test_ids_are_any_printable_text(http: aiohttp.ClientSession, fresh: Fresh, name: str) -> None:
    path = f"{name}{fresh()[-12:]}"
    status, made, _ = await put(http, path, BODY)
    assert status == 201
    async with http.get(f"/v1/sellers/{path}") as answer:
        assert await answer.json() == made


async def pay(http: aiohttp.ClientSession, key: str, *sellers: str) -> dict[str, Any]:
    body = {**CART, "items": [{"seller": seller, "amount": 1000} for seller in sellers], "payment_method": VISA}
    async with http.post("/v1/payments", json=body, headers={"Idempotency-Key": key}) as answer:
        assert answer.status == 201
        made: dict[str, Any] = await answer.json()
        return made


async def test_the_fee_is_the_sellers_own_and_frozen(http: aiohttp.ClientSession, fresh: Fresh) -> None:
    own, unknown, default = fresh(), fresh(), fresh()
    await put(http, own, BODY)
    await put(http, default, {"payee": "p", "currency": "usd"})
    first = await pay(http, fresh(), own, unknown, default, "platform", own)
    assert first["platform_fee"] == (50 + 30) + 100 + 100
    await put(http, own, {**BODY, "fee": {"basis_points": 0}})
    async with asyncio.timeout(3 * FRESH_S):  # whichever router answers, it knows within FRESH_S
        while (await pay(http, fresh(), own))["platform_fee"] != 0:
            await asyncio.sleep(0.2)
    async with http.get(f"/v1/payments/{first['key']}") as answer:
        assert (await answer.json())["platform_fee"] == first["platform_fee"]


async def test_a_cart_costs_one_read_a_shard_and_then_none(store: Shards, fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    sellers = [fresh() for _ in range(40)]
    for seller in sellers[:4]:
        await put_seller(store, "test", Seller(seller, "p", "usd", Fee(100, 5)))
    reads = 0
    for shard in store.maps.current.shards():
        batcher = store.batcher(shard)

        async def read(query: str, *arguments: object, plain: Any = batcher.read) -> Any:
            nonlocal reads
            reads += 1
            return await plain(query, *arguments)

        monkeypatch.setattr(batcher, "read", read)
    fees = Fees(store)
    items = [Item(seller, 1000) for seller in sellers]
    answers = await asyncio.gather(*(fees.of(items) for _ in range(20)))
    assert answers == [dict.fromkeys(sellers[:4], Fee(100, 5))] * 20
    assert reads == 2
    assert await fees.of(items) == answers[0]  # what isn't there is remembered too
    assert reads == 2


async def test_unknown_sellers_are_refused_where_a_setting_says_so(store: Shards, fresh: Fresh) -> None:
    known, unknown = fresh(), fresh()
    seller, outcome = await put_seller(store, "test", Seller(known, "p", "usd"))
    assert (outcome, await get_seller(store, known)) == ("created", seller)
    fees = Fees(store, refuse_unknown=True)
    assert await fees.of([Item(known, 1), Item("platform", 1)]) == {}
    for _ in range(2):
        with pytest.raises(InvalidField) as caught:
            await fees.of([Item("platform", 1), Item(known, 1), Item(unknown, 1)])
        assert caught.value.field == "items[2].seller"
    await put_seller(store, "test", Seller(unknown, "p", "usd", Fee(7)))  # by another router
    async with asyncio.timeout(REFUSED_FRESH_S + 2):
        while True:
            try:
                assert await fees.of([Item(unknown, 1)]) == {unknown: Fee(7)}
                break
            except InvalidField:
                await asyncio.sleep(0.05)


async def test_a_known_fee_outlives_its_shard_for_a_while(store: Shards, fresh: Fresh) -> None:
    seller = next(name for name in iter(fresh, "") if store.maps.current.range_of(slot(seller_key(name))).shard == "s0")
    await put_seller(store, "test", Seller(seller, "p", "usd", Fee(100, 5)))
    fees = Fees(store)
    await fees.of([Item(seller, 1)])
    fees._known[seller].fresh_until_s = 0.0
    async with store.batcher("s0")._reader_lock:  # a shard that doesn't answer
        async with asyncio.timeout(STALE_WAIT_S + 1):
            assert await fees.of([Item(seller, 1)]) == {seller: Fee(100, 5)}
        async with asyncio.timeout(STALE_WAIT_S / 2):  # and nobody waits again soon
            assert await fees.of([Item(seller, 1)]) == {seller: Fee(100, 5)}
        fees._known[seller].fresh_until_s = 0.0
        fees._known[seller].read_at_s -= STALE_S
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fees.of([Item(seller, 1)]), 2 * STALE_WAIT_S)
    await fees.stop()


async def test_a_seller_is_written_only_where_its_slot_is(store: Shards, fresh: Fresh) -> None:
    """The database itself refuses a slot that isn't its own, whatever a router believes."""
    key = next(seller_key(name) for name in iter(fresh, "") if slot(seller_key(name)) < 32_768)
    there, here = store.maps.current.ranges[0], store.maps.current.ranges[1]
    assert (there.shard, here.shard) == ("s0", "s1")
    for first in (here.first, there.first):
        row = await store.batcher("s1").write(
            "select outcome from oncepay.put_seller($1, 'test', 'n', $2, $3, 'p', 'usd', null, null, now())",
            first,
            slot(key),
            key,
        )
        assert row["outcome"] == "moved"
    with pytest.raises(InvalidField, match="sellers_slot_of_key"):
        await store.batcher("s0").write(
            "select outcome from oncepay.put_seller($1, 'test', 'n', $2, $3, 'p', 'usd', null, null, now())",
            there.first,
            (slot(key) + 1) % 32_768,
            key,
        )
