"""Batches: their bounds, rows that fail alone, errors that pass, and the order of locks."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace
from prometheus_client import REGISTRY

from deploy.local import Cluster
from oncepay.errors import InvalidField, TooBusy
from oncepay.events import IntentCreated
from oncepay.keys import slot
from oncepay.ledger import Entry, Posting
from oncepay.payment import Payment
from shard.store import batch
from shard.store.batch import Answer, Batcher
from shard.store.rows import Put, new_arrays
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment
from tests.shard.store.trouble import (
    SHARD,
    eventually,
    frozen,
    leader_node,
    opened,
    receivers,
    standbys,
    superuser_on,
    waiting_commit,
)

pytestmark = pytest.mark.cluster


def task(call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


def changed(payment: Payment, **fields: Any) -> Put:
    """A compared change of a row, past the rules of the core."""
    return Put(replace(payment, version=payment.version + 1, **fields), payment.version, "test")


def entry(name: str, *amounts: int, currency: str = "usd") -> Entry:
    return Entry(name, "test", currency, "test", tuple(Posting(f"account{n}", amount) for n, amount in enumerate(amounts)))


async def put_all(batcher: Batcher, puts: list[Put]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(batcher.put(put) for put in puts), return_exceptions=True)


POISON = {
    "a change that the table refuses": lambda row: changed(row, amount_captured=row.amount + 1),
    "an entry that the table refuses": lambda row: replace(changed(row), entries=(entry("bad", 5, -5, currency="dollars"),)),
    "an entry of one posting": lambda row: replace(changed(row), entries=(entry("bad", 0),)),
    "the same entry twice": lambda row: replace(changed(row), entries=(entry("twice", 5, -5), entry("twice", 5, -5))),
    "a number that no column holds": lambda row: changed(row, amount_captured=2**70),
    "a text that can't be encoded": lambda row: replace(changed(row), event="\ud800"),
    "a text with a zero byte": lambda row: replace(changed(row), event="a\0b"),
    "progress that can't be encoded": lambda row: changed(row, progress=replace(row.progress, client_secret="\ud800")),
    "a time that no calendar has": lambda row: changed(row, updated_at_ms=2**60),
}


@pytest.mark.parametrize("what", POISON)
async def test_a_poisonous_change_fails_alone_among_hundreds(
    store: Shards, leader: asyncpg.Connection, make: MakePayment, what: str
) -> None:
    """And its neighbours are written once, with their entries."""
    batcher = store.batcher(SHARD)
    rows = [row for row, _ in await asyncio.gather(*(store.accept(make()) for _ in range(200)))]
    puts = [replace(changed(row), entries=(entry("good", 7, -7),)) for row in rows]
    puts[111] = POISON[what](rows[111])
    answers = await put_all(batcher, puts)
    assert isinstance(answers[111], InvalidField)
    assert all(isinstance(answer, Answer) and answer.outcome == "done" for n, answer in enumerate(answers) if n != 111)
    keys = [row.key for row in rows]
    found = await leader.fetch("select key, version from oncepay.payments where key = any ($1)", keys)
    assert {row["key"]: row["version"] for row in found} == {row.key: 1 if n == 111 else 2 for n, row in enumerate(rows)}
    entries = await leader.fetch("select key, entry_id from oncepay.entries where key = any ($1)", keys)
    assert sorted((row["key"], row["entry_id"]) for row in entries) == sorted((key, "good") for key in keys if key != keys[111])


async def test_a_change_that_lost_the_race_brings_no_entry(store: Shards, leader: asyncpg.Connection, make: MakePayment) -> None:
    """An entry is committed with its transition or not at all."""
    row, _ = await store.accept(make())
    names = ("first", "second")
    first, second = (replace(changed(row), entries=(entry(name, 5, -5),)) for name in names)
    answers = await put_all(store.batcher(SHARD), [first, second])
    outcomes = {name: answer.outcome for name, answer in zip(names, answers, strict=True) if isinstance(answer, Answer)}
    assert sorted(outcomes.values()) == ["conflict", "done"]
    found = await leader.fetch("select entry_id from oncepay.entries where key = $1", row.key)
    assert [outcomes[record["entry_id"]] for record in found] == ["done"]


class _Breaks:
    """A session that is lost right after its batch was refused: the halves must not be sent into the void unnoticed."""

    def __init__(self, session: asyncpg.Connection) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def fetch(self, *arguments: Any) -> Any:
        try:
            return await self._session.fetch(*arguments)
        except asyncpg.CheckViolationError:
            self._session.terminate()
            raise


class Breaking(Shards):
    breaks = 0

    async def connect(self, host: str, port: int) -> asyncpg.Connection:
        session = await super().connect(host, port)
        if self.breaks:
            return session
        self.breaks += 1
        return _Breaks(session)


async def test_a_connection_lost_while_a_batch_is_halved(cluster: Cluster, make: MakePayment) -> None:
    """The store holds the neighbours, and they are written over the next connection."""
    good, bad = [make() for _ in range(50)], make(amount=0)
    async with opened(cluster, "breaking", Breaking) as store:
        calls = [task(store.accept(payment)) for payment in [*good[:25], bad, *good[25:]]]
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
    assert isinstance(answers[25], InvalidField)
    made = [answer for n, answer in enumerate(answers) if n != 25]
    assert all(isinstance(answer, tuple) and answer[1] for answer in made), made


class Impatient(Shards):
    """Its sessions don't wait for locks."""

    async def connect(self, host: str, port: int) -> asyncpg.Connection:
        session = await super().connect(host, port)
        await session.execute("set lock_timeout = '100ms'")
        return session


