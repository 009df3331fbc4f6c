"""A payment that comes after another: one successor, also of a payment that never arrived, and nothing is spent on a mistake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from oncepay.client import Oncepay, Problem
from tests.router.conftest import CART

pytestmark = pytest.mark.cluster

VISA = "pm_card_visa"
DECLINED = "pm_card_visa_chargeDeclined"


async def test_a_key_that_never_arrived_never_pays_once_it_has_a_successor(client: Oncepay, fresh: Callable[[], str]) -> None:
    """The client had no answer and tries again; then the first request comes after all, late."""
    lost = fresh()
    second = await client.pay(fresh(), **CART, payment_method=VISA, after=lost)
    assert second.status == "succeeded"
    late = await client.pay(lost, **CART, payment_method=VISA)
    assert (late.status, late.payment_intent, late.replayed) == ("canceled", None, True)
    with pytest.raises(Problem) as caught:
        await client.pay(fresh(), **CART, payment_method=VISA, after=lost)
    assert caught.value.slug == "predecessor-not-over"


async def test_a_key_that_is_refused_does_not_become_the_successor(client: Oncepay, fresh: Callable[[], str]) -> None:
    failed = await client.pay(fresh(), **CART, payment_method=DECLINED)
    used = await client.pay(fresh(), **CART, payment_method=VISA)
    with pytest.raises(Problem) as caught:
        await client.pay(used.key, **{**CART, "buyer": "buyer-2"}, payment_method=VISA, after=failed.key)
    assert caught.value.slug == "idempotency-key-reused"
    assert (await client.pay(fresh(), **CART, payment_method=VISA, after=failed.key)).status == "succeeded"


@pytest.mark.parametrize(
    ("after", "slug"),
    [
        ("a\0b", "invalid-idempotency-key"),
        ("k" * 201, "invalid-idempotency-key"),
        ("refund:x", "invalid-idempotency-key"),
        ("ok1_" + "A" * 32, "predecessor-not-over"),
        ("", "predecessor-not-over"),
    ],
)
async def test_what_can_be_no_predecessor(client: Oncepay, fresh: Callable[[], str], after: str, slug: str) -> None:
    key = fresh()
    with pytest.raises(Problem) as caught:
        await client.pay(key, **CART, payment_method=VISA, after=after or key)
    assert (caught.value.slug, caught.value.field) == (slug, "after")


async def test_an_old_key_and_its_successor_at_the_same_moment_never_both_pay(
    client: Oncepay, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    """Whichever row is first: the old key's payment (then the successor is refused), or its tombstone."""
    pairs = [(fresh(), fresh()) for _ in range(12)]

    async def race(old: str, new: str, n: int) -> tuple[str, str]:
        async def pay(key: str, after: str = "") -> str:
            try:
                return (await client.pay(key, **CART, payment_method=VISA, after=after)).status
            except Problem as problem:
                return problem.slug

        calls = [pay(old), pay(new, old)]
        first, second = await asyncio.gather(*(calls if n % 2 else reversed(calls)))
        return (first, second) if n % 2 else (second, first)

    outcomes = await asyncio.gather(*(race(old, new, n) for n, (old, new) in enumerate(pairs)))
    assert set(outcomes) <= {("succeeded", "predecessor-not-over"), ("canceled", "succeeded")}
    paid = await paid_keys(stripe)
    assert all(len(paid & set(pair)) == 1 for pair in pairs)


async def paid_keys(stripe: aiohttp.ClientSession) -> set[str]:
    """The keys of the newest 100 intents that succeeded at Stripe."""
    async with stripe.get("/v1/payment_intents", params={"limit": "100"}) as answer:
        return {item["metadata"].get("oncepay_key") for item in (await answer.json())["data"] if item["status"] == "succeeded"}
