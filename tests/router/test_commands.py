"""Captures, refunds and disputes on the whole cluster, against the stand-in for Stripe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from oncepay.client import Oncepay, PaymentView, Problem
from tests.router.conftest import CART

pytestmark = pytest.mark.cluster

VISA = "pm_card_visa"
Fresh = Callable[[], str]


async def until(look: Callable[[], Awaitable[PaymentView]], done: Callable[[PaymentView], bool]) -> PaymentView:
    """Look again until it is so; at most 20 s."""
    async with asyncio.timeout(20):
        while not done(payment := await look()):
            await asyncio.sleep(0.1)
        return payment


def accounts(payment: PaymentView) -> dict[str, int]:
    """The balance of each account over the payment's entries; every entry sums to zero by itself."""
    sums: dict[str, int] = {}
    for entry in payment.entries:
        assert sum(posting["amount"] for posting in entry["postings"]) == 0
        for posting in entry["postings"]:
            sums[posting["account"]] = sums.get(posting["account"], 0) + posting["amount"]
    return sums


async def paid(client: Oncepay, key: str, card: str = VISA) -> PaymentView:
    payment = await client.pay(key, **CART, payment_method=card)
    assert payment.status == "succeeded"
    return payment


async def test_a_whole_refund_takes_everything_back(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh())
    refunded = await client.refund(payment.key, command="all", reason="requested_by_customer")
    assert (refunded.status, refunded.amount_refunded) == ("succeeded", 3397)
    assert [(r["key"], r["status"], r["amount"]) for r in refunded.refunds] == [("all", "succeeded", 3397)]
    shown = await until(lambda: client.get(payment.key), lambda p: accounts(p).get("refunds:held") == 0 and len(p.entries) == 4)
    sums = accounts(shown)
    assert sums["seller:records-4:payable"] == sums["platform:fees"] == 0
    assert sums["stripe:clearing"] == -129  # Stripe keeps its fee


async def test_a_replayed_refund_gives_back_once(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh())
    first, again = await asyncio.gather(*(client.refund(payment.key, command="r1", amount=1000) for _ in range(2)))
    assert sorted([first.replayed, again.replayed]) == [False, True]
    assert (await client.get(payment.key)).amount_refunded == 1000
    with pytest.raises(Problem) as caught:
        await client.refund(payment.key, command="r1", amount=1001)
    assert (caught.value.slug, caught.value.field) == ("idempotency-key-reused", "Idempotency-Key")


async def test_concurrent_refunds_never_exceed_the_payment(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh())
    answers = await asyncio.gather(
        *(client.refund(payment.key, command=f"r{n}", amount=1000) for n in range(6)), return_exceptions=True
    )
    done = [answer for answer in answers if isinstance(answer, PaymentView)]
    refused = [answer for answer in answers if isinstance(answer, Problem)]
    assert len(done) == 3
    assert {(problem.status, problem.slug, problem.field) for problem in refused} == {(422, "invalid-amount", "amount")}
    assert (await client.refund(payment.key, command="rest")).amount_refunded == 3397


async def test_a_refund_names_items(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh())
    await client.refund(payment.key, command="disc", items=[{"seller": "records-4", "amount": 1499}])
    shown = await client.get(payment.key)
    assert accounts(shown)["seller:records-4:payable"] == -2698 + 1349
    for items, field in (
        ([{"seller": "records-4", "amount": 1500}], "items[0].amount"),
        ([{"seller": "nobody", "amount": 1}], "items[0].seller"),
        ([{"seller": "platform", "amount": 0}], "items[0].amount"),
    ):
        with pytest.raises(Problem) as caught:
            await client.refund(payment.key, items=items)
        assert caught.value.field == field


async def test_a_refund_that_fails_later_is_reversed(client: Oncepay, stripe: aiohttp.ClientSession, fresh: Fresh) -> None:
    payment = await paid(client, fresh(), "pm_card_refundFail")
    await client.refund(payment.key, command="r")
    shown = await until(lambda: client.get(payment.key), lambda p: p.refunds[0]["status"] == "failed")
    assert shown.amount_refunded == 0
    shown = await until(lambda: client.get(payment.key), lambda p: accounts(p)["refunds:held"] == 0)
    sums = accounts(shown)
    assert (sums["seller:records-4:payable"], sums["stripe:clearing"]) == (-2698, 3397 - 129)


async def test_a_pending_refund_ends_by_itself(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh(), "pm_card_pendingRefund")
    refunded = await client.refund(payment.key, command="r")
    assert refunded.amount_refunded == 3397
    await until(lambda: client.get(payment.key), lambda p: p.refunds[0]["status"] == "succeeded")


async def test_a_refund_made_at_stripe_is_adopted(client: Oncepay, stripe: aiohttp.ClientSession, fresh: Fresh) -> None:
    payment = await paid(client, fresh())
    async with stripe.post("/v1/refunds", data={"payment_intent": payment.payment_intent or "", "amount": "500"}) as answer:
        made = await answer.json()
    shown = await until(lambda: client.get(payment.key), lambda p: bool(p.refunds))
    assert [(r["key"], r["amount"]) for r in shown.refunds] == [(f"stripe:{made['id']}", 500)]
    assert shown.amount_refunded == 500


