"""Payment intents over their whole life."""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import pytest
import stripe
from stripe import StripeClient

from tests.sandbox.process import StandIn, event_of, stripe_client

VISA = "pm_card_visa"


async def paid(client: StripeClient, **more: Any) -> stripe.PaymentIntent:
    params: Any = {"amount": 2000, "currency": "usd", "payment_method": VISA, "confirm": True, **more}
    return await client.v1.payment_intents.create_async(params)


async def test_create_then_confirm(client: StripeClient) -> None:
    intent = await client.v1.payment_intents.create_async(
        {"amount": 1099, "currency": "USD", "metadata": {"oncepay_key": "k1"}, "description": "an order"}
    )
    assert intent.status == "requires_payment_method"
    assert intent.currency == "usd"
    assert intent.capture_method == "automatic_async"
    assert intent.client_secret is not None
    assert intent.client_secret.startswith(intent.id + "_secret_")
    done = await client.v1.payment_intents.confirm_async(intent.id, {"payment_method": VISA})
    assert (done.status, done.amount_received, done.last_payment_error) == ("succeeded", 1099, None)
    assert isinstance(done.latest_charge, str)
    assert done.payment_method != VISA
    charge = await client.v1.charges.retrieve_async(done.latest_charge)
    assert charge.metadata.to_dict() == {"oncepay_key": "k1"}
    assert charge.description == "an order"
    assert (charge.paid, charge.captured, charge.amount_captured, charge.outcome.type) == (True, True, 1099, "authorized")  # type: ignore[union-attr]


async def test_automatic_posts_at_once_with_the_fee(client: StripeClient) -> None:
    intent = await paid(client, capture_method="automatic", expand=["latest_charge.balance_transaction"])
    charge = intent.latest_charge
    assert isinstance(charge, stripe.Charge)
    posted = charge.balance_transaction
    assert isinstance(posted, stripe.BalanceTransaction)
    assert (posted.amount, posted.fee, posted.net) == (2000, 88, 1912)
    assert (posted.type, posted.reporting_category, posted.source) == ("charge", "charge", charge.id)
    assert [(detail.amount, detail.type) for detail in posted.fee_details] == [(88, "stripe_fee")]
    assert posted.status == "pending"


async def test_automatic_async_posts_a_moment_later(client: StripeClient) -> None:
    intent = await paid(client, expand=["latest_charge"])
    charge = intent.latest_charge
    assert isinstance(charge, stripe.Charge)
    assert charge.balance_transaction is None
    event = await event_of(client, "charge.updated", charge.id)
    assert event.data.object["balance_transaction"].startswith("txn_")
    assert event.to_dict()["data"]["previous_attributes"] == {"balance_transaction": None}
    assert event.request is not None
    assert event.request.id is None


async def test_manual_capture_of_a_part(client: StripeClient) -> None:
    intent = await paid(client, capture_method="manual")
    assert (intent.status, intent.amount_capturable, intent.amount_received) == ("requires_capture", 2000, 0)
    with pytest.raises(stripe.InvalidRequestError) as too_much:
        await client.v1.payment_intents.capture_async(intent.id, {"amount_to_capture": 2001})
    assert too_much.value.code == "amount_too_large"
    done = await client.v1.payment_intents.capture_async(
        intent.id, {"amount_to_capture": 1500, "expand": ["latest_charge.balance_transaction"]}
    )
    assert (done.status, done.amount_received, done.amount_capturable) == ("succeeded", 1500, 0)
    assert isinstance(done.latest_charge, stripe.Charge)
    assert done.latest_charge.balance_transaction.amount == 1500  # type: ignore[union-attr]
    with pytest.raises(stripe.InvalidRequestError) as again:
        await client.v1.payment_intents.capture_async(intent.id)
    assert again.value.code == "payment_intent_unexpected_state"


async def test_cancel_releases_and_is_final(client: StripeClient) -> None:
    intent = await paid(client, capture_method="manual")
    gone = await client.v1.payment_intents.cancel_async(intent.id, {"cancellation_reason": "abandoned"})
    assert (gone.status, gone.cancellation_reason, gone.amount_capturable) == ("canceled", "abandoned", 0)
    assert gone.canceled_at is not None
    assert isinstance(gone.latest_charge, str)
    charge = await client.v1.charges.retrieve_async(gone.latest_charge)
    assert (charge.captured, charge.refunded, charge.balance_transaction) == (False, True, None)
    for call in (client.v1.payment_intents.confirm_async, client.v1.payment_intents.cancel_async):
        with pytest.raises(stripe.InvalidRequestError) as refused:
            await call(intent.id)
        assert refused.value.code == "payment_intent_unexpected_state"
        assert refused.value.error is not None
        assert refused.value.error.payment_intent is not None
        assert refused.value.error.payment_intent.status == "canceled"


