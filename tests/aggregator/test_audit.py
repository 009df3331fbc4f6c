"""The background audit: silent where all agrees, and it names what was planted."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import asyncpg
import pytest
from hypothesis import given

from aggregator import apply
from aggregator.audit import SQL, Audit
from aggregator.database import Database
from aggregator.positions import Reader
from deploy.local import Cluster
from oncepay.client import Oncepay
from oncepay.etcd import Etcd
from shard.store.migrate import migrate
from shard.store.store import Shards
from tests.aggregator.database import empty
from tests.aggregator.strategies import SELLERS, History, histories
from tests.aggregator.test_apply import REAL, paid
from tests.postgres_fixture import PostgresServer
from tests.router.conftest import CART

pytestmark = pytest.mark.cluster


async def differing(connection: asyncpg.Connection, history: History) -> dict[str, set[str]]:
    """What the statements of the audit name."""
    keys, ids = [row.key for row in history.booked], [row.entry_id for row in history.booked]
    sellers = [seller for seller in SELLERS if seller != "platform"]
    return {
        "postings": {row[0] for row in await connection.fetch(SQL["postings_differ"], keys, ids)},
        "sellers": {row[0] for row in await connection.fetch(SQL["sellers_differ"], sellers)},
        "accounts": {row[0] for row in await connection.fetch(SQL["accounts_differ"])},
    }


@REAL
@given(history=histories(), other=histories(shard="s1", prefix="m"))
async def test_what_was_applied_agrees_with_itself(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, other: History
) -> None:
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    for each in (history, other):
        await apply.apply(connection, each.whole())
        assert await differing(connection, each) == {"postings": set(), "sellers": set(), "accounts": set()}


@pytest.mark.parametrize(
    ("plant", "where", "named"),
    [
        ("update oncepay.seller_postings set amount = amount + 1 where seller = 'ann'", "postings", "k"),
        ("delete from oncepay.seller_postings where seller = 'bob'", "sellers", "bob"),
        ("update oncepay.seller_days set gross = gross + 1, net = net + 1 where seller = 'ann'", "sellers", "ann"),
        ("update oncepay.account_totals set credit = credit + 1 where account = 'seller:bob:payable'", "sellers", "bob"),
        (
            "update oncepay.account_totals set debit = debit + 1 where account = 'stripe:clearing'",
            "accounts",
            "usd doesn't balance",
        ),
        ("delete from oncepay.account_days where account = 'platform:fees'", "accounts", "platform:fees usd"),
    ],
)
async def test_a_sum_that_drifted_is_named(
    aggregator_dsn: str, connection: asyncpg.Connection, plant: str, where: str, named: str
) -> None:
    history = paid()
    await apply.apply(connection, history.whole())
    owner = await asyncpg.connect(aggregator_dsn)
    await owner.execute(plant)
    await owner.close()
    assert named in (await differing(connection, history))[where]


async def test_a_sample_of_a_large_shard_reads_no_table_whole() -> None:
    """A join of all of the ledger's rows and a sample took 18 s with a million entries."""
    with PostgresServer() as server:
        dsn = server.new_database()
        await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={})
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            "insert into oncepay.entries (slot, key, entry_id, currency, source, accounts, amounts, created_at,"
            " balance_transaction, fee) select oncepay.slot_of(k), k, 'payment', 'usd', 'ch_' || k, array['C', 'Ps', 'Fs'],"
            " array[1000, -900, -100], now(), 'txn_' || k, 59 from (select 'k-' || n as k from generate_series(1, 20000) n)"
        )
        await connection.execute("vacuum analyze oncepay.entries")
        rows = await connection.fetch("select slot, key, entry_id from oncepay.entries limit 100")
        columns = [[row[name] for row in rows] for name in ("slot", "key", "entry_id")]
        assert len(await connection.fetch(SQL["shard_has"], *columns)) == 100
        assert len(await connection.fetch(SQL["shard_sample"], 1, 100)) == 200
        for name, arguments in (("shard_has", columns), ("shard_sample", [1, 100])):
            plan = [row[0] for row in await connection.fetch("explain " + SQL[name], *arguments)]
            assert not [line for line in plan if "Seq Scan on entries" in line], plan
        await connection.close()


@contextlib.asynccontextmanager
async def auditing(cluster: Cluster, dsn: str) -> AsyncIterator[Audit]:
    """An audit of the database `dsn` against the cluster's shards."""
    settings = cluster.settings
    async with Etcd(settings.etcd) as etcd, Database(dsn) as database:
        password = settings.postgres.aggregator_password
        shards = Shards(etcd, settings, role="oncepay_aggregator", password=password, actor="audit-test")
        await shards.start()
        try:
            yield Audit(Reader(database), shards, 0)
        finally:
            await shards.stop()


@pytest.mark.faults
async def test_a_cluster_agrees_and_an_aggregator_that_lost_entries_does_not(
    cluster: Cluster, aggregator_dsn: str, connection: asyncpg.Connection, tmp_path: object
) -> None:
    status = cluster.status()
    urls = status.urls
    async with Oncepay(
        router=urls["router"], keygen=urls["keygen"], aggregator=urls["aggregator"], api_key=status.api_key, deadline_s=60
    ) as client:
        key = await client.new_key()
        await client.wait((await client.pay(key, **CART, payment_method="pm_card_visa")).key)
    async with auditing(cluster, cluster.settings.aggregator_dsn) as audit:
        found = await audit.round()
        assert not found or not await audit.round(again=found)
        assert audit.last.entries > 0
    for shard in status.shards:
        await connection.execute(
            "insert into oncepay.watermarks (shard, incarnation, epoch, lsn) values ($1, 'i', 1, 'F/0'::pg_lsn)", shard.name
        )
    async with auditing(cluster, aggregator_dsn) as audit:
        lost = await audit.round()
        assert lost
        assert all(what.endswith("and not here") for what in lost)
        assert await audit.round(again=lost) == lost
