"""Migrations on a live database: taken up again, never in others' way, and roles that may do no more than they must."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import asyncpg
import pytest

from oncepay.keys import slot
from shard.store import migrate as schema
from shard.store.migrate import LATEST, MigrationBlocked, SchemaNewer, migrate, migrations, pending
from shard.store.restored import statements
from tests.postgres_fixture import PostgresServer, postgres_server

__all__ = ["postgres_server"]

pytestmark = pytest.mark.cluster


@pytest.fixture
async def dsn(postgres_server: PostgresServer) -> str:
    dsn = postgres_server.new_database()
    await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={})
    return dsn


async def run(dsn: str, statement: str, *, role: str = "") -> Any:
    connection = await asyncpg.connect(re.sub("//postgres@", f"//{role}@", dsn) if role else dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_a_run_that_was_cut_off_is_taken_up(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = postgres_server.new_database()
    known = migrations()
    broken = [(number, name, sql if number < LATEST else "select 1/0") for number, name, sql in known]
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: broken)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={})
    assert await run(dsn, "select max(number) from oncepay_meta.migrations") == known[-2][0]
    connection = await asyncpg.connect(dsn)
    assert await pending(connection) == [known[-1][1]]
    await connection.close()
    assert await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={}) == [known[-1][1]]
    assert await migrate(dsn, shard="s0", ranges=[], passwords={}) == []
    assert await run(dsn, "select last from oncepay.ranges") == 65_535


async def test_a_migration_waits_for_no_lock_in_others_way(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (LATEST + 1, "9999_more.sql", "alter table oncepay.payments add column more text")
    known = [*migrations(), table]
    monkeypatch.setattr(schema, "migrations", lambda: known)
    monkeypatch.setattr(schema, "LATEST", LATEST + 1)
    monkeypatch.setattr(schema, "LOCK_TIMEOUT_MS", 50)
    monkeypatch.setattr(schema, "PAUSE_S", 0.01)
    holder = await asyncpg.connect(dsn)
    transaction = holder.transaction()
    await transaction.start()
    await holder.fetch("select from oncepay.payments")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "TRIES_MAX", 2)
        with pytest.raises(MigrationBlocked, match="long transactions"):
            await migrate(dsn, shard="s0", ranges=[], passwords={})
    migrating = asyncio.create_task(migrate(dsn, shard="s0", ranges=[], passwords={}))
    for _ in range(20):  # readers come and go beside it, each well within its bound
        assert await asyncio.wait_for(run(dsn, "select count(*) from oncepay.payments"), 5) == 0
    assert not migrating.done()
    await transaction.rollback()
    await holder.close()
    assert await migrating == ["9999_more.sql"]


async def test_older_code_leaves_a_newer_schema_alone(dsn: str) -> None:
    await run(dsn, f"insert into oncepay_meta.migrations (number, name) values ({LATEST + 1}, 'later')")
    with pytest.raises(SchemaNewer, match="newer version"):
        await migrate(dsn, shard="s0", ranges=[], passwords={})
    connection = await asyncpg.connect(dsn)
    with pytest.raises(SchemaNewer):
        await pending(connection)
    await connection.close()


async def test_a_restored_shard_has_fed_nobody(dsn: str) -> None:
    """Its feed may begin where its slot does. Also of a backup of before that was kept."""
    await run(dsn, "update oncepay.worker_epoch set fed = true")
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statements("s9", "0f"))
        assert await run(dsn, "select fed from oncepay.worker_epoch") is False
        await connection.execute("alter table oncepay.worker_epoch drop column fed")
        await connection.execute(statements("s8", "0e"))
        assert await run(dsn, "select epoch from oncepay.worker_epoch") == 2
    finally:
        await connection.close()


WRITES = [
    "delete from oncepay.payments",
    "update oncepay.payments set status = 'canceled'",
    "insert into oncepay.entries select * from oncepay.entries",
    "update oncepay.ranges set map_version = 9",
    "delete from oncepay.ranges",
    "update oncepay.worker_epoch set epoch = 9",
    "update oncepay.identity set incarnation = 'x'",
    "truncate oncepay.entries",
    "alter table oncepay.payments add column more text",
]


@pytest.mark.parametrize("role", ["oncepay_operator", "oncepay_backup", "oncepay_reader", "oncepay_aggregator"])
async def test_who_looks_or_saves_writes_nothing(dsn: str, role: str) -> None:
    for statement in WRITES:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await run(dsn, statement, role=role)


@pytest.mark.parametrize("role", ["oncepay_router", "oncepay_worker", "oncepay_mover"])
async def test_nobody_changes_the_schema_or_takes_an_entry_back(dsn: str, role: str) -> None:
    statements = ["truncate oncepay.entries", WRITES[-1], WRITES[6]]
    if role != "oncepay_mover":
        statements.append("delete from oncepay.entries")
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await run(dsn, statement, role=role)


async def test_a_row_is_deleted_only_where_its_slot_has_moved_away(dsn: str) -> None:
    """By the mover's role; the others may delete nothing."""
    key = "seller:a"
    await run(
        dsn,
        "insert into oncepay.sellers (slot, key, payee, currency, version, actor, created_at, updated_at)"
        f" values ({slot(key)}, '{key}', 'p', 'usd', 1, 'test', now(), now())",
    )
    delete = f"delete from oncepay.sellers where slot = {slot(key)} returning key"
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await run(dsn, delete, role="oncepay_mover")
    await run(dsn, f"delete from oncepay.ranges where {slot(key)} between first and last")
    assert await run(dsn, delete, role="oncepay_mover") == key


async def test_each_role_may_do_its_work(dsn: str) -> None:
    assert await run(dsn, "select count(*) from pg_stat_replication", role="oncepay_operator") == 0
    assert await run(dsn, "select shard from oncepay.identity", role="oncepay_operator") == "s0"
    await run(dsn, "checkpoint", role="oncepay_operator")
    assert await run(dsn, "select pg_switch_wal() is not null", role="oncepay_backup")
    for role in ("oncepay_operator", "oncepay_reader", "oncepay_mover"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await run(dsn, "select pg_switch_wal()", role=role)
    assert await run(dsn, "select count(*) from oncepay.payments", role="oncepay_mover") == 0
