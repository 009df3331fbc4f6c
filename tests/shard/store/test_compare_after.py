"""Refunds and disputes that a restored shard lacks: a real database, and the stand-in for Stripe."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from msgspec.structs import replace

from oncepay.driver import step_key
from oncepay.events import DisputeSeen, RefundRequested, RefundSeen
from oncepay.payment import Dispute, Payment, Progress, Refund, Status
from oncepay.settings import StripeSettings
from oncepay.stripe_client import StripeGateway
from oncepay.transition import move
from shard.store.compare_after import AfterDifference, unknown_disputes, unknown_refunds
from shard.store.migrate import migrate
from shard.store.rows import Put
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.sandbox.process import KEY, StandIn
from tests.shard.worker.harness import ShardDatabase, eventually, new_payment

__all__ = ["postgres_server"]

ALL = [(0, 65_535)]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    started = StandIn("stripe").start()
    yield started
    started.stop()


@pytest.fixture
async def gateway(stand_in: StandIn) -> AsyncIterator[StripeGateway]:
    async with StripeGateway(StripeSettings(base_url=stand_in.url, api_key=KEY)) as opened:
        yield opened


@pytest.fixture
async def shard(postgres_server: PostgresServer) -> AsyncIterator[ShardDatabase]:
    dsn = postgres_server.new_database()
    await migrate(dsn, shard="s0", ranges=ALL, passwords={})
    database = ShardDatabase(postgres_server, dsn, await asyncpg.connect(dsn))
    yield database
    await database.close()


async def paid(shard: ShardDatabase, gateway: StripeGateway, key: str, card: str = "pm_card_visa") -> Payment:
    """A payment that succeeded at Stripe, and whose row says so."""
    version = StripeSettings().api_version
    parameters = {"amount": 1000, "currency": "usd", "metadata": {"oncepay_key": key}}
    intent = await gateway.create(parameters, step_key(key, "create"), version)
    await gateway.confirm(intent.id, {"payment_method": card}, step_key(key, "confirm:1"), version)
    made = new_payment(key)
    after = replace(
        made, status=Status.SUCCEEDED, version=2, intent=intent.id, amount_captured=1000, progress=Progress(stripe_fee=30)
    )
    await shard.put(Put(made, 0, "accepted"))
    await shard.put(Put(after, 1, "seen"))
    return after


async def refunded(gateway: StripeGateway, payment: Payment, name: str, amount: int = 100) -> RefundSeen:
    parameters = {
        "payment_intent": payment.intent, "amount": amount, "metadata": {"oncepay_key": payment.key, "oncepay_refund": name},
    }  # fmt: skip
    view = await gateway.refund(parameters, step_key(payment.key, f"refund:{name}"), StripeSettings().api_version)
    return RefundSeen(view, True)


async def lacks(
    shard: ShardDatabase, gateway: StripeGateway, ranges: list[tuple[int, int]] = ALL, since: int = 0
) -> list[AfterDifference]:
    found: list[AfterDifference] = []
    for unknown in (unknown_refunds, unknown_disputes):
        async for _, differences in unknown(shard.connection, gateway, ranges, since=since):
            found += differences
    return found


async def test_a_refund_that_the_row_does_not_know_is_named(shard: ShardDatabase, gateway: StripeGateway) -> None:
    payment = await paid(shard, gateway, "k")
    assert await lacks(shard, gateway) == []
    seen = await refunded(gateway, payment, "r1")
    (missing,) = await lacks(shard, gateway)
    assert (missing.what, missing.kind, missing.id, missing.key) == ("missing", "refund", seen.view.id, "k")
    assert (missing.amount, missing.status, missing.row_status, missing.intent) == (100, "succeeded", None, payment.intent)
    assert await lacks(shard, gateway, since=missing.created + 1) == []
    assert await lacks(shard, gateway, [(0, 0)]) == [], "of slots that the shard didn't have"
    moved = move(payment, seen).payment
    await shard.put(Put(replace(moved, version=3), 2, "seen"))
    assert await lacks(shard, gateway) == []


async def test_a_refund_that_was_asked_for_is_behind(shard: ShardDatabase, gateway: StripeGateway) -> None:
    """By its key: the row is of before its answer."""
    payment = await paid(shard, gateway, "asked")
    asked = move(payment, RefundRequested("r1", (replace(payment.terms.shares[0], gross=100, fee=10),), "", 1)).payment
    await shard.put(Put(replace(asked, version=3), 2, "asked"))
    await refunded(gateway, payment, "r1")
    assert [(each.what, each.row_status) for each in await lacks(shard, gateway)] == [("behind", "requested")]


async def test_a_refund_of_a_payment_that_has_no_row_is_left_to_the_intents(shard: ShardDatabase, gateway: StripeGateway) -> None:
    payment = await paid(shard, gateway, "here")
    await refunded(gateway, replace(payment, key="here"), "r1")
    await shard.connection.execute("alter table oncepay.payments disable trigger all")
    await shard.connection.execute("delete from oncepay.payments")
    assert await lacks(shard, gateway) == []


async def test_all_pages_are_read(shard: ShardDatabase, gateway: StripeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncepay.stripe_client.PAGE_MAX", 2)
    payment = await paid(shard, gateway, "pages")
    for number in range(5):
        await refunded(gateway, payment, f"r{number}", 10)
    assert len(await lacks(shard, gateway)) == 5


async def test_a_dispute_that_the_row_does_not_know_is_named(shard: ShardDatabase, gateway: StripeGateway) -> None:
    payment = await paid(shard, gateway, "disputed", "pm_card_createDispute")

    async def is_there() -> bool:
        return bool(await gateway.disputes(payment.intent))

    await eventually(is_there, "the dispute")
    (missing,) = await lacks(shard, gateway)
    assert (missing.what, missing.kind, missing.key, missing.row_status) == ("missing", "dispute", "disputed", None)
    (view,) = await gateway.disputes(payment.intent)
    known = move(payment, DisputeSeen(view)).payment
    await shard.put(Put(replace(known, version=3), 2, "seen"))
    assert await lacks(shard, gateway) == []
    unbooked = (Dispute(view.id, view.status, view.amount),)
    await shard.put(Put(replace(payment, version=4, progress=Progress(stripe_fee=30, disputes=unbooked)), 3, "planted"))
    assert [each.what for each in await lacks(shard, gateway)] == ["behind"]


async def test_a_refund_that_failed_since_is_behind(shard: ShardDatabase, gateway: StripeGateway, stand_in: StandIn) -> None:
    """Nothing looks at a refund that was booked, so nobody would give the seller the money back."""
    payment = await paid(shard, gateway, "fails", "pm_card_refundFail")
    seen = await refunded(gateway, payment, "r1")
    known = (Refund("r1", 100, payment.terms.shares, 1, "succeeded", seen.view.id, booked=("txn",)),)
    progress = Progress(stripe_fee=30, refunds=known)
    await shard.put(Put(replace(payment, version=3, amount_refunded=100, progress=progress), 2, "planted"))
    assert await lacks(shard, gateway) == []
    stand_in.advance(60)

    async def has_failed() -> bool:
        return [each.status for each in await gateway.refunds(payment.intent)] == ["failed"]

    await eventually(has_failed, "the refund's failure")
    assert [(each.what, each.status) for each in await lacks(shard, gateway)] == [("behind", "failed")]
