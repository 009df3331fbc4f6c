"""A payment that comes after another: one successor, also of a payment that never arrived, and nothing is spent on a mistake."""

from __future__ import annotations

from collections.abc import Callable

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
