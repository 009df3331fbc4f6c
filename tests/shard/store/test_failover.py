"""Changes of leader: what was acknowledged is there, once; what was not is held, and answered in the end.

A killed or frozen leader may come back at once and lead on: no test assumes that another leads, unless it waits for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import asyncpg
import psutil
import pytest

from deploy.local import Cluster
from oncepay.errors import Unavailable
from oncepay.events import AttemptStarted, IntentCreated, IntentSeen
from oncepay.payment import Charge, IntentView, Payment, Status
from shard.store.batch import _CALL
from shard.store.leader import Node
from shard.store.rows import Put, change_arrays, entry_arrays, new_arrays
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment
from tests.shard.store.trouble import (
    NODES,
    SHARD,
    Proxy,
    eventually,
    frozen,
    kill_postmaster,
    leader_node,
    node_processes,
    opened,
    receivers,
    shown,
    shown_soon,
    standbys,
    stay_open,
    superuser_on,
    thaw,
    waiting_commit,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("whole"), pytest.mark.timeout(180)]

T = TypeVar("T")
LOAD_S, KILL_AT_S = 9.0, 2.5
GAP_S = 15.0
"""How long writes may stand still around the death of a leader. Measured: 1 to 5 s on two cores."""
PAUSE_S = 0.02


def task(call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


class Recorder:
    """Buyers that write down what they were told, outside of the store."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.created: list[str] = []
        self.paid: list[str] = []
        self.told_s: list[float] = []
        self.refusals: list[BaseException] = []

    def told(self, row: Payment) -> None:
        self.versions[row.key] = max(row.version, self.versions.get(row.key, 0))
        self.told_s.append(time.monotonic())

    def gap_s(self) -> float:
        return max(after - before for before, after in zip(self.told_s, self.told_s[1:], strict=False))

    async def pay(self, store: Shards, payment: Payment) -> None:
        row, created = await store.accept(payment)
        self.told(row)
        if not created:
            found = await store.get(row.key)
            assert found is not None
            self.told(found)
            return
        self.created.append(row.key)
        row = await store.apply(row, IntentCreated(f"pi_{row.key}", "s"), AttemptStarted(1, "pm_card_visa"), event="test")
        self.told(row)
        charge = Charge(f"ch_{row.key}", "succeeded", f"txn_{row.key}", 59, 941, 1000, "usd")
        row = await store.apply(row, IntentSeen(IntentView(row.intent, "succeeded", 1000, charge=charge)), event="test")
        self.told(row)
        assert row.status is Status.SUCCEEDED
        self.paid.append(row.key)

    async def buy(self, stores: tuple[Shards, ...], make: MakePayment, until_s: float) -> None:
        while time.monotonic() < until_s:
            payment = make()
            # Each payment is sent twice at once, to different processes.
            answers = await asyncio.gather(*(self.pay(store, payment) for store in stores), return_exceptions=True)
            self.refusals += [answer for answer in answers if isinstance(answer, BaseException)]
            await asyncio.sleep(PAUSE_S)


async def kill(cluster: Cluster, node: str) -> None:
    kill_postmaster(cluster, node)


async def restart(cluster: Cluster, node: str) -> None:
    """Patroni restarts the leader's Postgres, as for a setting that needs it: sessions are ended, waits are cut off."""
    credential = cluster.patroni_rest_credential()
    port = cluster.ports.patroni(0, NODES.index(node))
    headers = {"Authorization": aiohttp.encode_basic_auth(credential.username, credential.password)}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(f"http://127.0.0.1:{port}/restart", json={}) as answer:
            assert answer.status in {200, 503}, await answer.text()  # 503: it gave way to another meanwhile