async def test_only_what_succeeded_is_refunded(client: Oncepay, fresh: Fresh) -> None:
    payment = await client.pay(fresh(), **CART)
    with pytest.raises(Problem) as caught:
        await client.refund(payment.key)
    assert (caught.value.status, caught.value.slug) == (409, "wrong-state")


@pytest.mark.parametrize(
    ("part", "amount", "payable"),
    [
        ({}, 3397, -2698),
        ({"amount": 1000}, 1000, -795),
        ({"items": [{"seller": "records-4", "amount": 1499}]}, 1499, -1349),
    ],
)
async def test_a_capture_takes_all_or_a_part(
    client: Oncepay, fresh: Fresh, part: dict[str, Any], amount: int, payable: int
) -> None:
    payment = await client.pay(fresh(), **CART, payment_method=VISA, capture_method="manual")
    assert payment.status == "requires_capture"
    captured = await client.capture(payment.key, command="c", **part)
    assert (captured.status, captured.amount_captured) == ("succeeded", amount)
    again = await client.capture(payment.key, command="c", **part)
    assert again.replayed
    assert accounts(await client.get(payment.key))["seller:records-4:payable"] == payable
    with pytest.raises(Problem) as caught:
        await client.capture(payment.key, command="c2", amount=1)
    assert caught.value.slug == "wrong-state"


async def test_more_than_was_authorised_is_not_captured(client: Oncepay, fresh: Fresh) -> None:
    payment = await client.pay(fresh(), **CART, payment_method=VISA, capture_method="manual")
    with pytest.raises(Problem) as caught:
        await client.capture(payment.key, amount=3398)
    assert (caught.value.slug, caught.value.field) == ("invalid-amount", "amount")
    assert (await client.cancel(payment.key)).status == "canceled"


async def test_a_dispute_takes_the_money_and_a_win_brings_it_back(
    client: Oncepay, http: aiohttp.ClientSession, fresh: Fresh
) -> None:
    payment = await paid(client, fresh(), "pm_card_createDispute")
    shown = await until(
        lambda: client.get(payment.key), lambda p: bool(p.disputes) and any(e["kind"] == "dispute" for e in p.entries)
    )
    dispute = shown.disputes[0]
    assert dispute["status"] == "needs_response"
    lost = accounts(shown)
    assert lost["seller:records-4:payable"] == -2698 + 2998  # the platform keeps its fee, so the seller owes
    async with http.get("/v1/disputes?limit=100") as answer:
        assert dispute["id"] in {each["id"] for each in (await answer.json())["disputes"]}
    path = f"/v1/payments/{payment.key}/disputes/{dispute['id']}/evidence"
    async with http.post(path, json={"evidence": {"uncategorized_text": "winning_evidence"}}) as answer:
        assert answer.status == 200
    shown = await until(
        lambda: client.get(payment.key),
        lambda p: p.disputes[0]["status"] == "won" and any(e["kind"] == "dispute_reinstated" for e in p.entries),
    )
    assert accounts(shown)["seller:records-4:payable"] == -2698


async def test_an_inquiry_moves_no_money(client: Oncepay, fresh: Fresh) -> None:
    payment = await paid(client, fresh(), "pm_card_createDisputeInquiry")
    shown = await until(lambda: client.get(payment.key), lambda p: bool(p.disputes))
    assert shown.disputes[0]["status"].startswith("warning_")
    assert not [entry for entry in shown.entries if entry["kind"].startswith("dispute")]


async def test_lists_page_over_all_shards(client: Oncepay, http: aiohttp.ClientSession, fresh: Fresh) -> None:
    buyer = f"lister-{fresh()}"
    made = [await client.pay(fresh(), **{**CART, "buyer": buyer}, payment_method=VISA, wait_s=0) for _ in range(7)]
    keys = [payment.key for payment in reversed(made)]
    assert [payment.key async for payment in client.payments(buyer=buyer, limit=3)] == keys
    assert {payment.key async for payment in client.payments(buyer=buyer, seller="records-4", status="succeeded")} <= set(keys)
    assert [payment.key async for payment in client.payments(buyer=buyer, seller="nobody")] == []
    for query, field in (("limit=0", "limit"), ("status=lost", "status"), ("cursor=%21", "cursor"), ("colour=red", "colour")):
        async with http.get(f"/v1/payments?{query}") as answer:
            problem = await answer.json(content_type="application/problem+json")
        assert (answer.status, problem["field"]) == (422, field)


@pytest.mark.parametrize("what", ["confirm", "capture", "cancel", "refunds"])
async def test_a_command_needs_a_key_and_a_payment(http: aiohttp.ClientSession, fresh: Fresh, what: str) -> None:
    body = {"payment_method": VISA} if what == "confirm" else {}
    async with http.post(f"/v1/payments/{fresh()}/{what}", json=body) as answer:
        problem = await answer.json(content_type="application/problem+json")
    assert (answer.status, problem["field"]) == (400, "Idempotency-Key")
    async with http.post(f"/v1/payments/{fresh()}/{what}", json=body, headers={"Idempotency-Key": "k"}) as answer:
        assert answer.status == 404
