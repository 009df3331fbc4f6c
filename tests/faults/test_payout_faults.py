"""Payout runs while aggregators and workers are killed and Tipalti loses answers: each seller is paid once, and exactly."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from cli.verify import verify_cluster
from deploy.local import Cluster
from deploy.local.status import Status
from oncepay.payout import GIVEN_BACK, PayoutStatus
from oncepay.payout import ref_code as code_of
from oncepay.tipalti_client import TipaltiClient
from tests.faults.witness import kill_process, until_status

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(400)]

SELLERS = 60
ROUNDS = 6
PRICE = 1_000
NET = 900
FAULTS = {"seed": 11, "lost_answer": 0.3, "error_before": 0.1, "webhook_lost": 0.3, "webhook_doubled": 0.3, "latency_ms": [0, 60]}
KILLS = ("aggregator", "worker-s0-1", "aggregator", "worker-s1-1", "aggregator")
SETTLED_S = 120.0


class Market:
    """Sellers, what was sold of each, and the runs that pay them."""

    def __init__(self, status: Status, http: aiohttp.ClientSession, tipalti: TipaltiClient) -> None:
        self.urls = status.urls
        self.http = http
        self.tipalti = tipalti
        prefix = f"pf-{os.urandom(5).hex()}"
        self.sellers = [f"{prefix}-{'returned-' if n % 5 == 0 else ''}{n}" for n in range(SELLERS)]
        self.sold: defaultdict[str, int] = defaultdict(int)
        self.runs_answered = 0

    async def begin(self) -> None:
        """Every seller is put, and has a payee that can be paid."""
        for name in self.sellers:
            await self.tipalti.create_payee(name)
            await self.control("POST", "payee", {"payee": name, "payable": True})
            body = {"payee": name, "currency": "usd", "fee": {"basis_points": 1000, "fixed_minor": 0}}
            async with self.http.put(f"{self.urls['router']}/v1/sellers/{name}", json=body) as answer:
                assert answer.status == 201, await answer.text()

    async def control(self, method: str, name: str, body: object) -> None:
        async with self.http.request(method, f"{self.urls['tipalti']}/_control/{name}", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def sell(self) -> None:
        """One item of every seller, in one cart."""
        items = [{"seller": name, "amount": PRICE} for name in self.sellers]
        body = {"buyer": "b", "currency": "usd", "items": items, "payment_method": "pm_card_visa"}
        headers = {"Idempotency-Key": f"{self.sellers[0]}-{self.sold[self.sellers[0]]}"}
        async with self.http.post(f"{self.urls['router']}/v1/payments", json=body, headers=headers) as answer:
            assert (await answer.json())["status"] == "succeeded", await answer.text()
        for name in self.sellers:
            self.sold[name] += NET

    async def run(self) -> bool:
        """A run; whether it was answered. One that wasn't may have made everything, something or nothing."""
        try:
            async with self.http.post(f"{self.urls['aggregator']}/v1/payouts", json={"sellers": self.sellers}) as answer:
                await answer.read()
                self.runs_answered += answer.status in (200, 201)
                return answer.status in (200, 201)
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def until_run(self) -> dict[str, Any]:
        """A run that was answered."""
        async with asyncio.timeout(SETTLED_S):
            while True:
                try:
                    async with self.http.post(f"{self.urls['aggregator']}/v1/payouts", json={"sellers": self.sellers}) as answer:
                        if answer.status in (200, 201):
                            found: dict[str, Any] = await answer.json()
                            return found
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.5)

    async def payouts(self) -> dict[str, list[dict[str, Any]]]:
        """Every seller's payouts, as the aggregator shows them."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name in self.sellers:
            async with self.http.get(f"{self.urls['aggregator']}/v1/sellers/{name}/payouts?limit=500") as answer:
                found[name] = (await answer.json())["payouts"]
        return found

    async def until_over(self) -> dict[str, list[dict[str, Any]]]:
        """Until nothing moves any more: everything that was earned is cleared."""
        async with asyncio.timeout(SETTLED_S):
            while True:
                await self.until_run()
                await self.control("POST", "clock", {"advance_s": 3_700})
                payouts = await self.payouts()
                cleared = {
                    name: sum(payout["amount"] for payout in rows if payout["status"] == PayoutStatus.CLEARED)
                    for name, rows in payouts.items()
                }
                if all(cleared[name] == self.sold[name] for name in self.sellers if "returned" not in name):
                    return payouts
                await asyncio.sleep(1.0)


@asynccontextmanager
async def market(cluster: Cluster) -> AsyncIterator[Market]:
    status = cluster.status()
    timeout = aiohttp.ClientTimeout(total=60)
    headers = {"Authorization": f"Bearer {status.api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout) as http,
        TipaltiClient(cluster.settings.tipalti) as tipalti,
    ):
        made = Market(status, http, tipalti)
        await made.begin()
        await made.control("PUT", "faults", FAULTS)
        try:
            yield made
        finally:
            await made.control("PUT", "faults", {})


async def test_runs_while_everything_that_makes_them_is_killed(cluster: Cluster) -> None:
    async with market(cluster) as made:

        async def kill() -> None:
            for name in KILLS:
                await asyncio.sleep(1.5)  # spread over the runs: there is no event that says "in the middle of one"
                await kill_process(cluster, name)

        async with asyncio.TaskGroup() as group:
            killing = group.create_task(kill())
            for _ in range(ROUNDS):
                await made.sell()
                await asyncio.gather(made.run(), made.run(), made.run())
            while not killing.done():
                await made.run()
        await until_status(cluster, lambda status: status.healthy)
        payouts = await made.until_over()
        await made.control("PUT", "faults", {})
        for name, rows in payouts.items():
            assert sorted(row["sequence"] for row in rows) == list(range(1, len(rows) + 1))
            taken = sum(row["amount"] for row in rows if row["status"] not in GIVEN_BACK)
            assert taken <= made.sold[name]
            if "returned" not in name:
                assert taken == made.sold[name]
                codes = [code_of(row["key"]) for row in rows]
                at_tipalti = (await made.tipalti.payments(codes)).values()
                assert sum(view.amount for view in at_tipalti if view.known is PayoutStatus.CLEARED) == made.sold[name]
        verdict = await verify_cluster(await until_status(cluster, lambda status: status.healthy))
        assert verdict["ok"], verdict["differences"]
        assert made.runs_answered > 0