async def test_a_batch_that_met_a_lock_timeout_is_held_and_made_again(
    cluster: Cluster, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """A class of error that says nothing about the rows (55P03): no caller hears of it."""
    payments = [make() for _ in range(20)]
    async with opened(cluster, "impatient", Impatient) as store:
        await store.accept(make())
        refused = batch.BATCHES.labels(SHARD, "error")._value.get()
        async with leader.transaction():
            await leader.execute("select pg_advisory_xact_lock(1, first) from oncepay.ranges")
            calls = [task(store.accept(payment)) for payment in payments]
            await eventually(lambda: batch.BATCHES.labels(SHARD, "error")._value.get() > refused, "a batch was refused")
            assert not any(call.done() for call in calls)
        answers = await asyncio.wait_for(asyncio.gather(*calls), 10)
    assert all(created for _, created in answers)


async def test_a_batch_that_was_the_victim_of_a_deadlock_is_made_again(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """The ring is closed by somebody who doesn't keep the order; the store's batch is the one that Postgres ends (40P01)."""
    first, second = sorted([(await store.accept(make()))[0] for _ in range(2)], key=lambda row: (slot(row.key), row.key))
    touch = "update oncepay.payments set updated_at = updated_at, version = version + 100 where key = $1"
    deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
    async with superuser_on(cluster, leader_node(store)) as other:
        await other.execute("set deadlock_timeout = '30s'")  # so that it isn't the one who finds out
        transaction = other.transaction()
        await transaction.start()
        await other.execute(touch, second.key)
        calls = [task(store.apply(row, IntentCreated(f"pi_{row.key}", "s"), event="test")) for row in (first, second)]

        async def is_blocked() -> bool:
            query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and application_name = 'test'"
            return bool(await leader.fetchval(query))

        await eventually(is_blocked, "the batch waits")
        before = await leader.fetchval(deadlocks)
        await asyncio.wait_for(other.execute(touch, first.key), 10)
        await transaction.commit()
        rows = await asyncio.wait_for(asyncio.gather(*calls), 20)

    async def is_counted() -> bool:
        return bool(await leader.fetchval(deadlocks) > before)

    await eventually(is_counted, "there was a deadlock")
    assert [row.version for row in rows] == [102, 102]
    assert [row.intent for row in rows] == [f"pi_{first.key}", f"pi_{second.key}"]


async def test_overlapping_batches_in_any_order_never_deadlock(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """Two stores change the same rows and make the same new ones, each in an order of its own, in hundreds of batches."""
    rounds, width = 60, 40
    rows = {row.key: row for row, _ in await asyncio.gather(*(store.accept(make()) for _ in range(width)))}
    new = [[make() for _ in range(width)] for _ in range(rounds)]
    before = await deadlocks(leader)
    batches = batch.BATCHES.labels(SHARD, "done")._value.get()
    together = asyncio.Barrier(3)

    async def writer(writing: Shards, seed: int) -> int:
        order, known, won = random.Random(seed), dict(rows), 0
        batcher = writing.batcher(SHARD)
        for payments in new:
            puts = [changed(row) for row in known.values()] + [Put(payment, 0, "test") for payment in payments]
            order.shuffle(puts)
            await together.wait()
            for put, answer in zip(puts, await put_all(batcher, puts), strict=True):
                assert isinstance(answer, Answer), answer
                won += answer.outcome == "done" and put.expect > 0
                if put.expect:
                    known[put.payment.key] = answer.payment or put.payment
        return won

    async with opened(cluster, "second") as second, opened(cluster, "third") as third:
        stores = (store, second, third)
        won = await asyncio.wait_for(asyncio.gather(*(writer(each, n) for n, each in enumerate(stores))), 60)
    assert batch.BATCHES.labels(SHARD, "done")._value.get() - batches >= 3 * rounds
    assert await deadlocks(leader) == before
    found = await leader.fetch("select version from oncepay.payments where key = any ($1)", list(rows))
    assert sum(row["version"] - 1 for row in found) == sum(won)  # each change that was answered as done raised one version
    made = [payment.key for payments in new for payment in payments]
    assert await leader.fetchval("select count(*) from oncepay.payments where key = any ($1)", made) == len(made)


async def deadlocks(session: asyncpg.Connection) -> int:
    """The database's count, after all sessions have told theirs."""
    await asyncio.sleep(1.1)  # Postgres' backends report at most once a second, and tell nobody when
    await session.execute("select pg_stat_clear_snapshot()")
    return int(await session.fetchval("select deadlocks from pg_stat_database where datname = current_database()"))


async def test_a_batch_has_a_bound(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ROWS_MAX", 50)
    sizes: list[int] = []

    def counted(puts: list[Put]) -> list[list[Any]]:
        sizes.append(len(puts))
        return new_arrays(puts)

    monkeypatch.setattr(batch, "new_arrays", counted)
    answers = await asyncio.gather(*(store.accept(make()) for _ in range(430)))
    assert all(created for _, created in answers)
    assert sum(sizes) == 430
    assert max(sizes) == 50


async def test_what_may_wait_has_a_bound(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it callers are refused at once; those who gave up waiting take no place."""
    monkeypatch.setattr(batch, "WAITING_MAX", 10)
    batcher = store.batcher(SHARD)
    known = (await store.accept(make()))[0]
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        busy = []
        for _ in range(batch.WRITERS):  # each writer's batch is on its way
            busy.append(task(store.accept(make())))
            await waiting_commit(leader, "test")
            await eventually(lambda: not batcher._waiting, "it was taken")
        waiting = [task(store.accept(make())) for _ in range(10)]
        await eventually(lambda: len(batcher._waiting) == 10, "ten wait")
        with pytest.raises(TooBusy):
            await store.accept(make())
        with pytest.raises(TooBusy):
            await store.get(known.key)
        for call in waiting[:4]:
            call.cancel()
        await asyncio.wait(waiting[:4])
        more = [task(store.accept(make())) for _ in range(4)]
        await asyncio.wait(more, timeout=0.2)
        assert not any(call.done() for call in more)
        with pytest.raises(TooBusy):
            await store.accept(make())
    answers = await asyncio.wait_for(asyncio.gather(*busy, *waiting[4:], *more), 15)
    assert all(created for _, created in answers)


async def test_what_waits_behind_a_batch_goes_when_it_has_ended(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not when its patience is over: that is for a batch that doesn't end."""
    monkeypatch.setattr(batch, "PATIENCE_S", 60.0)
    batcher = store.batcher(SHARD)
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        first = task(store.accept(make()))
        await waiting_commit(leader, "test")
        second = task(store.accept(make()))
        await asyncio.sleep(0.3)
        assert len(batcher._waiting) == 1
    answers = await asyncio.wait_for(asyncio.gather(first, second), 10)
    assert all(created for _, created in answers)


def sent() -> float:
    """Batches of this process that were committed."""
    return REGISTRY.get_sample_value("oncepay_store_batches_total", {"shard": SHARD, "outcome": "done"}) or 0.0


async def steady(store: Shards, make: MakePayment, per_s: int, seconds: float) -> None:
    """New payments, whatever becomes of those before."""
    calls = []
    for _ in range(int(per_s * seconds)):
        calls.append(task(store.accept(make())))
        await asyncio.sleep(1 / per_s)
    assert all(created for _, created in await asyncio.gather(*calls))


async def test_under_load_batches_keep_a_distance(store: Shards, make: MakePayment) -> None:
    """So that each carries many payments; they'd be sent one right after the other.

    It begins with a crowd: where a commit takes no more than some milliseconds, 200 a second never meet, and are no load.
    """
    await asyncio.gather(*(store.accept(make()) for _ in range(60)))
    await steady(store, make, 200, 1.0)
    before = sent()
    await steady(store, make, 200, 2.0)
    assert 0 < sent() - before < 40, "200 payments a second, ten of them and more in a batch"


async def test_a_lone_payment_waits_for_nobody(store: Shards, make: MakePayment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those that follow one another some seconds after a load: what it left in the averages has gone by time."""
    monkeypatch.setattr(batch, "PACE_S", 2.0)
    monkeypatch.setattr(batch, "PRICE", 1e9)
    batcher = store.batcher(SHARD)
    batcher._rows_lately = 100.0
    batcher._sent_s = time.monotonic() - 3.0
    for _ in range(3):
        await asyncio.wait_for(store.accept(make()), 10)
        assert batcher._rows_lately < batch.BUSY_ROWS
    assert batcher._distance_s() == 0
