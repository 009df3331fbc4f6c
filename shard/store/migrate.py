"""Numbered migrations of a shard's database, under a lock, each in a transaction of its own.

A migration whose first line is `-- Outside of a transaction…` is a list of statements that run one by one instead, for
`create index concurrently`: each can be run again, since a run that was cut off begins with the first.

A migration's file name starts with its number; `version` of a database is the number of the last one applied. What was applied
stays applied, so a run that was cut off is taken up again by the next.

Migrations are made for a shard that takes payments meanwhile: none waits for a lock longer than LOCK_TIMEOUT_MS, because
whoever comes after it in the lock's queue would wait too; it is tried again instead.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources

import asyncpg

from oncepay.errors import OncepayError
from oncepay.settings import PostgresSettings

ROLES: dict[str, str] = {
    "oncepay_router": "login connection limit 60",
    "oncepay_worker": "login replication connection limit 20",
    "oncepay_aggregator": "login connection limit 10",
    "oncepay_operator": "login connection limit 10",
    "oncepay_reader": "login connection limit 20",
    "oncepay_mover": "login replication connection limit 20",
    "oncepay_backup": "login replication connection limit 8",
}
LOCK_TIMEOUT_MS = 1_000
TRIES_MAX = 30
PAUSE_S = 1.0
_LOCK = 0x6F6E6365
_ONE_BY_ONE = "-- Outside of a transaction"


_BROKEN = """
select c.relname as name from pg_index i join pg_class c on c.oid = i.indexrelid
where c.relnamespace = 'oncepay'::regnamespace and not i.indisvalid
"""
"""What a run that was cut off has left."""
_DONE = "insert into oncepay_meta.migrations (number, name) values ($1, $2)"


class MigrationBlocked(OncepayError):
    """A migration can't be applied now."""

    status = 409
    slug = "migration-blocked"


class SchemaNewer(OncepayError):
    """The database was migrated by a newer version of Oncepay."""

    status = 409
    slug = "schema-newer"


def migrations() -> list[tuple[int, str, str]]:
    """All migrations that this version of the code knows: (number, file name, SQL), ascending."""
    folder = resources.files("shard.store") / "migrations"
    found = [(int(f.name.split("_")[0]), f.name, f.read_text()) for f in folder.iterdir() if re.match(r"\d{4}_.*\.sql$", f.name)]
    return sorted(found)


LATEST = max(number for number, _, _ in migrations())


def passwords_of(postgres: PostgresSettings) -> dict[str, str]:
    """The password of each role, as the settings have them; empty where they have none."""
    return {role: getattr(postgres, f"{role.removeprefix('oncepay_')}_password") for role in ROLES}


async def migrate(dsn: str, *, shard: str, ranges: Sequence[tuple[int, int]], passwords: Mapping[str, str]) -> list[str]:
    """Bring the database that `dsn` names (as superuser) up to date; the names of the migrations that were applied.

    Makes the roles and sets their passwords; a fresh database becomes `shard`, owner of `ranges` at map version 1. Raises
    MigrationBlocked when others hold what a migration needs, SchemaNewer; what was applied until then stays.
    """
    connection = await asyncpg.connect(dsn)
    try:
        # Who waits in a statement would be waited for by `create index concurrently` in the run that it waits for.
        while not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)
        await _make_roles(connection, passwords)
        await connection.execute("create schema if not exists oncepay_meta")
        await connection.execute(
            "create table if not exists oncepay_meta.migrations"
            " (number integer primary key, name text not null, applied_at timestamptz not null default now())"
        )
        await connection.execute(
            "grant usage on schema oncepay_meta to public; grant select on oncepay_meta.migrations to public"
        )
        done = []
        for number, name, sql in await _missing(connection):
            await _apply(connection, number, name, sql)
            done.append(name)
        await _identify(connection, shard, ranges)
        return done
    finally:
        await connection.close()


async def pending(connection: asyncpg.Connection) -> list[str]:
    """The names of the migrations that `migrate` would apply. Raises SchemaNewer."""
    if await version(connection) == 0:
        return [name for _, name, _ in migrations()]
    return [name for _, name, _ in await _missing(connection)]


async def _missing(connection: asyncpg.Connection) -> list[tuple[int, str, str]]:
    applied = {row["number"] for row in await connection.fetch("select number from oncepay_meta.migrations")}
    if newer := [number for number in applied if number > LATEST]:
        raise SchemaNewer(
            f"the database is at migration {max(newer)}, this code knows {LATEST}: use the newer version of Oncepay"
        )
    return [item for item in migrations() if item[0] not in applied]


async def _apply(connection: asyncpg.Connection, number: int, name: str, sql: str) -> None:
    for left in reversed(range(TRIES_MAX)):
        try:
            if sql.startswith(_ONE_BY_ONE):
                await _run_statements(connection, sql)
                await connection.execute(_DONE, number, name)
            else:
                async with connection.transaction():
                    await connection.execute(f"set local lock_timeout = {LOCK_TIMEOUT_MS}")
                    await connection.execute(sql)
                    await connection.execute(_DONE, number, name)
            return
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if left == 0:
                advice = "look for long transactions (pg_stat_activity), and call again"
                raise MigrationBlocked(f"{name} got no lock in {TRIES_MAX} tries: {advice}") from error
        await asyncio.sleep(PAUSE_S)


async def _run_statements(connection: asyncpg.Connection, sql: str) -> None:
    """Each by itself. These wait for transactions that run, without making others wait behind them; so there is no time limit."""
    for row in await connection.fetch(_BROKEN):
        await connection.execute(f"drop index concurrently oncepay.{row['name']}")
    lines = [line for line in sql.splitlines() if not line.startswith("--")]
    for statement in "\n".join(lines).split(";"):
        if statement.strip():
            await connection.execute(statement)


async def _make_roles(connection: asyncpg.Connection, passwords: Mapping[str, str]) -> None:
    known = {row["rolname"] for row in await connection.fetch("select rolname from pg_roles where rolname like 'oncepay%'")}
    for role, attributes in ROLES.items():
        if role not in known:
            await connection.execute(f"create role {role} {attributes}")
        password = passwords.get(role)
        if password:
            quoted = await connection.fetchval("select quote_literal($1::text)", password)
            await connection.execute(f"alter role {role} password {quoted}")


async def _identify(connection: asyncpg.Connection, shard: str, ranges: Sequence[tuple[int, int]]) -> None:
    async with connection.transaction():
        made = await connection.fetchval(
            "insert into oncepay.identity (shard, incarnation) values ($1, $2) on conflict do nothing returning shard",
            shard,
            uuid.uuid4().hex,
        )
        if made is not None:
            await connection.executemany(
                "insert into oncepay.ranges (first, last, map_version) values ($1, $2, 1)", [tuple(item) for item in ranges]
            )
        elif await connection.fetchval("select shard from oncepay.identity") != shard:
            raise ValueError(f"this database belongs to another shard than {shard}")


async def version(connection: asyncpg.Connection) -> int:
    """The number of the last migration applied; 0 for an empty database."""
    if await connection.fetchval("select to_regclass('oncepay_meta.migrations')") is None:
        return 0
    found = await connection.fetchval("select max(number) from oncepay_meta.migrations")
    return int(found or 0)