@pytest.mark.faults
@pytest.mark.parametrize("how", [kill, restart])
async def test_under_load_all_that_was_acknowledged_is_there_once(
    cluster: Cluster, store: Shards, make: MakePayment, how: Callable[[Cluster, str], Awaitable[None]]
) -> None:
    recorder = Recorder()
    before = leader_node(store)
    async with opened(cluster, "second") as second:
        started_s = time.monotonic()
        buyers = [task(recorder.buy((store, second), make, started_s + LOAD_S)) for _ in range(6)]
        await asyncio.sleep(KILL_AT_S)
        told = len(recorder.told_s)
        await how(cluster, before.name)
        await asyncio.wait_for(asyncio.gather(*buyers), 60)
        assert told > 50
        assert len(recorder.told_s) > told + 50, "writes went on"
    assert recorder.refusals == []  # all were held, none refused
    assert recorder.gap_s() < GAP_S
    assert len(recorder.created) == len(set(recorder.created)) == len(recorder.versions)
    keys = list(recorder.versions)
    rows = await asyncio.gather(*(store.get_with_entries(key) for key in keys))
    lost = [key for key, row in zip(keys, rows, strict=True) if row is None or row[0].version < recorder.versions[key]]
    assert lost == []
    for row in rows:
        assert row is not None
        assert sorted(entry.kind for entry in row[1]) == ["payment", "stripe_fee"]
    async with superuser_on(cluster, leader_node(store)) as session:
        found = await session.fetch("select key, count(*) from oncepay.payments where key = any ($1) group by key", keys)
    assert {row["key"]: row["count"] for row in found} == dict.fromkeys(keys, 1)


@asynccontextmanager
async def left_out(cluster: Cluster, store: Shards, node: Node) -> AsyncIterator[None]:
    """A leader whose postmaster was killed gives its lease back; then the whole node goes, lest it be elected again."""
    program = f"node-{node.name}"
    supervisor = cluster.supervisor()
    await eventually(lambda: store.leaders.current(SHARD) != node, "the lease is given back", 30)
    supervisor.stop([program], wait=False)
    try:
        yield
    finally:
        await eventually(lambda: supervisor.states()[program].state == "STOPPED", "it is down", 30)
        supervisor.start([program])


@pytest.mark.faults
async def test_a_commit_that_a_failover_erases_was_never_acknowledged(cluster: Cluster, store: Shards, make: MakePayment) -> None:
    """Its wait is cut off, so that it is visible on the leader; then the leader dies, and nobody else has ever had it.

    The caller waits through all of that, and is told of the row that is there in the end.
    """
    payment, witness = make(), make()
    before = leader_node(store)
    await store.accept(make())
    async with superuser_on(cluster, before) as session:
        query = "select active_pid from pg_replication_slots where slot_type = 'physical' and active"  # not the feed's
        senders = [psutil.Process(pid) for (pid,) in await session.fetch(query)]
        assert len(senders) == 2
        with frozen(senders):
            put = [Put(witness, 0, "test")]
            await session.execute("set synchronous_commit = local")
            arrays = (*new_arrays(put), *change_arrays([]), *entry_arrays([]))
            await session.fetch(_CALL, [0], None, "test", "test", *arrays, [], [], [], [])
            call = task(store.accept(payment))
            await session.execute("select pg_cancel_backend($1)", (await waiting_commit(session, "test")).pid)
            await shown_soon(session, payment.key)
            await stay_open([call], 0.7)
            other = task(store.accept(make()))
            waiting = psutil.Process((await waiting_commit(session, "test")).pid)
            kill_postmaster(cluster, before.name)
            for sender in senders:
                sender.kill()  # before it could send anything
    # It must not live on, or the node's Postgres could never start again. (It reads its standard input by then.)
    await eventually(lambda: not waiting.is_running(), "the backend whose commit waited has ended", 5)
    async with left_out(cluster, store, before):
        row, created = await asyncio.wait_for(call, 40)
        assert (await asyncio.wait_for(other, 40))[1]
    assert (row.key, created) == (payment.key, True)
    assert leader_node(store) != before
    assert await store.get(witness.key) is None  # which stood before it in the old leader's log
    assert await store.get(payment.key) is not None
    async with superuser_on(cluster, leader_node(store)) as session:
        assert await shown(session, payment.key) == 1


