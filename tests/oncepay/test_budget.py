"""The rate budget: shares never sum to more than the limit, requests are paced, and membership follows etcd."""

from __future__ import annotations

import asyncio
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.breaker import Breaker
from oncepay.budget import SETTLE_S, WEIGHTS, Budget, Role, Share, endpoint_of, share_of
from oncepay.errors import StripeUnavailable
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings, StripeSettings
from tests.etcd_fixture import EtcdCluster, etcd_cluster

__all__ = ["etcd_cluster"]

ROLES: tuple[Role, ...] = get_args(Role)


@given(
    st.dictionaries(st.sampled_from(ROLES), st.integers(1, 50), min_size=1),
    st.sampled_from(sorted(WEIGHTS)),
    st.integers(1, 5000),
)
def test_all_shares_together_stay_within_the_limit(roles: dict[Role, int], endpoint: str, limit: int) -> None:
    whole = sum(share_of(limit, endpoint, role, roles) * count for role, count in roles.items())
    assert whole <= limit
    assert (whole > 0) == any(WEIGHTS[endpoint][role] for role in roles)


@pytest.mark.parametrize(
    ("method", "path", "endpoint"),
    [
        ("post", "/v1/payment_intents", "create"),
        ("post", "/v1/payment_intents/pi_1/confirm", "confirm"),
        ("post", "/v1/payment_intents/pi_1/cancel", "other"),
        ("post", "/v1/refunds", "other"),
        ("get", "/v1/payment_intents/pi_1", "retrieve"),
        ("get", "/v1/payment_intents", "list"),
        ("get", "/v1/events", "list"),
        ("get", "/v1/disputes/dp_1", "other"),
        ("get", "/v1/balance_transactions", "ledger"),
        ("get", "/v1/balance_transactions/txn_1", "other"),
    ],
)
def test_each_request_belongs_to_an_endpoint(method: str, path: str, endpoint: str) -> None:
    assert endpoint_of(method, path) == endpoint


async def test_requests_are_paced_in_their_order() -> None:
    share = Share("create")
    share.set_rate(200)
    order: list[int] = []

    async def one(number: int) -> None:
        await share.take()
        order.append(number)

    began_s = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(60)))
    assert time.monotonic() - began_s >= (60 - 0.05 * 200 - 1) / 200
    assert order == sorted(order)


async def test_without_a_share_nothing_is_sent() -> None:
    share = Share("create")
    waiting = asyncio.create_task(share.take())
    await asyncio.sleep(0.15)
    assert not waiting.done()
    share.set_rate(1000)
    await asyncio.wait_for(waiting, 1)


async def test_too_many_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncepay.budget.WAITING_MAX", 3)
    share = Share("create")
    waiting = [asyncio.create_task(share.take()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(StripeUnavailable):
        await share.take()
    share.set_rate(1000)
    await asyncio.gather(*waiting)


def test_the_breaker_lets_one_probe_through() -> None:
    now_s = 0.0
    breaker = Breaker(failures_max=2, now=lambda: now_s)
    breaker.failure()
    assert breaker.allowance(5) == 5
    breaker.failure()
    assert breaker.allowance(5) == 0
    now_s = 1.1
    assert breaker.allowance(5) == 1
    breaker.probing()
    assert breaker.allowance(5) == 0
    breaker.success()
    assert breaker.allowance(5) == 5


@pytest.mark.cluster
async def test_the_sum_stays_within_the_limit_while_processes_come_and_go(etcd_cluster: EtcdCluster) -> None:
    """Sampled all the time: never over the limit, and near it once things are still."""
    settings = StripeSettings(default_rate_limit_per_s=100)
    most = 0.0

    def total(budgets: list[Budget]) -> float:
        return sum(budget._shares["create"].rate_per_s for budget in budgets)

    async with Etcd(EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix="/budget-test")) as etcd:
        budgets: list[Budget] = []

        async def watch(seconds: float) -> None:
            nonlocal most
            until_s = time.monotonic() + seconds
            while time.monotonic() < until_s:
                most = max(most, total(budgets))
                await asyncio.sleep(0.02)

        for name, role in (("router-1", "router"), ("router-2", "router"), ("worker-1", "worker")):
            budget = Budget(etcd, settings, name=name, role=role)  # type: ignore[arg-type]
            budgets.append(budget)
            budget.start()
            await watch(0.7)
        await watch(SETTLE_S + 1)
        assert total(budgets) == pytest.approx(90)
        await budgets.pop(0).stop()
        await watch(SETTLE_S + 1)
        assert total(budgets) == pytest.approx(90)
        for budget in budgets:
            await budget.stop()
    assert most <= 100
