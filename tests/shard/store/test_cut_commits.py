"""A commit whose wait for the standby was cut off is visible and may still be lost: Postgres only warns.

The store acknowledges none of them. It calls the outcome unknown, reads back, and its caller has an answer in the end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace

from deploy.local import Cluster
from oncepay.errors import Unavailable
from oncepay.events import AttemptStarted, IntentCreated, IntentSeen
from oncepay.payment import Charge, IntentView, Payment, Status
from shard.store import batch
from shard.store import store as store_module
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment
from tests.shard.store.trouble import (
    frozen,
    leader_node,
    proxied,
    receivers,
    shown,
    shown_soon,
    standbys,
    stay_open,
    waiting_commit,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("whole")]

OPEN_S = 1.2
"""How long calls are watched that must not be answered. Evidence that is there is found within milliseconds."""


def task(call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


@pytest.mark.parametrize("how", ["cancel", "terminate", "connection"])
async def test_a_commit_that_was_cut_off_is_not_answered_until_a_standby_has_it(
    cluster: Cluster, leader: asyncpg.Connection, make: MakePayment, how: str
) -> None:
    payment = make()
    async with proxied(cluster, "cutoff") as (store, proxy):
        await store.accept(make())
        with frozen(await receivers(cluster, standbys(leader_node(store).name))):
            calls = [task(store.accept(payment))]
            waiting = await waiting_commit(leader, "cutoff")
            if how == "connection":
                proxy.cut()
            else:
                await leader.execute(f"select pg_{how}_backend($1)", waiting.pid)
                await shown_soon(leader, payment.key)  # a plain query shows what may still be lost
            calls += [task(store.accept(payment)), task(store.get(payment.key))]
            await stay_open(calls, OPEN_S)
        first, replay, read = await asyncio.wait_for(asyncio.gather(*calls), 20)
        if how == "connection":  # the backend didn't notice, and its row may have come into sight after the read
            read = await store.get(payment.key) if read is None else read
    rows = [first[0], replay[0], read]
    assert all(row.key == payment.key and row.version == 1 for row in rows)
    assert [first[1], replay[1]].count(True) == 1  # two callers of one key: one of them made it
    assert await shown(leader, payment.key) == 1


@pytest.mark.parametrize("at", ["request", "answer"])
async def test_a_new_row_whose_answer_was_lost_is_read_back_as_made_by_this_call(
    cluster: Cluster, leader: asyncpg.Connection, make: MakePayment, at: str
) -> None:
    payment = make()
    async with proxied(cluster, "cutoff") as (store, proxy):
        await store.accept(make())
        proxy.arm(payment.key, at)
        row, created = await asyncio.wait_for(store.accept(payment), 20)
        assert proxy.cuts == 1
        assert await store.accept(payment) == (replace(payment, updated_at_ms=row.updated_at_ms), False)
    assert created
    assert await shown(leader, payment.key) == 1


CHANGES = {
    "a command": (IntentCreated("pi_{key}", "secret"), AttemptStarted(1, "pm_card_visa")),
    "a view that isn't terminal": (IntentSeen(IntentView("pi_{key}", "processing")),),
    "a terminal fact": (
        IntentSeen(
            IntentView("pi_{key}", "succeeded", 1000, charge=Charge("ch_1", "succeeded", "txn_{key}", 59, 941, 1000, "usd"))
        ),
    ),
}


def named(event: Any, key: str) -> Any:
    """The event with `{key}` filled in."""
    if isinstance(event, IntentCreated):
        return replace(event, intent=event.intent.format(key=key))
    if isinstance(event, IntentSeen):
        view = replace(event.view, id=event.view.id.format(key=key))
        if view.charge is not None:
            transaction = view.charge.balance_transaction.format(key=key)
            view = replace(view, charge=replace(view.charge, balance_transaction=transaction))
        return replace(event, view=view)
    return event


@pytest.mark.parametrize("at", ["request", "answer"])
@pytest.mark.parametrize("what", CHANGES)
async def test_a_change_whose_answer_was_lost_is_applied_once_and_answered(
    cluster: Cluster, leader: asyncpg.Connection, make: MakePayment, what: str, at: str
) -> None:
    """Also a change that can't be made again: the row that was read back is the very one that this call wrote."""
    async with proxied(cluster, "cutoff") as (store, proxy):
        row, _ = await store.accept(make())
        if what != "a command":
            row = await store.apply(row, *(named(event, row.key) for event in CHANGES["a command"]), event="test")
        proxy.arm(row.key, at)
        events = [named(event, row.key) for event in CHANGES[what]]
        after = await asyncio.wait_for(store.apply(row, *events, event="test"), 20)
        assert proxy.cuts == 1
        assert after.version == row.version + 1
        found = await store.get_with_entries(row.key)
        assert found is not None
        assert found[0] == after
    kinds = ["payment", "stripe_fee"] if what == "a terminal fact" else []
    assert sorted(entry.kind for entry in found[1]) == kinds


