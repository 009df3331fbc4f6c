"""The rate budget: shares never sum to more than the limit, requests are paced, and membership follows etcd."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.breaker import Breaker
from oncepay.budget import SETTLE_S, WEIGHTS, Budget, BudgetShort, Role, Share, dealt, endpoint_of, share_of
from oncepay.errors import StripeUnavailable
from oncepay.etcd import Etcd, EtcdOutcomeUnknown
from oncepay.settings import EtcdSettings, StripeSettings
from oncepay.shares import Record
from oncepay.stripe_client import StripeGateway, StripeRefused
from tests.etcd_fixture import EtcdCluster, etcd_cluster
from tests.sandbox.process import KEY, StandIn

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


async def test_who_waits_too_long_for_a_turn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncepay.budget.WAIT_MAX_S", 0.3)
    share = Share("create")
    early = [asyncio.create_task(share.take()) for _ in range(3)]
    await asyncio.sleep(0.2)
    late = asyncio.create_task(share.take())
    async with asyncio.timeout(2):
        found = await asyncio.gather(*early, return_exceptions=True)
    assert [type(each) for each in found] == [BudgetShort] * 3
    assert "no room" in str(found[0])
    assert not late.done()
    share.set_rate(1000)
    async with asyncio.timeout(2):
        await late
        assert share._pump is not None
        await share._pump


async def test_a_caller_canceled_as_its_turn_comes_ends() -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes with the result: who calls in a loop never ends."""
    share = Share("create")

    async def ask() -> None:
        while True:
            await share.take()

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    assert share._pump is not None
    share.set_rate(1000)
    turn, _ = share._waiting[0]
    turn.add_done_callback(lambda _: asking.cancel())  # in the same round of the loop that the turn comes
    async with asyncio.timeout(2):
        done, _ = await asyncio.wait({asking}, timeout=1)
    assert done, "still calling"
    assert asking.cancelled()


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


PROCESSES: tuple[tuple[str, Role], ...] = (("router-1", "router"), ("router-2", "router"), ("worker-1", "worker"))


class Sampled:
    """Budgets of several processes; `most` is the largest sum of their rates that was ever seen."""

    def __init__(self, etcd: Etcd, limit_per_s: int) -> None:
        self.settings = StripeSettings(default_rate_limit_per_s=limit_per_s)
        self.etcd = etcd
        self.budgets: dict[str, Budget] = {}
        self.most = 0.0

    def start(self, name: str, role: Role) -> Budget:
        budget = self.budgets[name] = Budget(self.etcd, self.settings, name=name, role=role)
        budget.start()
        return budget

    @property
    def total(self) -> float:
        return sum(budget._shares["create"].rate_per_s for budget in self.budgets.values())

    async def until(self, total: float) -> None:
        """Until the shares sum to `total`, sampled all the while."""
        async with asyncio.timeout(20):
            while abs(self.total - total) > 0.01:
                self.most = max(self.most, self.total)
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        for budget in self.budgets.values():
            await budget.stop()


@pytest.mark.cluster
async def test_the_sum_stays_within_the_limit_while_processes_come_and_go(etcd_cluster: EtcdCluster) -> None:
    """Sampled all the time: never over the limit, and near it once things are still."""
    async with Etcd(EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix="/budget-test")) as etcd:
        sampled = Sampled(etcd, 100)
        for name, role in PROCESSES:
            sampled.start(name, role)
            await asyncio.sleep(0.3)  # they come one after the other
        await sampled.until(90)
        await sampled.budgets.pop("router-1").stop()
        await sampled.until(90)
        await sampled.stop()
        record = await etcd.get("budget/_shares")
        assert record is not None
        assert not msgspec.json.decode(record.value, type=Record).members, "all was given back"
    assert sampled.most <= 90.01


@pytest.mark.cluster
async def test_a_share_whose_holder_vanished_is_nobodys_until_it_comes_again(etcd_cluster: EtcdCluster) -> None:
    """It may be cut off from etcd and still call Stripe. Under the same name it gets its share back, and no other one."""
    async with Etcd(EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix="/budget-vanished")) as etcd:
        sampled = Sampled(etcd, 100)
        for name, role in PROCESSES:
            sampled.start(name, role)
        await sampled.until(90)
        cut_off = sampled.budgets["router-1"]._shares["create"].rate_per_s
        await etcd.delete("budget/router-1")
        sampled.budgets["router-1"]._tasks[0].cancel()  # its lease can't be renewed, and it goes on as before
        await asyncio.sleep(SETTLE_S + 0.5)  # long enough for the others to grow, if they did
        assert cut_off == pytest.approx(40)
        assert sampled.total == pytest.approx(90)
        await sampled.budgets.pop("router-1")._mirror.stop()
        sampled.start("router-1", "router")
        await sampled.until(90)
        await sampled.stop()
    assert sampled.most <= 90.01