async def test_on_a_change_of_leader_sessions_are_dropped_without_a_cancel(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """Whoever follows the leaders is told of a change in the middle of a commit. Its backend must wait on undisturbed."""
    payment = make()
    await store.accept(make())
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        call = task(store.accept(payment))
        waiting = await waiting_commit(leader, "test")
        store.batcher(SHARD)._leader_changed(SHARD)

        async def tries_again() -> bool:
            query = "select count(*) from pg_stat_activity where application_name = 'test' and state = 'active' and pid <> $1"
            return bool(await leader.fetchval(query, waiting.pid))

        await eventually(tries_again, "the call is made again in another session")
        await stay_open([call], 0.7)
        assert await waiting_commit(leader, "test") == waiting
        assert not await shown(leader, payment.key)
    assert (await asyncio.wait_for(call, 20))[0].key == payment.key
    assert await shown(leader, payment.key) == 1


async def patiently(call: Callable[[], Awaitable[T]], within_s: float = 60.0) -> T:
    """As a client that comes again when it is told to."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                return await call()
            except Unavailable as error:
                await asyncio.sleep(min(error.retry_after_s or 0, 0.5))


@pytest.mark.faults
async def test_a_leader_that_froze_and_was_deposed_answers_nothing_when_it_thaws(
    cluster: Cluster, store: Shards, make: MakePayment
) -> None:
    """The whole node stands still, its watchdog too, until another leads; then its sessions run on as if nothing had been.

    One store watches etcd: it leaves the frozen sockets and goes on at the new leader. Another is cut off from etcd and still
    believes in the old leader: a plain query there answers backwards, a read through the store doesn't.
    """
    before = leader_node(store)
    endpoint = cluster.settings.etcd.endpoints[0]
    host, _, port = endpoint.rpartition(":")
    row, _ = await store.accept(make())
    versions: list[int] = []

    async def watch() -> None:
        while True:
            found = await patiently(lambda: store.get(row.key))
            assert found is not None
            versions.append(found.version)
            await asyncio.sleep(0.2)

    async with Proxy(host, int(port)) as etcd:
        async with opened(cluster, "blind", etcd_at=f"127.0.0.1:{etcd.port}") as blind, superuser_on(cluster, before) as plain:
            assert await blind.get(row.key) == row
            etcd.close()
            processes = node_processes(cluster, before.name)
            query = "select pid from pg_stat_activity where application_name = 'blind' or pid = pg_backend_pid()"
            backends = [psutil.Process(record["pid"]) for record in await plain.fetch(query)]
            backends.append(psutil.Process(cluster.postmaster_pid(before.name)))
            watching = task(watch())
            with frozen(processes):
                new, late = make(), make()
                calls = [
                    task(patiently(lambda: store.accept(new))),
                    task(patiently(lambda: store.apply(row, IntentCreated(f"pi_{row.key}", "s"), event="test"))),
                ]
                await eventually(lambda: store.leaders.current(SHARD) not in (None, before), "another leads", 60)
                (accepted, created), changed = await asyncio.wait_for(asyncio.gather(*calls), 45)
                assert (accepted.key, created, changed.version) == (new.key, True, 2)
                assert await store.get(row.key) == changed
                # Its walsenders still stand still, as behind a dead network: they show all as flushed by standbys that have left.
                thaw(backends)
                stale = await asyncio.wait_for(plain.fetchval("select version from oncepay.payments where key = $1", row.key), 10)
                assert stale == 1  # the trap: it answers, and backwards
                asked = [task(blind.get(row.key)), task(blind.by_intent(changed.intent))]
                await stay_open(asked, 3)
                asked.append(task(blind.accept(late)))
                await stay_open(asked, 1)
                assert await store.get(row.key) == changed
            answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 45)
            assert all(isinstance(answer, Unavailable) for answer in answers), answers
            assert await patiently(lambda: store.get(late.key)) is None
    assert not watching.done()
    count = len(versions)
    await eventually(lambda: len(versions) > count, "reads go on")
    watching.cancel()
    assert versions == sorted(versions)
    assert versions[-1] == 2
