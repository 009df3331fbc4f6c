"""Pages, filters, expansion and search."""

from __future__ import annotations

from typing import Any

import pytest
import stripe
from stripe import StripeClient

from sandbox.stripe.forms import decode
from tests.sandbox.process import stripe_client


async def made(client: StripeClient, count: int, **more: Any) -> list[str]:
    found = []
    for number in range(count):
        params: Any = {"amount": 1000 + number, "currency": "usd", **more}
        found.append((await client.v1.payment_intents.create_async(params)).id)
    return found


async def test_pages_go_both_ways(fresh: Any) -> None:
    async with stripe_client(fresh().url) as client:
        ids = await made(client, 25)
        newest = ids[::-1]
        first = await client.v1.payment_intents.list_async()
        assert ([item.id for item in first.data], first.has_more) == (newest[:10], True)
        second = await client.v1.payment_intents.list_async({"limit": 10, "starting_after": newest[9]})
        assert ([item.id for item in second.data], second.has_more) == (newest[10:20], True)
        last = await client.v1.payment_intents.list_async({"limit": 10, "starting_after": newest[19]})
        assert ([item.id for item in last.data], last.has_more) == (newest[20:], False)
        before = await client.v1.payment_intents.list_async({"limit": 10, "ending_before": newest[20]})
        assert ([item.id for item in before.data], before.has_more) == (newest[10:20], True)
        assert [item.id async for item in first.auto_paging_iter()] == newest
        for limit, count in ((0, 1), (500, 25)):
            page = await client.v1.payment_intents.list_async({"limit": limit})
            assert len(page.data) == count
        with pytest.raises(stripe.InvalidRequestError) as unknown:
            await client.v1.payment_intents.list_async({"starting_after": "pi_3nothing"})
        assert unknown.value.param == "starting_after"


async def test_created_ranges(fresh: Any) -> None:
    stand_in = fresh()
    async with stripe_client(stand_in.url) as client:
        groups = []
        for _ in range(3):
            groups.append(await made(client, 3))
            stand_in.advance(1000)
        times = []
        for group in groups:
            times.append((await client.v1.payment_intents.retrieve_async(group[0])).created)

        async def found(**bounds: int) -> set[str]:
            params: Any = {"created": bounds, "limit": 100}
            page = await client.v1.payment_intents.list_async(params)
            return {item.id for item in page.data}

        assert await found(gte=times[1]) == {*groups[1], *groups[2]}
        assert await found(gte=times[1] + 500) == {*groups[2]}
        assert await found(lt=times[1]) == {*groups[0]}
        assert await found(gt=times[0] + 500, lte=times[2] - 500) == {*groups[1]}
        assert await found(gte=times[2] + 5000) == set()


async def test_events_by_type(fresh: Any) -> None:
    async with stripe_client(fresh().url) as client:
        await made(client, 3)
        paid = await made(client, 2, confirm=True, payment_method="pm_card_visa", capture_method="automatic")
        one = await client.v1.events.list_async({"type": "payment_intent.succeeded"})
        assert [event.data.object["id"] for event in one.data] == paid[::-1]
        stars = await client.v1.events.list_async({"type": "charge.*"})
        assert {event.type for event in stars.data} == {"charge.succeeded"}
        both = await client.v1.events.list_async({"types": ["payment_intent.succeeded", "payment_intent.created"], "limit": 4})
        assert both.has_more
        assert [event.type for event in both.data][:2] == ["payment_intent.succeeded", "payment_intent.created"]
        rest = await client.v1.events.list_async(
            {"types": ["payment_intent.succeeded", "payment_intent.created"], "starting_after": both.data[-1].id}
        )
        assert len(rest.data) == 3
        again = await client.v1.events.retrieve_async(both.data[0].id)
        assert again.data.object["id"] == paid[-1]


async def test_expand_in_lists_and_refusals(client: StripeClient) -> None:
    await made(client, 1, confirm=True, payment_method="pm_card_visa", capture_method="automatic")
    page = await client.v1.payment_intents.list_async({"limit": 1, "expand": ["data.latest_charge.balance_transaction"]})
    charge = page.data[0].latest_charge
    assert isinstance(charge, stripe.Charge)
    assert isinstance(charge.balance_transaction, stripe.BalanceTransaction)
    posted = await client.v1.balance_transactions.list_async({"limit": 1, "expand": ["data.source"]})
    assert isinstance(posted.data[0].source, stripe.Charge)
    for path in ("nothing", "latest_charge.nothing"):
        with pytest.raises(stripe.InvalidRequestError, match="cannot be expanded"):
            await client.v1.payment_intents.retrieve_async(page.data[0].id, {"expand": [path]})


async def test_search(client: StripeClient) -> None:
    wanted = await made(client, 3, metadata={"oncepay_key": "find me"})
    await client.v1.payment_intents.cancel_async(wanted[0])

    async def found(query: str, **more: Any) -> list[str]:
        params: Any = {"query": query, **more}
        page = await client.v1.payment_intents.search_async(params)
        return [item.id for item in page.data]

    assert await found('metadata["oncepay_key"]:"find me"') == wanted[::-1]
    assert await found("metadata['oncepay_key']:'find me' AND status:'canceled'") == [wanted[0]]
    assert await found('metadata["oncepay_key"]:"find me" AND -status:"canceled" AND amount>1001') == [wanted[2]]
    assert await found('metadata["oncepay_key"]:"nobody"') == []
    page = await client.v1.payment_intents.search_async({"query": 'metadata["oncepay_key"]:"find me"', "limit": 2})
    assert page.has_more
    assert [item.id async for item in page.auto_paging_iter()] == wanted[::-1]
    with pytest.raises(stripe.InvalidRequestError):
        await found("colour:'red'")


def test_forms() -> None:
    params = decode("a=1&b[c]=2&b[d][e]=3&f[]=x&f[]=y&g[0]=p&g[1]=q&h=&b%5Bz%5D=%C3%A9")
    assert params.values == {
        "a": "1",
        "b": {"c": "2", "d": {"e": "3"}, "z": "é"},
        "f": ["x", "y"],
        "g": ["p", "q"],
        "h": "",
    }