async def test_another_callers_change_is_not_taken_for_ones_own(cluster: Cluster, make: MakePayment) -> None:
    """The first try never arrived; before the second, somebody else has moved the row."""
    async with proxied(cluster, "cutoff") as (store, proxy):
        row, _ = await store.accept(make())
        row = await store.apply(row, *(named(event, row.key) for event in CHANGES["a command"]), event="test")
        view = IntentSeen(IntentView(row.intent, "processing"))
        async with proxied(cluster, "other") as (other, _):
            await other.get(row.key)
            proxy.arm(row.key, "request")
            mine = task(store.apply(row, view, event="mine"))
            while not proxy.cuts:
                await asyncio.sleep(0)
            theirs = task(other.apply(row, IntentSeen(IntentView(row.intent, "requires_action")), event="theirs"))
            results = await asyncio.wait_for(asyncio.gather(mine, theirs, return_exceptions=True), 20)
        won = [result for result in results if isinstance(result, Payment)]
        assert len(won) == 1
        assert (await store.get(row.key)) == won[0]


async def test_a_caller_that_gives_up_cancels_no_commit(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """Neither its own nor its neighbours': the batch stays where it is, and all of it is committed."""
    gone, stays = [make() for _ in range(5)], [make() for _ in range(5)]
    await store.accept(make())
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        leaving = [task(store.accept(payment)) for payment in gone]
        staying = [task(store.accept(payment)) for payment in stays]
        waiting = await waiting_commit(leader, "test")
        for call in leaving:
            call.cancel()
        await asyncio.wait(leaving)
        await stay_open(staying, 0.5)
        assert await waiting_commit(leader, "test") == waiting  # the very commit still waits
        assert not await shown(leader, gone[0].key)
    answers = await asyncio.wait_for(asyncio.gather(*staying), 10)
    assert all(created for _, created in answers)
    for payment in gone:
        assert await store.get(payment.key) is not None


@pytest.mark.parametrize("what", ["barrier", "read"])
async def test_a_caller_of_a_single_query_that_gives_up_cancels_no_commit(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, what: str
) -> None:
    batcher = store.batcher("s0")

    def call() -> asyncio.Task[Any]:
        return task(batcher.barrier("one") if what == "barrier" else batcher.read("select 1 as one"))

    await call()
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        gone = call()
        waiting = await waiting_commit(leader, "test")
        gone.cancel()
        await asyncio.wait([gone])
        after = call()
        await stay_open([after], 0.5)
        assert await waiting_commit(leader, "test") == waiting
    await asyncio.wait_for(after, 10)


async def test_stopping_cancels_no_commit(
    cluster: Cluster, leader: asyncpg.Connection, make: MakePayment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that stops in the middle of a commit drops its connection; the backend goes on waiting for a standby."""
    payment = make()
    monkeypatch.setattr(batch, "STOP_S", 0.5)
    async with proxied(cluster, "stopping") as (store, _):
        await store.accept(make())
        with frozen(await receivers(cluster, standbys(leader_node(store).name))):
            call = task(store.accept(payment))
            waiting = await waiting_commit(leader, "stopping")
            await store.batcher("s0").stop()
            assert await waiting_commit(leader, "stopping") == waiting
            assert not await shown(leader, payment.key)
            call.cancel()
            await asyncio.wait([call])
    await shown_soon(leader, payment.key)


async def test_a_write_is_held_for_its_bound_and_then_refused(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 s, shortened here. The refusal says when to come again, and coming again finds what became of it."""
    assert store_module.HOLD_S == 30.0
    payment, known = make(), (await store.accept(make()))[0]
    monkeypatch.setattr(store_module, "HOLD_S", 1.5)
    monkeypatch.setattr(store_module, "LAST_LOOK_S", 0.5)
    loop = asyncio.get_running_loop()
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        started_s = loop.time()
        calls = [
            task(store.accept(payment)),
            task(store.get(known.key)),
            task(store.apply(known, IntentCreated(f"pi_{known.key}", "secret"), event="test")),
            task(store.by_intent("pi_none")),
        ]
        await stay_open(calls, 1.0)
        refused = await asyncio.gather(*calls, return_exceptions=True)
        assert 1.4 < loop.time() - started_s < 2.9, "not held twice"
        assert all(isinstance(error, Unavailable) and error.status == 503 and error.retry_after_s for error in refused), refused
    assert (await store.accept(payment))[0].key == payment.key
    assert await shown(leader, payment.key) == 1
    row = await store.get(known.key)
    assert row is not None
    assert (row.version, row.status) == (2, Status.ATTEMPTED)
