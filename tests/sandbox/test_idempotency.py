"""Idempotency keys, and calls that go wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
import stripe
from stripe import StripeClient

from tests.sandbox.process import KEY, StandIn, stripe_client

BODY: Any = {"amount": 1000, "currency": "usd"}


async def raw(url: str, path: str, form: dict[str, str], key: str, api_key: str = KEY) -> tuple[int, str, dict[str, str]]:
    headers = {"Authorization": f"Bearer {api_key}", "Idempotency-Key": key}
    async with aiohttp.ClientSession() as session, session.post(url + path, data=form, headers=headers) as answer:
        return answer.status, await answer.text(), dict(answer.headers)


async def test_a_replay_is_the_first_answer(client: StripeClient, shared: StandIn) -> None:
    form = {"amount": "1000", "currency": "usd", "metadata[a]": "b"}
    first = await raw(shared.url, "/v1/payment_intents", form, "replay")
    again = await raw(shared.url, "/v1/payment_intents", dict(reversed(form.items())), "replay")
    assert first[:2] == again[:2]
    assert "Idempotent-Replayed" not in first[2]
    assert again[2]["Idempotent-Replayed"] == "true"
    intent = (await client.v1.payment_intents.list_async({"limit": 1})).data[0]
    await client.v1.payment_intents.cancel_async(intent.id)
    late = await raw(shared.url, "/v1/payment_intents", form, "replay")
    assert late[:2] == first[:2]
    assert "requires_payment_method" in late[1]
    other = await raw(shared.url, "/v1/payment_intents", form, "replay", "sk_test_other")
    assert other[0] == 200
    assert other[1] != first[1]


async def test_declines_and_wrong_states_are_kept(client: StripeClient, shared: StandIn) -> None:
    form = {"amount": "1000", "currency": "usd", "payment_method": "pm_card_chargeDeclined", "confirm": "true"}
    first = await raw(shared.url, "/v1/payment_intents", form, "declined")
    again = await raw(shared.url, "/v1/payment_intents", form, "declined")
    assert (first[0], first[1]) == (402, again[1])
    assert again[2]["Idempotent-Replayed"] == "true"
    intent = await client.v1.payment_intents.create_async(BODY)
    path = f"/v1/payment_intents/{intent.id}/capture"
    assert (await raw(shared.url, path, {}, "early"))[0] == 400
    assert (await raw(shared.url, path, {}, "early"))[2]["Idempotent-Replayed"] == "true"


async def test_other_parameters_or_endpoint(client: StripeClient) -> None:
    intent = await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "mine"})
    with pytest.raises(stripe.IdempotencyError) as changed:
        await client.v1.payment_intents.create_async(BODY | {"amount": 1001}, {"idempotency_key": "mine"})
    assert changed.value.http_status == 400
    with pytest.raises(stripe.IdempotencyError):
        await client.v1.payment_intents.cancel_async(intent.id, {}, {"idempotency_key": "mine"})


async def test_validation_failures_are_not_kept(client: StripeClient) -> None:
    with pytest.raises(stripe.InvalidRequestError):
        await client.v1.payment_intents.create_async(BODY | {"amount": 1}, {"idempotency_key": "second try"})
    intent = await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "second try"})
    assert intent.amount == 1000


async def test_same_key_while_the_first_is_running(calm: StandIn) -> None:
    stand_in = calm
    stand_in.faults(latency_ms=[400, 400])
    form = {"amount": "1000", "currency": "usd"}
    answers = await asyncio.gather(*[raw(stand_in.url, "/v1/payment_intents", form, "twice") for _ in range(3)])
    assert sorted(status for status, _, _ in answers) == [200, 409, 409]
    assert "idempotency_key_in_use" in next(body for status, body, _ in answers if status == 409)
    stand_in.faults()
    assert (await raw(stand_in.url, "/v1/payment_intents", form, "twice"))[2]["Idempotent-Replayed"] == "true"


async def test_keys_are_forgotten_after_a_day(calm: StandIn) -> None:
    stand_in = calm
    async with stripe_client(stand_in.url) as client:
        first = await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "old"})
        stand_in.advance(86_399 - 60)
        assert (await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "old"})).id == first.id
        stand_in.advance(120)
        assert (await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "old"})).id != first.id


async def made(client: StripeClient, mark: str) -> list[str]:
    """Intents with that mark in their metadata."""
    page = await client.v1.payment_intents.search_async({"query": f'metadata["mark"]:"{mark}"', "limit": 100})
    return [intent.id for intent in page.data]


async def test_an_error_before_leaves_nothing_an_error_after_is_kept(calm: StandIn) -> None:
    before = calm.control("GET", "counts")["faults"]
    async with stripe_client(calm.url) as client:
        body = BODY | {"metadata": {"mark": "errors"}}
        calm.faults(error_before=1)
        with pytest.raises(stripe.APIError):
            await client.v1.payment_intents.create_async(body, {"idempotency_key": "before"})
        calm.faults()
        assert await made(client, "errors") == []
        await client.v1.payment_intents.create_async(body, {"idempotency_key": "before"})

        calm.faults(error_after=1)
        with pytest.raises(stripe.APIError) as after:
            await client.v1.payment_intents.create_async(body, {"idempotency_key": "after"})
        assert after.value.http_status == 500
        calm.faults()
        assert len(await made(client, "errors")) == 2
        with pytest.raises(stripe.APIError) as replayed:
            await client.v1.payment_intents.create_async(body, {"idempotency_key": "after"})
        assert replayed.value.headers is not None
        assert replayed.value.headers["Idempotent-Replayed"] == "true"
        assert len(await made(client, "errors")) == 2
        faults = calm.control("GET", "counts")["faults"]
        applied = {name: faults[name] - before.get(name, 0) for name in ("error_before", "error_after")}
        assert applied == {"error_before": 1, "error_after": 1}


async def test_a_lost_answer_has_happened_a_reset_has_not(calm: StandIn) -> None:
    stand_in = calm
    form = {"amount": "1000", "currency": "usd", "metadata[mark]": "lost"}
    stand_in.faults(lost_answer=1)
    with pytest.raises(aiohttp.ClientError):
        await raw(stand_in.url, "/v1/payment_intents", form, "lost")
    stand_in.faults(reset=1)
    with pytest.raises((aiohttp.ClientError, OSError)):
        await raw(stand_in.url, "/v1/payment_intents", form, "reset")
    stand_in.faults(down=True)
    with pytest.raises((aiohttp.ClientError, OSError)):
        await raw(stand_in.url, "/v1/payment_intents", form, "down")
    stand_in.faults()
    async with stripe_client(stand_in.url) as client:
        intents = await made(client, "lost")
        assert len(intents) == 1
        found = await raw(stand_in.url, "/v1/payment_intents", form, "lost")
        assert found[2]["Idempotent-Replayed"] == "true"
        assert intents[0] in found[1]
        assert "Idempotent-Replayed" not in (await raw(stand_in.url, "/v1/payment_intents", form, "reset"))[2]


async def test_rate_limits(fresh: Any) -> None:
    stand_in = fresh("--rate-limit", "5")
    async with stripe_client(stand_in.url) as client:
        results = await asyncio.gather(*[client.v1.payment_intents.list_async() for _ in range(20)], return_exceptions=True)
        limited = [error for error in results if isinstance(error, stripe.RateLimitError)]
        assert len(limited) >= 10
        assert limited[0].http_status == 429
        assert (await client.v1.charges.list_async()).data == []
        stand_in.faults(rate_limited=1)
        with pytest.raises(stripe.RateLimitError):
            await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "limited"})
        stand_in.faults()
        assert (await client.v1.payment_intents.create_async(BODY, {"idempotency_key": "limited"})).amount == 1000


async def test_the_same_seed_gives_the_same_faults(calm: StandIn) -> None:
    stand_in = calm

    async def pattern(seed: int) -> list[int]:
        stand_in.faults(seed=seed, error_before=0.3)
        return [(await raw(stand_in.url, "/v1/payment_intents", {"amount": "1000", "currency": "usd"}, ""))[0] for _ in range(60)]

    first = await pattern(7)
    assert await pattern(7) == first
    assert await pattern(8) != first
    assert 5 <= first.count(500) <= 35


async def test_processing_is_a_share_of_confirms(calm: StandIn) -> None:
    stand_in = calm
    before = stand_in.control("GET", "counts")["faults"].get("processing", 0)
    stand_in.faults(seed=1, processing=0.5, processing_s=[100, 100])
    async with stripe_client(stand_in.url) as client:
        params: Any = {**BODY, "confirm": True, "payment_method": "pm_card_visa"}
        intents = [await client.v1.payment_intents.create_async(params) for _ in range(30)]
        waiting = [intent.id for intent in intents if intent.status == "processing"]
        assert stand_in.control("GET", "counts")["faults"]["processing"] == before + len(waiting)
        assert 5 <= len(waiting) <= 25
        stand_in.advance(101)
        page = await client.v1.payment_intents.list_async({"limit": 30})
        assert {intent.id for intent in page.data} == {intent.id for intent in intents}
        assert {intent.status for intent in page.data} == {"succeeded"}


def test_control_refuses_nonsense(calm: StandIn) -> None:
    import urllib.error

    stand_in = calm
    for body in ({"lost_answer": 2}, {"colour": 1}, {"latency_ms": [5, 1]}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            stand_in.control("PUT", "faults", body)
        assert refused.value.code == 400
        refused.value.close()
    assert stand_in.faults(reset=0.5, seed=3)["reset"] == 0.5
    assert stand_in.control("GET", "faults")["seed"] == 3
    assert stand_in.faults()["reset"] == 0
