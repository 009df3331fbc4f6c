"""The payments API on the whole cluster: charged once, refused clearly, moved on by whoever is alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from oncepay.client import Oncepay, Problem
from tests.router.conftest import CART, intents_of

pytestmark = pytest.mark.cluster

VISA = "pm_card_visa"
DECLINED = "pm_card_visa_chargeDeclined"


async def test_a_payment_is_charged_and_booked(client: Oncepay) -> None:
    payment = await client.pay(await client.new_key(), **CART, payment_method=VISA)
    assert (payment.status, payment.amount, payment.amount_captured, payment.replayed) == ("succeeded", 3397, 3397, False)
    shown = await client.get(payment.key)
    while len(shown.entries) < 2:  # a webhook may have told of the success, without the fee, before the answer did
        await asyncio.sleep(0.05)
        shown = await client.get(payment.key)
    postings = [(p["account"], p["amount"]) for entry in shown.entries for p in entry["postings"]]
    assert sum(amount for _, amount in postings) == 0
    assert ("stripe:clearing", 3397) in postings
    assert ("seller:records-4:payable", -2698) in postings
    assert ("stripe:fees", 129) in postings
    assert shown.platform_fee == 300


async def test_many_clients_with_one_key_make_one_charge(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    key = fresh()
    answers = await asyncio.gather(*(client.pay(key, **CART, payment_method=VISA) for _ in range(100)))
    assert {(a.status, a.payment_intent) for a in answers} == {("succeeded", answers[0].payment_intent)}
    assert sum(not a.replayed for a in answers) == 1
    confirmed = [i for i in await intents_of(stripe, key) if i["status"] == "succeeded"]
    assert [i["id"] for i in confirmed] == [answers[0].payment_intent]


async def test_a_replay_shows_the_payment_as_it_is_now(client: Oncepay, fresh: Callable[[], str]) -> None:
    key = fresh()
    first = await client.pay(key, **CART, payment_method=VISA, wait_s=0)
    assert first.status in {"created", "attempted", "confirming", "succeeded"}
    await client.wait(key)
    again = await client.pay(f'"{key}"', **CART, payment_method="pm_card_mastercard", metadata={"try": "2"})
    assert (again.key, again.status, again.replayed) == (key, "succeeded", True)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("buyer", {"buyer": "buyer-2"}),
        ("currency", {"currency": "eur"}),
        ("items", {"items": [{"seller": "records-4", "amount": 1499, "quantity": 3}]}),
        ("capture_method", {"capture_method": "manual"}),
    ],
)
async def test_a_key_used_with_other_fields_is_refused(
    client: Oncepay, fresh: Callable[[], str], field: str, change: dict[str, Any]
) -> None:
    key = fresh()
    await client.pay(key, **CART, payment_method=VISA)
    with pytest.raises(Problem) as caught:
        await client.pay(key, **{**CART, **change}, payment_method=VISA)
    assert (caught.value.status, caught.value.slug, caught.value.field) == (422, "idempotency-key-reused", field)


def body(**change: Any) -> bytes:
    return json.dumps({**CART, **change}).encode()


def item(**change: Any) -> bytes:
    return body(items=[{"seller": "a", "amount": 1000, **change}])


BAD: dict[str, tuple[bytes, int, str, str | None]] = {
    "not JSON": (b"nonsense", 400, "malformed-body", None),
    "empty": (b"", 400, "malformed-body", None),
    "not an object": (b"[]", 400, "malformed-body", None),
    "a member is missing": (b'{"buyer": "b", "currency": "usd"}', 400, "malformed-body", "items"),
    "an unknown member": (body(colour="red"), 400, "malformed-body", "colour"),
    "a text for a number": (item(amount="1000"), 400, "malformed-body", "items[0].amount"),
    "a fractional amount": (item(amount=10.5), 400, "malformed-body", "items[0].amount"),
    "an overflowing amount": (item(amount=10**30), 422, "invalid-amount", "items[0].amount"),
    "a negative amount": (item(amount=-1), 422, "invalid-amount", "items[0].amount"),
    "nothing": (item(amount=0), 422, "invalid-amount", "items[0].amount"),
    "less than Stripe's minimum": (item(amount=49), 422, "invalid-amount", "items[0].amount"),
    "more than Stripe's maximum": (item(amount=50_000_000, quantity=2), 422, "invalid-amount", "items[0].amount"),
    "an unknown currency": (body(currency="zzz"), 422, "unknown-currency", "currency"),
    "no items": (body(items=[]), 422, "invalid-field", "items"),
    "no quantity": (item(quantity=0), 422, "invalid-field", "items[0].quantity"),
    "no seller": (item(seller=""), 422, "invalid-field", "items[0].seller"),
    "no buyer": (body(buyer=""), 422, "invalid-field", "buyer"),
    "a NUL": (item(description="a\0b"), 422, "invalid-field", "items[0].description"),
    "reserved metadata": (body(metadata={"oncepay_key": "x"}), 422, "invalid-field", "metadata.oncepay_key"),
    "a strange payment method": (body(payment_method="pm card"), 422, "invalid-field", "payment_method"),
    "too long a life": (body(expires_in=10**9), 422, "invalid-field", "expires_in"),
    "too large": (body(buyer="b" * (2 << 20)), 413, "body-too-large", None),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_body_is_a_problem_and_makes_no_row(http: aiohttp.ClientSession, fresh: Callable[[], str], what: str) -> None:
    sent, status, slug, field = BAD[what]
    key = fresh()
    async with http.post("/v1/payments", data=sent, headers={"Idempotency-Key": key}) as answer:
        problem = await answer.json(content_type="application/problem+json")
        assert (answer.status, problem["status"], problem["type"].rsplit("/")[-1]) == (status, status, slug)
        assert problem.get("field") == field
        assert problem["title"]
    async with http.get(f"/v1/payments/{key}") as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    ("key", "code", "slug"),
    [
        (None, 400, "missing-idempotency-key"),
        ("", 400, "missing-idempotency-key"),
        ("k" * 201, 400, "invalid-idempotency-key"),
        ("seller:4", 400, "invalid-idempotency-key"),
        ("pi_123", 400, "invalid-idempotency-key"),
        ("ok1_" + "A" * 32, 400, "invalid-idempotency-key"),
    ],
)
async def test_a_bad_key_is_a_problem(http: aiohttp.ClientSession, key: str | None, code: int, slug: str) -> None:
    headers = {} if key is None else {"Idempotency-Key": key}
    async with http.post("/v1/payments", data=body(payment_method=VISA), headers=headers) as answer:
        problem = await answer.json(content_type="application/problem+json")
    assert (answer.status, problem["type"].rsplit("/")[-1], problem["field"]) == (code, slug, "Idempotency-Key")


async def test_who_has_no_api_key_is_refused(http: aiohttp.ClientSession, fresh: Callable[[], str]) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        async with http.post("/v1/payments", data=body(), headers={**headers, "Idempotency-Key": fresh()}) as answer:
            assert answer.status == 401
            assert (await answer.json(content_type="application/problem+json"))["type"].endswith("/unauthorized")


async def test_a_decline_fails_a_payment_that_brought_its_card(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    payment = await client.pay(fresh(), **CART, payment_method=DECLINED)
    assert payment.status == "failed"
    assert payment.failure == {
        "code": "card_declined",
        "message": "Your card was declined.",
        "decline_code": "generic_decline",
    }
    assert [i["status"] for i in await intents_of(stripe, payment.key)] == ["canceled"]


async def test_another_card_may_be_tried(client: Oncepay, fresh: Callable[[], str]) -> None:
    payment = await client.pay(fresh(), **CART, payment_method=DECLINED, on_decline="retry")
    assert payment.status == "requires_payment_method"
    again = await client.confirm(payment.key, VISA)
    assert (again.status, again.payment_intent) == ("succeeded", payment.payment_intent)


async def test_a_canceled_payment_can_not_be_paid_by_a_late_browser(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    """A card is declined, the payment is given up, and the tab that still has the client secret tries again."""
    payment = await client.pay(fresh(), **CART, payment_method=DECLINED, on_decline="retry")
    assert payment.client_secret
    canceled = await client.cancel(payment.key)
    assert canceled.status == "canceled"
    async with stripe.post(
        f"/v1/payment_intents/{payment.payment_intent}/confirm",
        data={"payment_method": VISA, "client_secret": payment.client_secret, "key": "pk_test_browser"},
        headers={"Authorization": "Bearer pk_test_browser"},
    ) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "payment_intent_unexpected_state")
    with pytest.raises(Problem) as caught:
        await client.confirm(payment.key, VISA)
    assert caught.value.slug == "wrong-state"


async def test_a_payment_without_a_card_waits_for_the_browser(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    payment = await client.pay(fresh(), **CART)
    assert payment.status == "attempted"
    async with stripe.post(
        f"/v1/payment_intents/{payment.payment_intent}/confirm",
        data={"payment_method": VISA, "client_secret": payment.client_secret, "key": "pk_test_browser"},
        headers={"Authorization": "Bearer pk_test_browser"},
    ) as answer:
        assert answer.status == 200
    assert (await client.wait(payment.key)).status == "succeeded"  # told by the webhook


async def test_a_failed_payment_has_one_successor(client: Oncepay, fresh: Callable[[], str]) -> None:
    failed = await client.pay(fresh(), **CART, payment_method=DECLINED)
    second = fresh()
    assert (await client.pay(second, **CART, payment_method=VISA, after=failed.key)).status == "succeeded"
    assert (await client.pay(second, **CART, payment_method=VISA, after=failed.key)).replayed
    for after in (failed.key, second):
        with pytest.raises(Problem) as caught:
            await client.pay(fresh(), **CART, payment_method=VISA, after=after)
        assert (caught.value.slug, caught.value.field) == ("predecessor-not-over", "after")


async def test_webhooks_are_taken_only_when_signed(http: aiohttp.ClientSession) -> None:
    event = b'{"id": "evt_1", "type": "payment_intent.succeeded", "created": 1, "data": {"object": {}}}'
    for signature in ("", "t=1,v1=00", "nonsense"):
        async with http.post("/v1/webhooks/stripe", data=event, headers={"Stripe-Signature": signature}) as answer:
            problem = await answer.json(content_type="application/problem+json")
        assert (answer.status, problem["type"].rsplit("/")[-1]) == (400, "bad-signature")
