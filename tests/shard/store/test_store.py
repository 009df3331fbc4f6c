"""The store on a real shard of three nodes: one row a key, batches, fences, and nothing answered before the quorum has it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import pytest
from msgspec.structs import replace

from deploy.local import Cluster
from oncepay.errors import InvalidField, ShardUnavailable
from oncepay.etcd import Etcd
from oncepay.keys import slot
from oncepay.payment import Charge, IntentView, Payment, Status
from oncepay.payment_text import terms_text
from oncepay.ports import StaleView
from oncepay.transition import AttemptStarted, GiveUp, IntentCreated, IntentSeen
from shard.store import migrate
from shard.store.batch import RowUnreadable
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment

pytestmark = pytest.mark.cluster


async def test_one_key_makes_one_row(cluster: Cluster, store: Shards, make: MakePayment) -> None:
    settings = cluster.settings
    payment = make()
    async with Etcd(settings.etcd) as etcd:
        other = Shards(etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor="other")
        await other.start()
        try:
            answers = await asyncio.gather(*(each.accept(payment) for _ in range(40) for each in (store, other)))
        finally:
            await other.stop()
    assert sum(created for _, created in answers) == 1
    assert {row.key for row, _ in answers} == {payment.key}
    found = await store.get(payment.key)
    assert found is not None
    assert found == replace(payment, updated_at_ms=found.updated_at_ms)


async def test_a_payment_comes_back_as_it_was_stored(store: Shards, make: MakePayment) -> None:
    row, _ = await store.accept(make())
    row = await store.apply(row, IntentCreated(f"pi_{row.key}", "secret"), AttemptStarted(1, "pm_card_visa"), event="test")
    view = IntentView(row.intent, "succeeded", 1000, charge=Charge("ch_1", "succeeded", f"txn_{row.key}", 59, 941, 1000, "usd"))
    row = await store.apply(row, IntentSeen(view), event="test")
    assert row.version == 3
    found = await store.get_with_entries(row.key)
    assert found is not None
    assert found[0] == row
    assert [entry.kind for entry in found[1]] == ["payment", "stripe_fee"]
    assert all(sum(entry.amounts) == 0 for entry in found[1])
    assert await store.by_intent(row.intent) == row


async def test_a_change_is_compared_with_the_version(store: Shards, make: MakePayment) -> None:
    row, _ = await store.accept(make())
    first = await store.apply(row, IntentCreated(f"pi_{row.key}", "secret"), event="test")
    with pytest.raises(StaleView) as stale:  # `row` is old now: a look that was made then must not be applied
        await store.apply(replace(row, intent=first.intent), IntentSeen(IntentView(first.intent, "processing")), event="test")
    assert stale.value.payment == first
    given_up = await store.apply(row, GiveUp("requested"), event="test")  # a command is applied to the row as it is
    assert (given_up.status, given_up.version) == (Status.CANCELING, 3)


async def test_a_poisonous_row_fails_alone(store: Shards, make: MakePayment) -> None:
    good = [make() for _ in range(60)]
    bad = make(amount=0)  # the database refuses it; the router would have, long before
    answers = await asyncio.gather(*(store.accept(p) for p in [*good[:30], bad, *good[30:]]), return_exceptions=True)
    assert isinstance(answers[30], InvalidField)
    made = [answer for answer in answers if isinstance(answer, tuple)]
    assert len(made) == 60
    assert all(created for _, created in made)


VALUES = "'x', 'e', 'k', 'usd', 's', '{a,b}', '{1,%d}', '{\"\",\"\"}', now()"
REFUSED = {
    "an entry that doesn't balance": (
        f"insert into oncepay.entries values (oncepay.slot_of('x'), {VALUES % -2})",
        "entries_balance",
    ),
    "a slot that isn't the key's": (
        f"insert into oncepay.entries values (1, {VALUES % -1})",
        "entries_slot_of_key",
    ),
    "a change of an entry": ("update oncepay.entries set currency = 'eur'", "append_only"),
    "the end of an entry": ("delete from oncepay.entries", "append_only"),
    "the end of all entries": ("truncate oncepay.entries cascade", "append_only"),
    "a change of a balance link": ("update oncepay.balance_links set entry_id = 'other'", "append_only"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_the_database_refuses(leader: asyncpg.Connection, what: str) -> None:
    """Even from a superuser."""
    statement, constraint = REFUSED[what]
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        await leader.execute(statement)
    assert caught.value.constraint_name == constraint


async def test_the_database_keeps_terminal_terminal(store: Shards, leader: asyncpg.Connection, make: MakePayment) -> None:
    row, _ = await store.accept(make())
    await store.apply(row, GiveUp("requested"), event="test")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        await leader.execute("update oncepay.payments set status = 'created', version = version + 1 where key = $1", row.key)
    assert caught.value.constraint_name == "payments_terminal_is_terminal"


async def test_a_write_that_meets_the_fence_is_not_committed_behind_it(
    store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """The interleaving: a write waits for the range's lock while the fence takes the range away under it."""
    payment = make()
    first = store.maps.current.range_of(slot(payment.key)).first  # moves may have split the shard's slots
    fence = leader.transaction()
    await fence.start()
    await leader.execute("select pg_advisory_xact_lock(1, $1)", first)
    waiting = asyncio.create_task(store.accept(payment))
    for _ in range(200):
        await leader.execute("select pg_stat_clear_snapshot()")  # within a transaction sessions that come later aren't shown
        blocked = await leader.fetchval(
            "select count(*) from pg_locks join pg_stat_activity using (pid) where locktype = 'advisory' and classid = 1"
            " and objid = $1::integer::oid and not granted and application_name = 'test'",
            first,
        )
        if blocked:
            break
        await asyncio.sleep(0.02)
    assert blocked == 1
    taken = await leader.fetchrow("delete from oncepay.ranges where first = $1 returning first, last, map_version", first)
    await fence.commit()
    try:
        await asyncio.sleep(0.3)
        assert not waiting.done()  # refused by the database, held by the store
        assert await leader.fetchval("select count(*) from oncepay.payments where key = $1", payment.key) == 0
    finally:
        await leader.execute("insert into oncepay.ranges values ($1, $2, $3)", *taken)
    row, created = await waiting
    assert created
    assert row.key == payment.key


