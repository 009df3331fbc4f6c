"""Every test card, and what follows from it."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
import stripe
from stripe import StripeClient

from tests.sandbox.process import StandIn, event_of

DECLINES = [
    ("pm_card_visa_chargeDeclined", "card_declined", "generic_decline"),
    ("pm_card_chargeDeclined", "card_declined", "generic_decline"),
    ("pm_card_visa_chargeDeclinedInsufficientFunds", "card_declined", "insufficient_funds"),
    ("pm_card_visa_chargeDeclinedLostCard", "card_declined", "lost_card"),
    ("pm_card_visa_chargeDeclinedStolenCard", "card_declined", "stolen_card"),
    ("pm_card_visa_chargeDeclinedVelocityLimitExceeded", "card_declined", "card_velocity_exceeded"),
    ("pm_card_chargeDeclinedExpiredCard", "expired_card", None),
    ("pm_card_chargeDeclinedIncorrectCvc", "incorrect_cvc", None),
    ("pm_card_chargeDeclinedProcessingError", "processing_error", None),
    ("pm_card_radarBlock", "card_declined", "fraudulent"),
]


async def pay(client: StripeClient, card: str, **more: Any) -> stripe.PaymentIntent:
    params: Any = {"amount": 2000, "currency": "usd", "payment_method": card, "confirm": True, **more}
    return await client.v1.payment_intents.create_async(params)


def error_of(refused: stripe.StripeError) -> dict[str, Any]:
    body: Any = refused.json_body
    error: dict[str, Any] = body["error"]
    return error


async def types_about(client: StripeClient, intent: str) -> list[str]:
    """Types of the events about an intent, its charges and disputes, oldest first."""
    page = await client.v1.events.list_async({"limit": 100})
    about = [
        event for event in page.data if intent in (event.data.object["id"], getattr(event.data.object, "payment_intent", ""))
    ]
    return [event.type for event in reversed(about)]


@pytest.mark.parametrize(("card", "code", "decline_code"), DECLINES)
async def test_declines(client: StripeClient, card: str, code: str, decline_code: str | None) -> None:
    intent = await client.v1.payment_intents.create_async({"amount": 2000, "currency": "usd"})
    with pytest.raises(stripe.CardError) as refused:
        await client.v1.payment_intents.confirm_async(intent.id, {"payment_method": card})
    error = error_of(refused.value)
    assert (refused.value.http_status, error["type"], error["code"]) == (402, "card_error", code)
    assert error.get("decline_code") == decline_code
    assert error["doc_url"]
    assert error["message"]
    assert error["payment_intent"]["status"] == "requires_payment_method"
    after = await client.v1.payment_intents.retrieve_async(intent.id, {"expand": ["latest_charge"]})
    charge = after.latest_charge
    assert isinstance(charge, stripe.Charge)
    assert (after.status, after.payment_method, after.amount_received) == ("requires_payment_method", None, 0)
    assert after.last_payment_error is not None
    assert (after.last_payment_error.code, after.last_payment_error.charge) == (code, error["charge"])
    assert (charge.id, charge.status, charge.paid, charge.failure_code) == (error["charge"], "failed", False, code)
    assert charge.outcome is not None
    assert charge.outcome.type == ("blocked" if "radar" in card else "issuer_declined")
    assert await types_about(client, intent.id) == [
        "payment_intent.created",
        "charge.failed",
        "payment_intent.payment_failed",
    ]
    done = await client.v1.payment_intents.confirm_async(intent.id, {"payment_method": "pm_card_visa"})
    assert (done.status, done.last_payment_error) == ("succeeded", None)
    charges = await client.v1.charges.list_async({"payment_intent": intent.id})
    assert [item.status for item in charges.data] == ["succeeded", "failed"]


async def test_a_decline_at_creation_still_makes_the_intent(client: StripeClient) -> None:
    with pytest.raises(stripe.CardError) as refused:
        await pay(client, "pm_card_visa_chargeDeclined")
    identifier = error_of(refused.value)["payment_intent"]["id"]
    assert (await client.v1.payment_intents.retrieve_async(identifier)).status == "requires_payment_method"


@pytest.mark.parametrize("outcome", ["complete", "fail"])
async def test_three_d_secure(client: StripeClient, shared: StandIn, outcome: str) -> None:
    intent = await pay(client, "pm_card_authenticationRequired", return_url="http://shop.example/back?cart=1")
    assert (intent.status, intent.latest_charge) == ("requires_action", None)
    assert intent.next_action is not None
    assert intent.next_action.redirect_to_url is not None
    url = str(intent.next_action.redirect_to_url.url)
    assert url == f"{shared.url}/_3ds/{intent.id}"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as page:
            assert "outcome" in await page.text()
        async with session.post(url, data={"outcome": outcome}, allow_redirects=False) as answer:
            assert answer.status == 303
            back = answer.headers["Location"]
        async with session.post(url, data={"outcome": outcome}) as again:
            assert again.status == 409
    assert back.startswith(f"http://shop.example/back?cart=1&payment_intent={intent.id}&payment_intent_client_secret=")
    after = await client.v1.payment_intents.retrieve_async(intent.id, {"expand": ["latest_charge"]})
    types = await types_about(client, intent.id)
    if outcome == "complete":
        assert after.status == "succeeded"
        assert isinstance(after.latest_charge, stripe.Charge)
        assert types[:4] == [
            "payment_intent.created",
            "payment_intent.requires_action",
            "charge.succeeded",
            "payment_intent.succeeded",
        ]
    else:
        assert (after.status, after.latest_charge, after.next_action) == ("requires_payment_method", None, None)
        assert after.last_payment_error is not None
        assert after.last_payment_error.code == "payment_intent_authentication_failure"
        assert types[-1] == "payment_intent.payment_failed"


async def test_off_session_authentication_is_a_decline(client: StripeClient) -> None:
    with pytest.raises(stripe.CardError) as refused:
        await pay(client, "pm_card_authenticationRequired", off_session=True)
    assert refused.value.code == "authentication_required"
    assert error_of(refused.value)["payment_intent"]["status"] == "requires_payment_method"


@pytest.mark.parametrize(("card", "status"), [("Processing", "succeeded"), ("ProcessingFails", "requires_payment_method")])
async def test_processing(client: StripeClient, shared: StandIn, card: str, status: str) -> None:
    intent = await pay(client, f"pm_card_sandbox{card}")
    assert intent.status == "processing"
    with pytest.raises(stripe.InvalidRequestError) as refused:
        await client.v1.payment_intents.cancel_async(intent.id)
    assert refused.value.code == "payment_intent_unexpected_state"
    shared.advance(3)
    ending = "succeeded" if status == "succeeded" else "payment_failed"
    await event_of(client, f"payment_intent.{ending}", intent.id)
    assert (await client.v1.payment_intents.retrieve_async(intent.id)).status == status


async def test_dispute_comes_between_charge_and_intent(client: StripeClient) -> None:
    intent = await pay(client, "pm_card_createDispute", capture_method="automatic")
    assert await types_about(client, intent.id) == [
        "payment_intent.created",
        "charge.succeeded",
        "charge.dispute.created",
        "charge.dispute.funds_withdrawn",
        "payment_intent.succeeded",
    ]
    dispute = (await client.v1.disputes.list_async({"payment_intent": intent.id})).data[0]
    assert (dispute.status, dispute.reason, dispute.amount) == ("needs_response", "fraudulent", 2000)
    taken = dispute.balance_transactions[0]
    assert (taken.amount, taken.fee, taken.net, taken.reporting_category) == (-2000, 1500, -3500, "dispute")
    with pytest.raises(stripe.InvalidRequestError) as refused:
        await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert refused.value.code == "charge_disputed"


@pytest.mark.parametrize(("text", "status"), [("winning_evidence", "won"), ("losing_evidence", "lost")])
async def test_evidence_decides(client: StripeClient, text: str, status: str) -> None:
    intent = await pay(client, "pm_card_createDisputeProductNotReceived")
    dispute = (await client.v1.disputes.list_async({"payment_intent": intent.id})).data[0]
    assert dispute.reason == "product_not_received"
    staged = await client.v1.disputes.update_async(dispute.id, {"evidence": {"product_description": "a hat"}, "submit": False})
    assert (staged.status, staged.evidence.product_description) == ("needs_response", "a hat")
    decided = await client.v1.disputes.update_async(dispute.id, {"evidence": {"uncategorized_text": text}})
    assert decided.status == status
    amounts = [(item.amount, item.fee) for item in decided.balance_transactions]
    assert amounts == ([(-2000, 1500), (2000, 0)] if status == "won" else [(-2000, 1500)])
    closed = await event_of(client, "charge.dispute.closed", dispute.id)
    assert closed.data.object["status"] == status
    listed = await client.v1.balance_transactions.list_async({"source": dispute.id})
    assert [item.amount for item in reversed(listed.data)] == [amount for amount, _ in amounts]


async def test_inquiry_moves_no_money(client: StripeClient) -> None:
    intent = await pay(client, "pm_card_createDisputeInquiry")
    dispute = (await client.v1.disputes.list_async({"payment_intent": intent.id})).data[0]
    assert (dispute.status, dispute.balance_transactions) == ("warning_needs_response", [])
    assert (await client.v1.disputes.close_async(dispute.id)).status == "warning_closed"


async def test_refunds_in_parts(client: StripeClient) -> None:
    intent = await pay(client, "pm_card_visa")
    part = await client.v1.refunds.create_async({"payment_intent": intent.id, "amount": 1500, "metadata": {"refund_key": "r1"}})
    assert (part.status, part.amount, part.charge) == ("succeeded", 1500, intent.latest_charge)
    posted = await client.v1.balance_transactions.retrieve_async(str(part.balance_transaction))
    assert (posted.amount, posted.fee, posted.reporting_category, posted.source) == (-1500, 0, "refund", part.id)
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded amount"):
        await client.v1.refunds.create_async({"payment_intent": intent.id, "amount": 501})
    await client.v1.refunds.create_async({"payment_intent": intent.id})
    with pytest.raises(stripe.InvalidRequestError) as whole:
        await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert whole.value.code == "charge_already_refunded"
    charge = await client.v1.charges.retrieve_async(str(intent.latest_charge), {"expand": ["refunds"]})
    assert (charge.refunded, charge.amount_refunded) == (True, 2000)
    assert charge.refunds is not None
    assert [item.amount for item in charge.refunds.data] == [500, 1500]
    listed = await client.v1.refunds.list_async({"payment_intent": intent.id})
    assert [item.amount for item in listed.data] == [500, 1500]


async def test_pending_refund_succeeds(client: StripeClient, shared: StandIn) -> None:
    intent = await pay(client, "pm_card_pendingRefund")
    refund = await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert refund.status == "pending"
    shared.advance(3)
    event = await event_of(client, "refund.updated", refund.id)
    assert event.data.object["status"] == "succeeded"


async def test_refund_that_fails_after_success_gives_the_money_back(client: StripeClient, shared: StandIn) -> None:
    intent = await pay(client, "pm_card_refundFail")
    refund = await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert refund.status == "succeeded"
    shared.advance(3)
    await event_of(client, "refund.failed", refund.id)
    failed = await client.v1.refunds.retrieve_async(refund.id, {"expand": ["failure_balance_transaction"]})
    back = failed.failure_balance_transaction
    assert isinstance(back, stripe.BalanceTransaction)
    assert (failed.status, back.amount, back.reporting_category) == ("failed", 2000, "refund_failure")
    assert (await client.v1.charges.retrieve_async(str(intent.latest_charge))).amount_refunded == 0


async def test_customers_and_their_methods(client: StripeClient) -> None:
    customer = await client.v1.customers.create_async({"email": "buyer@example.com", "metadata": {"buyer": "b1"}})
    method = await client.v1.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
    assert method.id != "pm_card_visa"
    listed = await client.v1.customers.payment_methods.list_async(customer.id)
    assert [item.id for item in listed.data] == [method.id]
    intent = await pay(client, method.id, customer=customer.id, expand=["customer", "payment_method"])
    assert isinstance(intent.customer, stripe.Customer)
    assert intent.customer.email == "buyer@example.com"
    assert isinstance(intent.payment_method, stripe.PaymentMethod)
    assert (await client.v1.payment_methods.detach_async(method.id)).customer is None
    own = await client.v1.payment_intents.list_async({"customer": customer.id})
    assert [item.id for item in own.data] == [intent.id]
    await client.v1.customers.delete_async(customer.id)
    assert (await client.v1.customers.retrieve_async(customer.id)).deleted is True


async def test_payouts(fresh: Any) -> None:
    from tests.sandbox.process import stripe_client

    stand_in = fresh()
    async with stripe_client(stand_in.url) as own:
        with pytest.raises(stripe.InvalidRequestError) as poor:
            await own.v1.payouts.create_async({"amount": 1000, "currency": "usd"})
        assert poor.value.code == "balance_insufficient"
        await pay(own, "pm_card_bypassPending", amount=100_000, capture_method="automatic")
        good = await own.v1.payouts.create_async({"amount": 1000, "currency": "usd"})
        returned = await own.v1.payouts.create_async({"amount": 2000, "currency": "usd", "destination": "ba_sandbox_returned"})
        canceled = await own.v1.payouts.cancel_async((await own.v1.payouts.create_async({"amount": 500, "currency": "usd"})).id)
        assert (good.status, canceled.status) == ("pending", "canceled")
        for _ in range(3):
            stand_in.advance(86_401)
            await event_of(own, "payout.updated", returned.id)
        await event_of(own, "payout.paid", good.id)
        await event_of(own, "payout.failed", returned.id)
        failed = await own.v1.payouts.retrieve_async(returned.id)
        assert failed.status == "failed"
        assert failed.failure_balance_transaction is not None
        balance = await own.v1.balance.retrieve_async()
        assert balance.available[0].amount == 100_000 - 2930 - 1000
        stand_in.control("POST", "balance_transactions", {"type": "stripe_fee", "amount": -250, "description": "Billing"})
        other = (await own.v1.balance_transactions.list_async({"type": "stripe_fee"})).data[0]
        assert (other.net, other.reporting_category) == (-250, "fee")
