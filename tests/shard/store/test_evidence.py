"""What counts as evidence for a commit: only a member's standby, on a physical slot, that the quorum counts.

And what is read and then answered is behind such a commit, too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from deploy.local import Cluster
from deploy.programs import postgres_bin
from oncepay.events import IntentCreated
from oncepay.payment import Payment
from shard.store.leader import Node
from shard.store.lists import list_payments
from shard.store.store import Shards
from tests.shard.store.conftest import MakePayment
from tests.shard.store.trouble import (
    SHARD,
    eventually,
    frozen,
    leader_node,
    receivers,
    shown_soon,
    standbys,
    stay_open,
    superuser_on,
    waiting_commit,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("whole")]

OPEN_S = 1.2


def task(call: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(call)


@asynccontextmanager
async def logical_walsender(cluster: Cluster, leader: asyncpg.Connection, node: Node) -> AsyncIterator[None]:
    """A reader on a logical slot that acknowledges all that it is sent, as a feed or a subscription does."""
    postgres = cluster.settings.postgres
    slot = f"test_{os.urandom(4).hex()}"
    command = [str(postgres_bin() / "pg_recvlogical"), "-h", node.host, "-p", str(node.port), "-U", postgres.superuser]
    command += ["-d", postgres.database, "--slot", slot, "--start"]
    command += ["-o", "proto_version=1", "-o", "publication_names=oncepay_feed", "-f", os.devnull, "--no-loop"]
    command += ["--fsync-interval", "1", "--status-interval", "1"]
    await leader.execute("select pg_create_logical_replication_slot($1, 'pgoutput')", slot)
    reader = subprocess.Popen(command, env={**os.environ, "PGPASSWORD": postgres.superuser_password}, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        reader.terminate()
        reader.wait(10)
        await eventually(lambda: dropped(leader, slot), "the slot is gone")


async def dropped(session: asyncpg.Connection, slot: str) -> bool:
    """Whether the slot is gone. Patroni drops slots that it doesn't know, too."""
    try:
        await session.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1", slot)
    except (asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
        return False
    return True


@asynccontextmanager
async def without_standbys(cluster: Cluster, store: Shards, leader: asyncpg.Connection) -> AsyncIterator[None]:
    """Both standbys are stopped as for maintenance, and Patroni on the leader has drawn its conclusion: `ANY 1 (*)`."""
    programs = [f"node-{name}" for name in standbys(leader_node(store).name)]
    supervisor = cluster.supervisor()

    def are_down() -> bool:
        states = supervisor.states()
        return all(states[name].state == "STOPPED" for name in programs)

    try:
        supervisor.stop(programs, wait=False)

        async def is_any() -> bool:
            return "*" in str(await leader.fetchval("show synchronous_standby_names"))

        await eventually(is_any, "the leader waits for anybody", 20)
        await eventually(are_down, "both are down", 20)
        yield
    finally:
        await eventually(are_down, "both are down", 30)  # else they would not be started
        supervisor.start(programs)


@pytest.mark.faults
async def test_with_no_standby_left_a_logical_walsender_releases_a_commit_but_is_no_evidence(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    node, payment, known = leader_node(store), make(), (await store.accept(make()))[0]
    async with without_standbys(cluster, store, leader):
        async with logical_walsender(cluster, leader, node):
            plain = leader.execute("select pg_logical_emit_message(true, 'test', 'plain')")
            await asyncio.wait_for(plain, 15)  # Postgres acknowledges what is on one node only
            calls = [task(store.accept(payment)), task(store.get(known.key)), task(store.batcher(SHARD).barrier("alone"))]
            await shown_soon(leader, payment.key)
            await stay_open(calls[:2], 2.5)
            calls[2].cancel()
    answers = await asyncio.wait_for(asyncio.gather(*calls[:2]), 40)
    assert answers[0][0].key == payment.key
    assert answers[0][1]
    assert answers[1] == known
    assert leader_node(store) == node


async def test_a_barrier_of_the_feed_is_not_certain_by_a_logical_walsender(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection
) -> None:
    """The quorum itself is asked: here by a setting that is wrong in the same way as Patroni's when no standby is left."""
    async with overridden(leader, "synchronous_standby_names", "ANY 1 (*)"):
        async with logical_walsender(cluster, leader, leader_node(store)):
            with frozen(await receivers(cluster, standbys(leader_node(store).name))):
                plain = "select pg_logical_emit_message(true, 'test', 'plain')"
                await asyncio.wait_for(leader.execute(plain), 10)
                barrier = task(store.batcher(SHARD).barrier("one"))
                for _ in range(2):  # by then the walsender has acknowledged the barrier's commit, too
                    await asyncio.wait_for(leader.execute(plain), 10)
                await stay_open([barrier], OPEN_S)
            await asyncio.wait_for(barrier, 10)


@asynccontextmanager
async def overridden(leader: asyncpg.Connection, name: str, value: str) -> AsyncIterator[None]:
    """A setting that wins over Patroni's; it is reset at the end."""
    await leader.execute(f"alter system set {name} = '{value}'")
    await leader.execute("select pg_reload_conf()")
    try:

        async def is_set() -> bool:
            return bool(await leader.fetchval(f"show {name}") == value)

        await eventually(is_set, f"{name} is {value}")
        yield
    finally:
        await leader.execute(f"alter system reset {name}")
        await leader.execute("select pg_reload_conf()")


async def test_a_member_outside_of_the_quorum_is_no_evidence(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """It may have flushed a commit whose wait was cut off; but who is elected next may be elected without it."""
    payment = make()
    await store.accept(make())
    counted, other = standbys(leader_node(store).name)
    async with overridden(leader, "synchronous_standby_names", f'ANY 1 ("{counted}")'):

        async def is_out() -> bool:
            query = "select sync_state = 'async' from pg_stat_replication where application_name = $1"
            return bool(await leader.fetchval(query, other))

        await eventually(is_out, f"{other} doesn't count")
        with frozen(await receivers(cluster, [counted])):
            call = task(store.accept(payment))
            waiting = await waiting_commit(leader, "test")
            await leader.execute("select pg_cancel_backend($1)", waiting.pid)
            await shown_soon(leader, payment.key)

            async def has_flushed() -> bool:
                query = "select flush_lsn >= pg_current_wal_flush_lsn() from pg_stat_replication where application_name = $1"
                return bool(await leader.fetchval(query, other))

            await eventually(has_flushed, f"{other} has it")
            await stay_open([call], OPEN_S)
        _, created = await asyncio.wait_for(call, 20)
    assert created


READS = ("get", "get_with_entries", "by_intent", "list", "read")


async def read(store: Shards, how: str, row: Payment) -> int:
    """The version of the row as that way of reading shows it."""
    if how == "get":
        found = await store.get(row.key)
    elif how == "get_with_entries":
        both = await store.get_with_entries(row.key)
        found = both[0] if both else None
    elif how == "by_intent":
        found = await store.by_intent(row.intent)
    elif how == "list":
        page = await list_payments(store, buyer=None, seller=None, status=None, limit=1, cursor=None)
        found = page.payments[0]
    else:
        rows = await store.batcher(SHARD).read("select version from oncepay.payments where key = $1", row.key)
        return int(rows[0]["version"])
    assert found is not None
    assert found.key == row.key
    return found.version


async def test_no_way_of_reading_shows_what_may_still_be_lost(
    cluster: Cluster, store: Shards, leader: asyncpg.Connection, make: MakePayment
) -> None:
    """Each of them reads in a transaction that wrote nothing by itself; each waits for the quorum all the same."""
    row, _ = await store.accept(make())
    row = await store.apply(row, IntentCreated(f"pi_{row.key}", "secret"), event="test")
    # The newest of all, so that it is the first of the list.
    await leader.execute("update oncepay.payments set created_at = now(), version = 3 where key = $1", row.key)
    for how in READS:
        assert await read(store, how, row) == 3
    with frozen(await receivers(cluster, standbys(leader_node(store).name))):
        async with superuser_on(cluster, leader_node(store)) as session:
            await session.execute("set synchronous_commit = local")
            await session.execute("update oncepay.payments set version = 4 where key = $1", row.key)
        assert await leader.fetchval("select version from oncepay.payments where key = $1", row.key) == 4
        calls = [task(read(store, how, row)) for how in READS]
        await stay_open(calls, OPEN_S)
    assert await asyncio.wait_for(asyncio.gather(*calls), 20) == [4] * len(READS)