@pytest.mark.cluster
async def test_a_record_that_was_lost_is_made_again_from_what_everybody_does(etcd_cluster: EtcdCluster) -> None:
    """etcd was restored from before: nobody may take what the others still use."""
    async with Etcd(EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix="/budget-lost")) as etcd:
        sampled = Sampled(etcd, 100)
        for name, role in PROCESSES:
            sampled.start(name, role)
        await sampled.until(90)
        await etcd.delete("budget/_shares")
        for _ in range(100):
            sampled.most = max(sampled.most, sampled.total)
            await asyncio.sleep(0.02)
        await sampled.until(90)
        await sampled.stop()
    assert sampled.most <= 90.01


@pytest.mark.cluster
async def test_the_stand_in_never_counts_more_than_the_limit_in_a_second(etcd_cluster: EtcdCluster) -> None:
    """Everybody asks as much as it may, while one comes, one vanishes and goes on asking, and etcd is away for a while."""
    stand_in = StandIn("stripe").start()
    settings = StripeSettings(base_url=stand_in.url, api_key=KEY, default_rate_limit_per_s=25)
    asking: list[asyncio.Task[None]] = []
    try:
        async with (
            Etcd(EtcdSettings(endpoints=tuple(etcd_cluster.endpoints), prefix="/budget-counted")) as etcd,
            AsyncExitStack() as stack,
        ):
            sampled = Sampled(etcd, 25)

            async def process(name: str, role: Role) -> None:
                gateway = await stack.enter_async_context(StripeGateway(settings, sampled.start(name, role)))

                async def ask() -> None:
                    while True:
                        with contextlib.suppress(StripeRefused, StripeUnavailable):
                            await gateway.retrieve("pi_nobody")

                asking.extend(asyncio.create_task(ask()) for _ in range(20))

            for name, role in PROCESSES:
                await process(name, role)
            await sampled.until(dealt(25, 3))
            await process("worker-2", "worker")
            await sampled.until(dealt(25, 4))
            await etcd.delete("budget/router-1")
            sampled.budgets["router-1"]._tasks[0].cancel()
            for member in etcd_cluster.members:
                member.freeze()
            await asyncio.sleep(2)  # etcd is away for that long
            for member in etcd_cluster.members:
                member.thaw()
            await asyncio.sleep(1.5)  # and some time with it
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await sampled.stop()
        counts = stand_in.control("GET", "counts")["calls"]
    finally:
        for member in etcd_cluster.members:
            member.thaw()
        stand_in.stop()
    [by_second] = [seconds for endpoint, seconds in counts.items() if "payment_intents" in endpoint]
    print(sorted(by_second.items()))
    assert max(by_second.values()) <= 25
    assert max(by_second.values()) >= 0.6 * dealt(25, 4), "they did ask as much as they might"


class OnlyLeases:
    """An etcd that grants leases and takes nothing else; after `puts` attempts it does."""

    def __init__(self, puts: int) -> None:
        self.puts = puts
        self.granted: list[SimpleNamespace] = []
        self.revoked: list[SimpleNamespace] = []

    async def grant_lease(self, ttl_s: int) -> SimpleNamespace:
        async def revoke() -> None:
            self.revoked.append(lease)

        lease = SimpleNamespace(id=len(self.granted), lost=asyncio.Event(), revoke=revoke)
        self.granted.append(lease)
        return lease

    async def put(self, key: str, value: bytes, lease: int) -> None:
        self.puts -= 1
        if self.puts >= 0:
            raise EtcdOutcomeUnknown("no answer")


async def test_a_lease_whose_key_was_not_written_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps its leases alive: one more every few seconds, and all of them ask an etcd that just recovers."""
    monkeypatch.setattr("oncepay.budget.RETRY_S", 0.0)
    etcd: Any = OnlyLeases(3)
    budget = Budget(etcd, StripeSettings(), name="r", role="router")
    registered = asyncio.create_task(budget._stay_registered())
    await asyncio.sleep(0.2)
    assert (len(etcd.granted), etcd.revoked) == (4, etcd.granted[:3])
    registered.cancel()
    await asyncio.gather(registered, return_exceptions=True)
    assert etcd.revoked == etcd.granted