async def test_confirm_twice_or_without_a_method(client: StripeClient) -> None:
    intent = await client.v1.payment_intents.create_async({"amount": 500, "currency": "usd"})
    with pytest.raises(stripe.InvalidRequestError, match="missing a payment method") as bare:
        await client.v1.payment_intents.confirm_async(intent.id)
    assert bare.value.code == "payment_intent_unexpected_state"
    await client.v1.payment_intents.confirm_async(intent.id, {"payment_method": VISA})
    with pytest.raises(stripe.InvalidRequestError, match="already succeeded"):
        await client.v1.payment_intents.confirm_async(intent.id, {"payment_method": VISA})


async def test_update(client: StripeClient) -> None:
    intent = await client.v1.payment_intents.create_async({"amount": 500, "currency": "usd", "metadata": {"a": "1", "b": "2"}})
    changed = await client.v1.payment_intents.update_async(
        intent.id, {"amount": 700, "metadata": {"a": "", "c": "3"}, "payment_method": VISA}
    )
    assert changed.metadata is not None
    assert (changed.amount, changed.metadata.to_dict(), changed.status) == (700, {"b": "2", "c": "3"}, "requires_confirmation")
    cleared = await client.v1.payment_intents.update_async(intent.id, {"metadata": ""})
    assert cleared.metadata is not None
    assert cleared.metadata.to_dict() == {}
    await client.v1.payment_intents.confirm_async(intent.id)
    with pytest.raises(stripe.InvalidRequestError) as late:
        await client.v1.payment_intents.update_async(intent.id, {"amount": 800})
    assert late.value.code == "payment_intent_unexpected_state"
    noted = await client.v1.payment_intents.update_async(intent.id, {"metadata": {"after": "yes"}})
    assert noted.metadata is not None
    assert noted.metadata.to_dict() == {"after": "yes"}


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({"amount": 49, "currency": "usd"}, "amount_too_small", "amount"),
        ({"amount": 29, "currency": "gbp"}, "amount_too_small", "amount"),
        ({"amount": 100_000_000, "currency": "usd"}, "amount_too_large", "amount"),
        ({"amount": 0, "currency": "usd"}, "parameter_invalid_integer", "amount"),
        ({"amount": "ten", "currency": "usd"}, "parameter_invalid_integer", "amount"),
        ({"currency": "usd"}, "parameter_missing", "amount"),
        ({"amount": 500}, "parameter_missing", "currency"),
        ({"amount": 500, "currency": "zzz"}, None, "currency"),
        ({"amount": 500, "currency": "usd", "capture_method": "later"}, None, "capture_method"),
        ({"amount": 500, "currency": "usd", "colour": "red"}, "parameter_unknown", "colour"),
        ({"amount": 500, "currency": "usd", "customer": "cus_nobody"}, "resource_missing", "customer"),
        ({"amount": 500, "currency": "usd", "payment_method": "pm_nothing"}, "resource_missing", "payment_method"),
    ],
)
async def test_refused_parameters(client: StripeClient, params: Any, code: str | None, param: str) -> None:
    with pytest.raises(stripe.InvalidRequestError) as refused:
        await client.v1.payment_intents.create_async(params)
    assert (refused.value.code, refused.value.param) == (code, param)


async def test_unknown_ids(client: StripeClient) -> None:
    with pytest.raises(stripe.InvalidRequestError) as intent:
        await client.v1.payment_intents.retrieve_async("pi_3nothing")
    assert (intent.value.http_status, intent.value.code, intent.value.param) == (404, "resource_missing", "intent")
    with pytest.raises(stripe.InvalidRequestError) as charge:
        await client.v1.refunds.create_async({"charge": "ch_3nothing"})
    assert (charge.value.http_status, charge.value.code, charge.value.param) == (404, "resource_missing", "id")