@contextmanager
def frozen(cluster: Cluster, nodes: list[str]) -> Iterator[None]:
    """The nodes' walreceivers stand still, so that nothing is acknowledged by them."""
    import psutil

    stopped: list[int] = []
    try:
        for node in nodes:
            postmaster = cluster.postmaster_pid(node)
            assert postmaster is not None
            for child in psutil.Process(postmaster).children():
                if "walreceiver" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGSTOP)
                    stopped.append(child.pid)
        assert len(stopped) == len(nodes)
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


async def test_nothing_is_answered_that_no_standby_has(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """A commit whose wait was cut off is visible, and may still be lost. A plain query shows it; the store doesn't: neither
    to a replay nor to a read, though their transactions write nothing that would wait for a standby by itself."""
    payment, known = make(), (await store.accept(make()))[0]
    node = store.leaders.current("s0")
    assert node is not None
    standbys = [f"s0-{n}" for n in (1, 2, 3) if f"s0-{n}" != node.name]
    waits = "select pid from pg_stat_activity where wait_event = 'SyncRep' and application_name = 'test'"
    with frozen(cluster, standbys):
        first = asyncio.create_task(store.accept(payment))
        while not (pid := await leader.fetchval(waits)):
            await asyncio.sleep(0.02)
        await leader.execute("select pg_cancel_backend($1)", pid)
        while not await leader.fetchval("select count(*) from oncepay.payments where key = $1", payment.key):
            await asyncio.sleep(0.02)
        calls = [
            first,
            asyncio.create_task(store.accept(payment)),
            asyncio.create_task(store.get(payment.key)),
            asyncio.create_task(store.get(known.key)),
        ]
        done, _ = await asyncio.wait(calls, timeout=2)
        assert not done
    answers = await asyncio.wait_for(asyncio.gather(*calls), 20)
    assert {row.key if isinstance(row, Payment) else row[0].key for row in answers if row} == {payment.key, known.key}


async def test_a_row_that_can_not_be_read_fails_alone(store: Shards, leader: asyncpg.Connection, make: MakePayment) -> None:
    """One that a later version wrote: its neighbours are answered, and the writers live on."""
    rows = [(await store.accept(make()))[0] for _ in range(9)]
    await changed_beside_the_feed(leader, rows[4].key, "agreed = '[1]'")
    try:
        for _ in range(3):  # more often than there are writers
            answers = await asyncio.wait_for(asyncio.gather(*(store.get(row.key) for row in rows), return_exceptions=True), 10)
            assert isinstance(answers[4], RowUnreadable)
            assert [answer for i, answer in enumerate(answers) if i != 4] == [row for i, row in enumerate(rows) if i != 4]
    finally:  # lists of this shard would meet it
        agreed = terms_text(rows[4].terms).replace("'", "''")
        await changed_beside_the_feed(leader, rows[4].key, f"agreed = '{agreed}'")


async def changed_beside_the_feed(leader: asyncpg.Connection, key: str, change: str) -> None:
    """The feed, which would stop at an unreadable row, leaves out what comes from another origin."""
    await leader.execute("select pg_replication_origin_create('test'), pg_replication_origin_session_setup('test')")
    try:
        await leader.execute(f"update oncepay.payments set {change}, version = version + 1 where key = $1", key)
    finally:
        await leader.execute("select pg_replication_origin_session_reset()")
        await leader.execute("select pg_replication_origin_drop('test')")


async def test_a_commit_waits_for_the_quorum_whatever_the_defaults_are(store: Shards, leader: asyncpg.Connection) -> None:
    defaults = {"synchronous_commit": "local", "statement_timeout": "'50ms'", "transaction_timeout": "'50ms'"}
    for name, value in defaults.items():
        await leader.execute(f"alter role oncepay_router set {name} = {value}")
    try:
        node = store.leaders.current("s0")
        assert node is not None
        session = await store.connect(node.host, node.port)
        found = [await session.fetchval(f"show {name}") for name in defaults]
        await session.close()
    finally:
        for name in defaults:
            await leader.execute(f"alter role oncepay_router reset {name}")
    assert found == ["on", "0", "0"]


async def test_code_that_needs_a_newer_schema_does_not_work_on_an_older_one(
    store: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = store.leaders.current("s0")
    assert node is not None
    batcher = store.batcher("s0")
    monkeypatch.setattr(migrate, "LATEST", migrate.LATEST + 1)
    with pytest.raises(ShardUnavailable, match="oncepay shards migrate"):
        await batcher._opened(node)
