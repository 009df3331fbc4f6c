"""Differences of each kind, planted by SQL or at the stand-in for Stripe: each is named, with its key, and nothing else.

The world is shared: each test compares with what the ones before it left, and plants on a payment of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import asyncpg
import pytest

from aggregator.migrate import migrate as migrate_aggregator
from loadtest.checker import Difference, Report, Unreachable, verify
from oncepay.feed import FeedBatch
from tests.aggregator.process import aggregator
from tests.aggregator.strategies import slot_of
from tests.etcd_fixture import free_ports
from tests.loadtest.checker.world import (
    CANCELED,
    FAILED,
    OPEN,
    SUCCEEDED,
    World,
    databases_and_services,
    fill,
    migrate,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    async def build(made: World) -> None:
        await migrate(made)
        await fill(made)

    with databases_and_services() as made:
        asyncio.run(build(made))
        yield made


@pytest.fixture
async def before(world: World) -> set[Difference]:
    """What differs already."""
    return set((await world.verify()).differences)


async def planted(world: World, before: set[Difference], promise: int, key: str) -> Report:
    """The new differences are of this promise and key (and of no other key)."""
    report = await world.verify()
    new = set(report.differences) - before
    assert any(found.promise == promise and found.key == key for found in new), new
    assert {found.key for found in new} == {key}, new
    assert all(found.what and found.advice for found in new)
    assert not report.ok
    return report


async def test_a_sound_world_has_no_difference(world: World) -> None:
    report = await world.verify()
    assert report.differences == []
    assert report.ok
    assert report.open == len(OPEN)
    checked = report.checked
    assert checked["payments"] == checked["keys"] == len(SUCCEEDED + FAILED + CANCELED + OPEN)
    assert (checked["succeeded"], checked["failed"], checked["canceled"]) == (len(SUCCEEDED), len(FAILED), len(CANCELED))
    assert checked["intents"] == checked["payments"]
    assert checked["confirmed_intents"] == len(SUCCEEDED + FAILED)
    assert checked["entries"] == checked["derived_entries"] == 2 * len(SUCCEEDED)
    assert checked["balance_transactions"] == len(SUCCEEDED)
    assert (checked["sellers"], checked["orphans"], checked["looks"]) == (3, 0, 1)


async def test_an_unconfirmed_intent_without_a_row_is_counted(world: World, before: set[Difference]) -> None:
    form = {"amount": "500", "currency": "usd", "metadata[oncepay_key]": "nobody", "payment_method_types[]": "card"}
    await world.stripe("/v1/payment_intents", **form)
    report = await world.verify()
    assert set(report.differences) == before
    assert report.checked["orphans"] == 1


async def confirmed_intent(world: World, key: str) -> str:
    form = {"amount": "500", "currency": "usd", "metadata[oncepay_key]": key, "payment_method_types[]": "card"}
    return await world.stripe("/v1/payment_intents", **form, payment_method="pm_card_visa_chargeDeclined", confirm="false")


async def test_1_a_second_confirmed_intent_for_a_key(world: World, before: set[Difference]) -> None:
    intent = await confirmed_intent(world, SUCCEEDED[0])
    with pytest.raises(AssertionError, match="declined"):
        await world.stripe(f"/v1/payment_intents/{intent}/confirm")
    report = await planted(world, before, 1, SUCCEEDED[0])
    assert any(intent in found.what for found in report.differences if found.promise == 1)
    assert any(intent in found.what for found in report.differences if found.promise == 3)


async def test_1_a_row_in_two_shards(world: World, before: set[Difference]) -> None:
    key = FAILED[0]
    other = "s1" if world.shard_of(key) == "s0" else "s0"
    connection = await asyncpg.connect(world.shard_dsns[world.shard_of(key)])
    row = await connection.fetchrow("select * from oncepay.payments where key = $1", key)
    await connection.close()
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    await world.sql(other, f"insert into oncepay.payments values ({places})", *row)
    await planted(world, before, 1, key)


async def test_1_a_row_in_a_slot_that_is_not_its_own(world: World, before: set[Difference]) -> None:
    key = FAILED[1]
    await world.sql(key, "alter table oncepay.payments drop constraint payments_slot_of_key")
    slot = slot_of(key) ^ 1
    await world.sql(key, "update oncepay.payments set slot = $2 where key = $1", key, slot)
    await world.sql("aggregator", "update oncepay.payments set slot = $2 where key = $1", key, slot)
    await planted(world, before, 1, key)


async def test_3_money_without_a_row(world: World, before: set[Difference]) -> None:
    form = {"amount": "700", "currency": "usd", "metadata[oncepay_key]": "lost", "payment_method_types[]": "card"}
    intent = await world.stripe("/v1/payment_intents", **form, payment_method="pm_card_visa", confirm="true")
    await world.until_posted(intent)
    report = await world.verify()
    new = set(report.differences) - before
    assert {(found.promise, found.key) for found in new if found.promise == 3} == {(3, "lost")}
    assert {found.promise for found in new} == {3, 7}, "and its balance transaction has no postings"
    assert any(intent in found.what for found in new)


async def test_4_given_up_here_and_not_at_stripe(world: World, before: set[Difference]) -> None:
    for where in (OPEN[0], "aggregator"):
        await world.sql(where, "update oncepay.payments set status = 'canceled' where key = $1", OPEN[0])
    report = await planted(world, before, 4, OPEN[0])
    assert report.open == len(OPEN) - 1


async def test_4_a_row_whose_intent_stripe_doesnt_have(world: World, before: set[Difference]) -> None:
    for where, column in ((CANCELED[0], "intent"), ("aggregator", "payment_intent")):
        await world.sql(where, f"update oncepay.payments set {column} = 'pi_gone' where key = $1", CANCELED[0])
    await planted(world, before, 4, CANCELED[0])


async def test_4_another_amount_than_stripe_took(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[1]
    for where in (key, "aggregator"):
        await world.sql(where, "update oncepay.payments set amount_captured = amount_captured - 1 where key = $1", key)
    report = await planted(world, before, 4, key)
    assert any(found.promise == 5 and found.key == key for found in report.differences), "and its entry says another amount"


async def test_5_an_entry_that_does_not_sum_to_zero(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[2]
    await world.sql(key, "alter table oncepay.entries drop constraint entries_balance")
    for where, table in ((key, "entries"), ("aggregator", "entry_rows")):
        statement = f"update oncepay.{table} set amounts[1] = amounts[1] + 1 where key = $1 and kind = 'payment'"
        await world.sql(where, statement, key)
    report = await world.verify()
    new = {(found.promise, found.key) for found in set(report.differences) - before}
    assert (5, key) in new
    assert (6, "stripe:clearing") in new, "and the sums are no longer the fold"


async def test_5_a_split_that_is_off_by_one(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[3]
    statement = (
        "update oncepay.entries set amounts[2] = amounts[2] + 1, amounts[4] = amounts[4] - 1 where key = $1 and kind = 'payment'"
    )
    await world.sql(key, statement, key)
    report = await planted(world, before, 5, key)
    assert any(found.promise == 6 and found.key == key for found in report.differences), "the aggregator has it as it was"


async def test_5_a_payment_that_was_booked_twice(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[4]
    statement = (
        "insert into oncepay.entries select slot, key, entry_id || '-again', kind, currency, source, accounts, amounts, sellers,"
        " created_at from oncepay.entries where key = $1 and kind = 'payment'"
    )
    await world.sql(key, statement, key)
    await planted(world, before, 5, key)


async def test_6_an_entry_that_the_aggregator_lacks(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[5]
    await world.sql("aggregator", "delete from oncepay.entry_rows where key = $1 and kind = 'payment'", key)
    report = await world.verify()
    new = {(found.promise, found.key) for found in set(report.differences) - before}
    assert (6, key) in new
    assert {(6, "ann"), (6, "bob"), (6, "platform")} <= new, "and the sums are no longer the fold"


async def test_6_an_entry_that_no_shard_has(world: World, before: set[Difference]) -> None:
    statement = (
        "insert into oncepay.entry_rows select 'ghost', entry_id, slot, 'other', currency, source, accounts, amounts, sellers,"
        " created_at, shard, lsn from oncepay.entries where key = $1 and kind = 'stripe_fee'"
    )
    await world.sql("aggregator", statement, SUCCEEDED[6])
    report = await world.verify()
    assert any(found.promise == 6 and found.key == "ghost" for found in set(report.differences) - before)


async def test_6_an_older_state_in_the_aggregator(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[7]
    await world.sql("aggregator", "update oncepay.payments set status = 'processing', version = version - 1 where key = $1", key)
    await planted(world, before, 6, key)


async def test_6_revenue_that_no_entry_gives(world: World, before: set[Difference]) -> None:
    await world.sql("aggregator", "update oncepay.seller_days set gross = gross + 5, net = net + 5 where seller = 'bob'")
    await planted(world, before, 6, "bob")


async def test_6_an_account_that_no_entry_gives(world: World, before: set[Difference]) -> None:
    await world.sql("aggregator", "update oncepay.account_totals set credit = credit + 5 where account = 'platform:fees'")
    await planted(world, before, 6, "platform:fees")


async def test_6_an_api_that_shows_something_else(world: World, before: set[Difference]) -> None:
    other = world.server.new_database()
    await migrate_aggregator(other, passwords={})
    connection = await asyncpg.connect(other)
    positions = [(shard, lsn) for shard, lsn in world.lsn.items()]
    await connection.executemany("insert into oncepay.watermarks values ($1, 'i', 1, $2)", positions)
    await connection.close()
    with aggregator(other) as process:
        report = await verify(world.target(aggregator_url=process.url))
    new = set(report.differences) - before
    assert {"ann", "bob", "platform"} <= {found.key for found in new}
    assert all("API" in found.what for found in new)


async def test_7_a_balance_transaction_without_postings(world: World, before: set[Difference]) -> None:
    intent = await world.intent_of(SUCCEEDED[8])
    await world.stripe("/v1/refunds", payment_intent=intent, amount="100")
    report = await world.verify()
    (new,) = set(report.differences) - before
    assert new.promise == 7
    assert "net -100 usd" in new.what
    young = await world.verify(grace_s=600)
    assert new not in young.differences, "within the grace it may still be booked"
    assert young.checked["awaited"] >= 1


async def test_7_postings_without_a_balance_transaction(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[9]
    for where, table in ((key, "balance_links"), ("aggregator", "link_rows")):
        await world.sql(where, f"delete from oncepay.{table} where key = $1", key)
    report = await world.verify()
    new = set(report.differences) - before
    assert {found.promise for found in new} == {7}
    assert key in {found.key for found in new}


async def test_7_another_net_than_stripes(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[10]
    statement = (
        "update oncepay.entries set amounts = array[amounts[1] + 1, amounts[2] - 1] where key = $1 and kind = 'stripe_fee'"
    )
    await world.sql(key, statement, key)
    await planted(world, before, 7, key)


async def test_what_the_feed_has_not_brought_yet_is_open_and_no_difference(world: World, before: set[Difference]) -> None:
    key = SUCCEEDED[11]
    await world.sql("aggregator", "update oncepay.payments set version = version - 1 where key = $1", key)
    shard = world.shard_of(key)
    await world.sql("aggregator", "update oncepay.watermarks set lsn = '0/1' where shard = $1", shard)
    report = await world.verify()
    assert key not in {found.key for found in set(report.differences) - before}
    assert report.open >= 2, "the open payments, and what lags"
    await world.sql("aggregator", "update oncepay.watermarks set lsn = $2 where shard = $1", shard, world.lsn[shard])
    await planted(world, before, 6, key)
    await world.sql("aggregator", "update oncepay.payments set version = version + 1 where key = $1", key)


async def test_a_feed_that_comes_while_it_is_awaited(world: World, before: set[Difference]) -> None:
    """The position moves while verify waits, and with it comes what lacked."""
    key = SUCCEEDED[11]
    shard = world.shard_of(key)
    await world.sql("aggregator", "update oncepay.watermarks set lsn = '0/1' where shard = $1", shard)
    await world.sql("aggregator", "update oncepay.payments set version = version - 1 where key = $1", key)
    checking = asyncio.create_task(world.verify(wait_s=30))
    await asyncio.sleep(1)
    assert not checking.done()
    await world.sql("aggregator", "update oncepay.payments set version = version + 1 where key = $1", key)
    await world.feed(FeedBatch(shard, "i", 1, 1, world.lsn[shard] + 1))
    report = await checking
    assert key not in {found.key for found in set(report.differences) - before}


async def test_1_slots_that_nobody_owns(world: World, before: set[Difference]) -> None:
    await world.sql("s1", "update oncepay.ranges set last = 65534")
    report = await world.verify()
    assert {found.key for found in set(report.differences) - before} == {"slots 65535-65535", "shard s1"}
    await world.sql("s1", "update oncepay.ranges set last = 65535")


@pytest.mark.parametrize("part", ["shards", "aggregator_dsn", "aggregator_url", "stripe_url"])
async def test_a_part_that_cant_be_reached_is_named(world: World, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.checker.stripe.TRIES", 2)
    monkeypatch.setattr("loadtest.checker.api.TRIES", 2)
    port = free_ports(1)[0]
    target = world.target()
    values: dict[str, object] = {
        "shards": (replace(target.shards[0], dsn=f"postgresql://postgres@127.0.0.1:{port}/x"), target.shards[1]),
        "aggregator_dsn": f"postgresql://postgres@127.0.0.1:{port}/x",
        "aggregator_url": f"http://127.0.0.1:{port}",
        "stripe_url": f"http://127.0.0.1:{port}",
    }
    word = {"shards": "shard s0", "aggregator_dsn": "aggregator", "aggregator_url": "aggregator", "stripe_url": "Stripe"}[part]
    with pytest.raises(Unreachable, match=f"{word}.* can't be reached"):
        await verify(replace(target, **{part: values[part]}))  # type: ignore[arg-type]
