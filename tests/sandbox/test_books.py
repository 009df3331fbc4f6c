"""Whatever is done, the stand-in's own books agree: it is the witness that the platform is held against."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import stripe
from stripe import StripeClient

from tests.sandbox.process import StandIn, stripe_client

CARDS = (
    "pm_card_visa",
    "pm_card_bypassPending",
    "pm_card_createDispute",
    "pm_card_refundFail",
    "pm_card_pendingRefund",
    "pm_card_sandboxProcessing",
    "pm_card_chargeDeclined",
)


async def live(client: StripeClient, chance: random.Random) -> None:
    """One payment and what may become of it, with answers lost on the way."""
    params: Any = {
        "amount": chance.randrange(300, 100_000),
        "currency": "usd",
        "payment_method": chance.choice(CARDS),
        "capture_method": chance.choice(("automatic", "automatic_async", "manual")),
        "confirm": True,
    }
    key = f"books-{chance.random()}"
    try:
        intent = await client.v1.payment_intents.create_async(params, {"idempotency_key": key})
    except stripe.CardError:
        return
    if intent.status == "requires_capture":
        if chance.random() < 0.3:
            await client.v1.payment_intents.cancel_async(intent.id)
        else:
            part: Any = {"amount_to_capture": chance.randrange(1, intent.amount + 1)}
            await client.v1.payment_intents.capture_async(intent.id, part)
    for number in range(chance.randrange(3)):
        refund: Any = {"payment_intent": intent.id, "amount": chance.randrange(1, intent.amount)}
        try:
            await client.v1.refunds.create_async(refund, {"idempotency_key": f"{key}-{number}"})
        except stripe.InvalidRequestError:
            pass
    for dispute in (await client.v1.disputes.list_async({"payment_intent": intent.id})).data:
        evidence: Any = {"evidence": {"uncategorized_text": chance.choice(("winning_evidence", "losing_evidence"))}}
        await client.v1.disputes.update_async(dispute.id, evidence)


async def test_the_books_agree(fresh: Any) -> None:
    stand_in: StandIn = fresh()
    chance = random.Random(4711)
    stand_in.faults(seed=11, lost_answer=0.1, reset=0.05, error_before=0.05, processing=0.1, processing_s=[1, 5])
    async with stripe_client(stand_in.url, retries=8) as client:
        await asyncio.gather(*[live(client, random.Random(chance.random())) for _ in range(60)])
        stand_in.faults()
        for _ in range(3):
            stand_in.advance(10)
            await client.v1.balance.retrieve_async()
        posted = {item.id: item async for item in await _all(client.v1.balance_transactions.list_async)}
        charges = [item async for item in await _all(client.v1.charges.list_async)]
        intents = {item.id: item async for item in await _all(client.v1.payment_intents.list_async)}
        refunds = [item async for item in await _all(client.v1.refunds.list_async)]
        disputes = [item async for item in await _all(client.v1.disputes.list_async)]
        balance = await client.v1.balance.retrieve_async()

    assert len(intents) == 60
    named: list[str] = []
    for charge in charges:
        intent = intents[str(charge.payment_intent)]
        captured = charge.amount_captured if charge.captured else 0
        if charge.balance_transaction:
            named.append(str(charge.balance_transaction))
            assert posted[str(charge.balance_transaction)].amount == captured == intent.amount_received
        assert bool(charge.balance_transaction) == bool(captured)
        standing = sum(refund.amount for refund in refunds if refund.charge == charge.id and refund.status != "failed")
        if charge.captured:
            assert charge.amount_refunded == standing <= captured
    paid = [charge.payment_intent for charge in charges if charge.captured]
    assert len(paid) == len(set(paid)) == sum(intent.status == "succeeded" for intent in intents.values())
    for refund in refunds:
        named += [
            str(name) for name in (refund.balance_transaction, getattr(refund, "failure_balance_transaction", None)) if name
        ]
    for dispute in disputes:
        named += [item.id for item in dispute.balance_transactions]
    assert sorted(named) == sorted(posted)
    assert {refund.status for refund in refunds} == {"succeeded", "failed"}
    total = sum(item.net for item in posted.values())
    assert total == sum(item.amount for item in balance.available) + sum(item.amount for item in balance.pending)
    assert all(item.net == item.amount - item.fee for item in posted.values())


async def _all(call: Any) -> Any:
    return (await call({"limit": 100})).auto_paging_iter()
