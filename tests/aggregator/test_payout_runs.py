"""Payouts on the whole cluster: from a balance to the bank, and every way in which a seller could be paid twice."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from msgspec.structs import replace

from aggregator.database import Database
from aggregator.positions import Reader
from aggregator.runs import Runs
from deploy.local import Cluster
from oncepay.etcd import Etcd
from oncepay.payout import Payout, PayoutStatus, new_payout
from oncepay.settings import PayoutSettings
from oncepay.tipalti_client import TipaltiClient
from shard.store.payouts import PayoutStore
from shard.store.store import Shards

pytestmark = pytest.mark.cluster

WAIT_S = 30.0


class Market:
    """The cluster as a seller, an operator and Tipalti see it."""

    def __init__(
        self, cluster: Cluster, http: aiohttp.ClientSession, shards: Shards, tipalti: TipaltiClient, reader: Reader
    ) -> None:
        self.cluster = cluster
        self.urls = cluster.status().urls
        self.http = http
        self.tipalti = tipalti
        self.shards = shards
        self.store = PayoutStore(shards, "test")
        self.reader = reader
        self.prefix = f"po-{os.urandom(5).hex()}"
        self._numbers = iter(range(1_000))

    def runs(self, **settings: Any) -> Runs:
        """Another process that makes runs, with settings of its own."""
        return Runs(self.reader, self.shards, PayoutStore(self.shards, "test-run"), self.tipalti, PayoutSettings(**settings))

    async def seller(self, fate: str = "", *, payee: bool = True) -> str:
        """A seller whose payee at Tipalti can be paid."""
        name = f"{self.prefix}-{fate}{next(self._numbers)}"
        body = {"payee": name, "currency": "usd", "fee": {"basis_points": 1000, "fixed_minor": 0}}
        async with self.http.put(f"{self.urls['router']}/v1/sellers/{name}", json=body) as answer:
            assert answer.status == 201, await answer.text()
        if payee:
            await self.tipalti.create_payee(name)
            await self.control("payee", {"payee": name, "payable": True})
        return name

    async def control(self, name: str, body: object) -> None:
        async with self.http.post(f"{self.urls['tipalti']}/_control/{name}", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def sell(self, seller: str, amount: int) -> None:
        """A sale of which the seller gets nine tenths."""
        body = {
            "buyer": "b", "currency": "usd", "items": [{"seller": seller, "amount": amount}], "payment_method": "pm_card_visa",
        }  # fmt: skip
        headers = {"Idempotency-Key": f"{seller}-{next(self._numbers)}"}
        async with self.http.post(f"{self.urls['router']}/v1/payments", json=body, headers=headers) as answer:
            assert (await answer.json())["status"] == "succeeded", await answer.text()

    async def run(self, *sellers: str, **body: object) -> dict[str, Any]:
        """A run over the API, of these sellers alone."""
        async with self.http.post(f"{self.urls['aggregator']}/v1/payouts", json={"sellers": list(sellers), **body}) as answer:
            found: dict[str, Any] = await answer.json()
            assert answer.status in (200, 201), found
            return found

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        async with self.http.request(method, f"{self.urls['aggregator']}{path}", json=body) as answer:
            return answer.status, await answer.json()

    async def until(self, key: str, *statuses: str) -> Payout:
        """The payout, once it is in one of these states."""
        async with asyncio.timeout(WAIT_S):
            while True:
                payout = await self.store.get(key)
                if payout is not None and payout.status.value in statuses:
                    return payout
                await asyncio.sleep(0.1)

    async def paid_at_tipalti(self, seller: str, up_to: int = 4) -> list[int]:
        """The amounts of all payments that Tipalti has for the seller."""
        keys = [f"payout:{seller}:usd:{n}" for n in range(1, up_to + 1)]
        codes = [new(key).ref_code for key in keys]
        return sorted(view.amount for view in (await self.tipalti.payments(codes)).values())

    async def owed(self, seller: str, balance: int) -> None:
        """Until the aggregator shows this balance."""
        async with asyncio.timeout(WAIT_S):
            while True:
                _, found = await self.call("GET", f"/v1/sellers/{seller}/balance")
                if [item["balance"] for item in found["balances"]] == [balance]:
                    return
                await asyncio.sleep(0.05)

    async def notify(self, body: bytes, secret: str = "") -> tuple[int, dict[str, Any]]:
        stamp = int(time.time())
        secret = secret or self.cluster.layout.tipalti_notifications.read_text().strip()
        digest = hmac.new(secret.encode(), f"{stamp}-".encode() + body, hashlib.sha256).hexdigest()
        headers = {"tipalti-signature": f"{stamp},{digest}", "Content-Type": "application/json"}
        async with self.http.post(f"{self.urls['router']}/v1/webhooks/tipalti", data=body, headers=headers) as answer:
            return answer.status, await answer.json()


def new(key: str, amount: int = 1, *, run: str = "other") -> Payout:
    _, seller, currency, number = key.split(":")
    now_ms = time.time_ns() // 1_000_000
    return new_payout(
        seller, currency, int(number), amount=amount, payee=seller, run=run, created_by="ann", positions={}, needs_approval=False,
        now_ms=now_ms,
    )  # fmt: skip


@pytest.fixture
async def market(cluster: Cluster) -> AsyncIterator[Market]:
    settings = cluster.settings
    headers = {"Authorization": f"Bearer {cluster.status().api_key}"}
    async with (
        Etcd(settings.etcd) as etcd,
        aiohttp.ClientSession(headers=headers) as http,
        TipaltiClient(settings.tipalti) as tipalti,
        Database(settings.aggregator_dsn) as database,
    ):
        shards = Shards(etcd, settings, role="oncepay_aggregator", password=settings.postgres.aggregator_password, actor="test")
        await shards.start()
        try:
            yield Market(cluster, http, shards, tipalti, Reader(database))
        finally:
            await shards.stop()


def key_of(found: dict[str, Any]) -> str:
    (payout,) = found["payouts"]
    return str(payout["key"])


async def test_a_balance_is_paid_once_and_what_the_bank_returns_is_paid_again(market: Market) -> None:
    seller = await market.seller("returned-")
    await market.sell(seller, 5_000)
    tried = await market.run(seller, dry_run=True)
    assert (tried["dry_run"], tried["totals"][0]["amount"]) == (True, 4_500)
    assert await market.store.get(key_of(tried)) is None
    made = await market.run(seller)
    key = f"payout:{seller}:usd:1"
    assert (key_of(made), made["payouts"][0]["amount"], made["held"]) == (key, 4_500, [])
    again = await market.run(seller)
    assert (again["payouts"], again["totals"]) == ([], [])
    await market.control("clock", {"advance_s": 5})
    paid = await market.until(key, "paid")
    assert paid.progress.fee == 100
    await market.sell(seller, 1_000)
    assert (await market.run(seller))["payouts"][0]["amount"] == 900
    await market.control("clock", {"advance_s": 3_601})
    returned = await market.until(key, "returned")
    status, shown = await market.call("GET", f"/v1/payouts/{quote(key, safe='')}")
    assert (status, shown["payout"]["status"]) == (200, "returned")
    assert [entry["kind"] for entry in shown["entries"]][:2] == ["payout", "payout_fee"]
    assert {entry["kind"] for entry in shown["entries"]} == {"payout", "payout_fee", "payout_returned"}
    assert returned.progress.payment
    third = await market.run(seller)
    assert (key_of(third), third["payouts"][0]["amount"]) == (f"payout:{seller}:usd:3", 4_500)
    await market.owed(seller, 0)
    _, listed = await market.call("GET", f"/v1/sellers/{seller}/payouts?limit=2")
    assert [payout["sequence"] for payout in listed["payouts"]] == [3, 2]
    _, rest = await market.call("GET", f"/v1/sellers/{seller}/payouts?limit=2&cursor={listed['cursor']}")
    assert ([payout["sequence"] for payout in rest["payouts"]], rest["cursor"]) == ([1], None)


async def test_runs_at_once_and_runs_from_an_old_balance_pay_once(market: Market) -> None:
    seller = await market.seller()
    await market.sell(seller, 3_000)
    runs = [market.runs() for _ in range(4)]
    found = await asyncio.gather(*(each.run(f"operator-{n}", sellers=[seller]) for n, each in enumerate(runs)))
    assert sum(len(view.payouts) for view in found) == 1
    assert {item.reason for view in found for item in view.held} <= {"exists"}
    key = f"payout:{seller}:usd:1"
    await market.until(key, "submitted", "scheduled", "paid")
    # A run that was frozen since before that one: what it has computed is of the same sequence, or too old.
    limits = {shard: moment.now + dt.timedelta(minutes=1) for shard, moment in (await market.store.moments()).items()}
    late = dict.fromkeys(limits, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    assert await market.store.make([new(key, 2_700)], limits) == {key: "exists"}
    following = new(f"payout:{seller}:usd:2", 2_700)
    assert await market.store.make([following], late) == {following.key: "late"}
    assert await market.store.get(following.key) is None
    assert await market.paid_at_tipalti(seller) == [2_700]


async def test_a_run_that_died_after_its_commit_needs_no_repair(market: Market) -> None:
    """The rows are there, nobody heard of them: the worker tells Tipalti, and the same run again makes nothing."""
    seller = await market.seller()
    await market.sell(seller, 2_000)
    await market.owed(seller, 1_800)
    payout = new(f"payout:{seller}:usd:1", 1_800, run="died")
    limits = {shard: moment.now + dt.timedelta(minutes=1) for shard, moment in (await market.store.moments()).items()}
    assert await market.store.make([payout], limits) == {payout.key: "made"}
    assert await market.store.make([payout], limits) == {payout.key: "made"}, "the same run, which didn't hear the answer"
    assert (await market.run(seller))["payouts"] == []
    await market.until(payout.key, "submitted", "scheduled", "paid")
    assert await market.paid_at_tipalti(seller) == [1_800]


async def test_a_feed_that_lags_holds_the_next_payout_back(market: Market) -> None:
    """The aggregator as it is before it has the entry of payout 1: its balance still holds the money."""
    seller = await market.seller()
    await market.sell(seller, 2_000)
    await market.owed(seller, 1_800)
    runs = market.runs()
    old = await runs._run("ann", dry_run=True, currency=None, sellers=[seller])
    assert [payout.amount for payout in old.payouts] == [1_800]
    await market.run(seller)
    await market.until(f"payout:{seller}:usd:1", "submitted", "scheduled", "paid")
    stale = [replace(new(payout.key, payout.amount), run=old.run) for payout in old.payouts]
    limits = {shard: moment.now + dt.timedelta(minutes=1) for shard, moment in (await market.store.moments()).items()}
    assert set((await market.store.make(stale, limits)).values()) == {"exists"}
    assert await market.paid_at_tipalti(seller) == [1_800]


async def test_what_is_held_and_why(market: Market) -> None:
    unknown, blocked, small = (
        await market.seller(payee=False),
        await market.seller("unpayable-", payee=False),
        await market.seller(),
    )
    await market.tipalti.create_payee(blocked)
    for seller, amount in ((unknown, 1_000), (blocked, 1_000), (small, 1_000)):
        await market.sell(seller, amount)
    found = await market.run(unknown, blocked)
    assert {item["seller"]: item["reason"] for item in found["held"]} == {unknown: "unknown_payee", blocked: "unpayable"}
    assert found["payouts"] == []
    held = await market.runs(minimum_minor={"usd": 901}).run("ann", sellers=[small])
    assert [(item.reason, item.detail) for item in held.held] == [("minimum", "900 of 901")]
    fresh = await market.runs(hold_s=3_600).run("ann", sellers=[small])
    assert [item.reason for item in fresh.held] == ["pending"]
    due = await market.runs(minimum_minor={"usd": 900}).run("ann", sellers=[small], dry_run=True)
    assert [payout.amount for payout in due.payouts] == [900]


async def test_a_second_operator_approves(market: Market) -> None:
    one, two = await market.seller(), await market.seller()
    for seller in (one, two):
        await market.sell(seller, 10_000)
    made = await market.runs(approval_above_minor={"usd": 8_999}).run("ann", sellers=[one, two])
    assert [payout.status for payout in made.payouts] == ["awaiting_approval"] * 2
    first, second = (f"payout:{seller}:usd:1" for seller in (one, two))
    assert (await market.run(one, two))["payouts"] == [], "the amount is taken already"
    status, shown = await market.call("POST", f"/v1/payouts/{quote(first, safe='')}/approve")
    assert (status, shown["status"], shown["approved_by"]) == (200, "created", "local")
    await market.until(first, "submitted", "scheduled", "paid")
    status, shown = await market.call("POST", f"/v1/payouts/{quote(second, safe='')}/decline", {"reason": "in doubt"})
    assert (status, shown["status"], shown["reason"]) == (200, "declined", "in doubt")
    status, problem = await market.call("POST", f"/v1/payouts/{quote(first, safe='')}/decline", {})
    assert (status, problem["type"].rsplit("/", 1)[1]) == (409, "wrong-state")
    own = await market.runs(approval_above_minor={"usd": 1}).run("local", sellers=[two])
    assert [payout.sequence for payout in own.payouts] == [2]
    status, problem = await market.call("POST", f"/v1/payouts/{quote(own.payouts[0].key, safe='')}/approve")
    assert status == 403
    assert await market.paid_at_tipalti(two) == []
    await market.call("POST", f"/v1/payouts/{quote(own.payouts[0].key, safe='')}/decline", {})


async def test_notifications_doubled_late_and_forged(market: Market) -> None:
    seller = await market.seller()
    await market.sell(seller, 4_000)
    key = key_of(await market.run(seller))
    await market.until(key, "submitted", "scheduled", "paid")
    await market.control("clock", {"advance_s": 5})
    await market.until(key, "paid")
    await market.control("clock", {"advance_s": 3_601})
    cleared = await market.until(key, "cleared")
    data = {"refCode": cleared.ref_code, "paymentId": cleared.progress.payment}
    for name in ("payment_submitted", "completed", "error", "completed"):
        body = json.dumps({"id": "ipn_late", "type": name, "eventData": data}).encode()
        assert await market.notify(body) == (200, {"received": True, "outcome": "known"})
    after = await market.store.get_with_entries(key)
    assert after is not None
    assert after[0] == cleared
    assert sum(1 for entry in after[1] if entry.kind == "payout") == 1
    status, problem = await market.notify(body, secret="stolen")
    assert (status, problem["type"].rsplit("/", 1)[1]) == (400, "bad-signature")
    foreign = json.dumps({"id": "ipn_x", "type": "completed", "eventData": {"refCode": "of another system"}}).encode()
    assert (await market.notify(foreign))[1]["outcome"] == "foreign"
    about_payee = json.dumps({"id": "ipn_y", "type": "payee_details_changed", "eventData": {"refCode": seller}}).encode()
    assert (await market.notify(about_payee))[1]["outcome"] == "ignored"


async def test_the_database_holds_what_it_is_told_to_hold(market: Market) -> None:
    """One poisonous row fails alone; what is over stays over; a key is of its seller, currency and sequence."""
    seller = await market.seller()
    limits = {shard: moment.now + dt.timedelta(minutes=1) for shard, moment in (await market.store.moments()).items()}
    waits = replace(new(f"payout:{seller}:usd:1", 500), status=PayoutStatus.AWAITING_APPROVAL)
    assert await market.store.make([waits], limits) == {waits.key: "made"}
    found = await market.store.get(waits.key)
    assert found is not None
    assert found == replace(waits, version=1)
    status, _ = await market.call("POST", f"/v1/payouts/{quote(waits.key, safe='')}/decline", {"reason": "a\0b"})
    assert status == 422
    forged = replace(new(f"payout:{seller}:usd:2", 500), amount=0)
    with pytest.raises(Exception, match="refused"):
        await market.store.make([forged, replace(waits, run="x")], limits)
    await market.call("POST", f"/v1/payouts/{quote(waits.key, safe='')}/decline", {})
    await market.owed(seller, 0)
