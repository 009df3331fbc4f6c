"""Webhooks: signatures, matching, retries, and the faults that hit them."""

from __future__ import annotations

from typing import Any

import pytest
import stripe
from stripe import StripeClient

from tests.sandbox.process import Receiver, StandIn, stripe_client

PAID: Any = {"amount": 1000, "currency": "usd", "confirm": True, "payment_method": "pm_card_visa", "capture_method": "automatic"}


async def endpoint(client: StripeClient, box: Receiver, *types: str) -> stripe.WebhookEndpoint:
    enabled: Any = list(types) or ["*"]
    return await client.v1.webhook_endpoints.create_async({"url": box.url, "enabled_events": enabled})


def webhooks_since(stand_in: StandIn, before: dict[str, int], *names: str) -> list[int]:
    """By how much the counts have grown."""
    now = stand_in.control("GET", "counts")["webhooks"]
    return [now[name] - before[name] for name in names]


async def test_signed_and_in_order(calm: StandIn, box: Receiver) -> None:
    async with stripe_client(calm.url) as client:
        made = await endpoint(client, box)
        assert made.secret is not None
        assert made.secret.startswith("whsec_")
        intent = await client.v1.payment_intents.create_async(PAID | {"metadata": {"oncepay_key": "k"}})
        await box.until(lambda events: len(events) >= 3)
        assert set(box.types()) == {"payment_intent.created", "charge.succeeded", "payment_intent.succeeded"}
        for body, signature in box.raw:
            event = stripe.Webhook.construct_event(body, signature, made.secret)
            assert event.data.object["metadata"]["oncepay_key"] == "k"
            with pytest.raises(stripe.SignatureVerificationError):
                stripe.Webhook.construct_event(body + b" ", signature, made.secret)
        sent = {event["id"] for event in box.events}
        listed = await client.v1.events.list_async({"limit": 3})
        assert {event.id for event in listed.data} == sent
        assert [event.type for event in reversed(listed.data)] == [
            "payment_intent.created",
            "charge.succeeded",
            "payment_intent.succeeded",
        ]
        assert listed.data[0].data.object["id"] == intent.id
        again = await client.v1.webhook_endpoints.retrieve_async(made.id)
        assert getattr(again, "secret", None) is None


async def test_only_what_an_endpoint_asks_for(calm: StandIn, box: Receiver) -> None:
    async with stripe_client(calm.url) as client:
        made = await endpoint(client, box, "payment_intent.succeeded")
        await client.v1.payment_intents.create_async(PAID)
        await box.until(lambda events: len(events) == 1)
        await client.v1.webhook_endpoints.update_async(made.id, {"enabled_events": ["charge.succeeded"]})
        await client.v1.payment_intents.create_async(PAID)
        await box.until(lambda events: len(events) == 2)
        await client.v1.webhook_endpoints.update_async(made.id, {"disabled": True})
        await client.v1.payment_intents.create_async(PAID)
        await client.v1.webhook_endpoints.update_async(made.id, {"disabled": False, "enabled_events": ["payment_intent.created"]})
        await client.v1.payment_intents.create_async(PAID)
        await box.until(lambda events: len(events) == 3)
        assert box.types() == ["payment_intent.succeeded", "charge.succeeded", "payment_intent.created"]
        await client.v1.webhook_endpoints.delete_async(made.id)
        assert (await client.v1.webhook_endpoints.list_async()).data == []


async def test_retried_with_growing_gaps_until_2xx(calm: StandIn, box: Receiver) -> None:
    box.answer = lambda event: 200 if len(box.events) == 3 else 500
    stand_in = calm
    async with stripe_client(stand_in.url) as client:
        before = stand_in.control("GET", "counts")["webhooks"]
        made = await endpoint(client, box, "payment_intent.succeeded")
        await client.v1.payment_intents.create_async(PAID)
        for gap_s, sent in ((1, 1), (2, 2)):
            await box.until(lambda events, sent=sent: len(events) == sent)  # type: ignore[misc]
            stand_in.advance(gap_s - 0.7)
            assert len(box.events) == sent
            stand_in.advance(0.7)
        await box.until(lambda events: len(events) == 3)
        assert len({event["id"] for event in box.events}) == 1
        for body, signature in box.raw:
            stripe.Webhook.construct_event(body, signature, made.secret)
        assert webhooks_since(stand_in, before, "sent", "failed") == [3, 2]


async def test_two_secrets_while_one_rolls(calm: StandIn, box: Receiver) -> None:
    stand_in = calm
    async with stripe_client(stand_in.url) as client:
        made = await endpoint(client, box, "payment_intent.created")
        new = stand_in.control("POST", "roll_secret", {"endpoint": made.id})["secret"]
        await client.v1.payment_intents.create_async(PAID)
        await box.until(lambda events: len(events) == 1)
        body, signature = box.raw[0]
        assert signature.count("v1=") == 2
        for secret in (made.secret, new):
            stripe.Webhook.construct_event(body, signature, secret)
        stand_in.advance(25 * 3600)
        await client.v1.payment_intents.create_async(PAID)
        await box.until(lambda events: len(events) == 2)
        stripe.Webhook.construct_event(*box.raw[1], new)
        assert box.raw[1][1].count("v1=") == 1


async def test_lost_doubled_delayed_reordered(calm: StandIn, box: Receiver) -> None:
    stand_in = calm
    async with stripe_client(stand_in.url) as client:
        before = stand_in.control("GET", "counts")["webhooks"]
        await endpoint(client, box, "payment_intent.succeeded")
        stand_in.faults(webhook_lost=1)
        await client.v1.payment_intents.create_async(PAID)
        stand_in.faults(seed=5, webhook_doubled=1)
        doubled = [(await client.v1.payment_intents.create_async(PAID)).id for _ in range(12)]
        await box.until(lambda events: len(events) == 24)
        by_intent = [[event["id"] for event in box.events if event["data"]["object"]["id"] == intent] for intent in doubled]
        assert all(len(events) == 2 for events in by_intent)
        twins = sum(len(set(events)) == 2 for events in by_intent)
        assert 0 < twins < 12
        assert webhooks_since(stand_in, before, "lost", "doubled", "sent") == [1, 12, 24]

        for fault in ({"webhook_delay_s": [2, 2]}, {"webhook_reordered": 1}):
            stand_in.faults(**fault)
            before = len(box.events)
            slow = (await client.v1.payment_intents.create_async(PAID)).id
            stand_in.faults()
            quick = (await client.v1.payment_intents.create_async(PAID)).id
            await box.until(lambda events, before=before: len(events) > before)  # type: ignore[misc]
            stand_in.advance(3)
            await box.until(lambda events, before=before: len(events) == before + 2)  # type: ignore[misc]
            assert [event["data"]["object"]["id"] for event in box.events[-2:]] == [quick, slow]