async def test_keys(shared: StandIn) -> None:
    for key in ("sk_live_x", "nonsense"):
        async with stripe_client(shared.url, key) as stranger:
            with pytest.raises(stripe.AuthenticationError):
                await stranger.v1.payment_intents.list_async()
    basic = {"Authorization": aiohttp.encode_basic_auth("sk_test_basic", "")}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{shared.url}/v1/charges", headers=basic) as answer:
            assert answer.status == 200
            assert answer.headers["Request-Id"].startswith("req_")
            assert "Stripe-Version" in answer.headers
        async with session.get(f"{shared.url}/v1/charges") as answer:
            assert answer.status == 401


async def test_a_browser_pays_with_the_client_secret(client: StripeClient, shared: StandIn) -> None:
    intent = await client.v1.payment_intents.create_async({"amount": 500, "currency": "usd", "metadata": {"internal": "x"}})
    url = f"{shared.url}/v1/payment_intents/{intent.id}"
    secret = str(intent.client_secret)
    async with aiohttp.ClientSession() as session:
        form = {"client_secret": secret, "key": "pk_test_browser", "payment_method_data[type]": "card"}
        form["payment_method_data[card][number]"] = "4242424242424242"
        wrong = {**form, "client_secret": secret + "x"}
        async with session.post(url + "/confirm", data=wrong) as answer:
            assert answer.status == 400
        async with session.post(url + "/confirm", data=form, headers={"Origin": "http://shop.example"}) as answer:
            body = await answer.json()
            assert answer.headers["Access-Control-Allow-Origin"] == "http://shop.example"
        assert body["status"] == "succeeded"
        assert "metadata" not in body
        asked = {"client_secret": secret}
        bearer = {"Authorization": "Bearer pk_test_browser"}
        async with session.get(url, params=asked, headers=bearer) as answer:
            assert (await answer.json())["status"] == "succeeded"
        async with session.get(url, headers=bearer) as answer:
            assert answer.status == 400
        async with session.post(url + "/cancel", data=asked, headers=bearer) as answer:
            assert answer.status == 403


async def test_uncaptured_intents_expire_after_seven_days(fresh: Any) -> None:
    stand_in = fresh()
    async with stripe_client(stand_in.url) as client:
        intent = await paid(client, capture_method="manual")
        stand_in.advance(7 * 86_400 + 1)
        await event_of(client, "payment_intent.canceled", intent.id)
        gone = await client.v1.payment_intents.retrieve_async(intent.id)
        assert (gone.status, gone.cancellation_reason) == ("canceled", "automatic")
        posted = await paid(client, capture_method="automatic", expand=["latest_charge.balance_transaction"])
        stand_in.advance(3 * 86_400)
        assert isinstance(posted.latest_charge, stripe.Charge)
        identifier = posted.latest_charge.balance_transaction.id  # type: ignore[union-attr]
        assert (await client.v1.balance_transactions.retrieve_async(identifier)).status == "available"
        balance = await client.v1.balance.retrieve_async()
        assert balance.available[0].amount == 1912


def _required(kind: type[stripe.StripeObject]) -> set[str]:
    """Members that the library's types say are always there and never null."""
    return {
        name
        for name, hint in kind.__annotations__.items()
        if not name.startswith("_") and not re.search(r"Optional|ClassVar|NoneType", repr(hint)) and name != "deleted"
    } - {"OBJECT_NAME"}


async def test_objects_have_every_member_that_the_library_expects(client: StripeClient) -> None:
    intent = await paid(client, expand=["latest_charge", "payment_method"])
    charge = intent.latest_charge
    assert isinstance(charge, stripe.Charge)
    refund = await client.v1.refunds.create_async({"charge": charge.id})
    customer = await client.v1.customers.create_async({"email": "a@example.com"})
    event = (await client.v1.events.list_async({"limit": 1})).data[0]
    posted = (await client.v1.balance_transactions.list_async({"limit": 1})).data[0]
    disputed = await paid(client, payment_method="pm_card_createDispute")
    dispute = (await client.v1.disputes.list_async({"payment_intent": disputed.id})).data[0]
    objects: list[tuple[stripe.StripeObject, type[stripe.StripeObject]]] = [
        (intent, stripe.PaymentIntent),
        (charge, stripe.Charge),
        (refund, stripe.Refund),
        (customer, stripe.Customer),
        (event, stripe.Event),
        (posted, stripe.BalanceTransaction),
        (dispute, stripe.Dispute),
    ]
    for found, kind in objects:
        assert type(found) is kind
        assert _required(kind) - set(found.to_dict()) == set()
