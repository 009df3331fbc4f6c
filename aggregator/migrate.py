"""Brings the aggregator's database to this code's schema. Run by whoever deploys, as superuser, before the service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import asyncpg

MIGRATIONS = Path(__file__).parent / "migrations"
ROLES = ("oncepay_aggregator", "oncepay_reader")
LOCK = 0x6F6E6365

_VERSION_TABLE = """
create schema if not exists oncepay_meta;
create table if not exists oncepay_meta.migrations (
    number integer primary key,
    name text not null,
    applied_at timestamptz not null default now()
);
grant usage on schema oncepay_meta to public;
grant select on oncepay_meta.migrations to public
"""


def migrations() -> list[tuple[int, Path]]:
    """All migrations that this code brings, ascending: their number and file."""
    return sorted((int(path.name.split("_")[0]), path) for path in MIGRATIONS.glob("[0-9]*.sql"))


LATEST = max(number for number, _ in migrations())


async def migrate(dsn: str, *, passwords: Mapping[str, str]) -> list[str]:
    """Make the roles, set their passwords, and apply what isn't applied yet, all in one transaction.

    `dsn` is a superuser's and names an existing database. `passwords` is by role name; a role without one can't log in
    with a password. Returns the names of the migrations that were applied now. It may be run again at any time, also by
    two at once.
    """
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute("select pg_advisory_xact_lock($1)", LOCK)
            for role in ROLES:
                await _ensure_role(connection, role, passwords.get(role, ""))
            await connection.execute(_VERSION_TABLE)
            applied = {row["number"] for row in await connection.fetch("select number from oncepay_meta.migrations")}
            new = [(number, path) for number, path in migrations() if number not in applied]
            for number, path in new:
                await connection.execute(path.read_text(encoding="utf-8"))
                await connection.execute("insert into oncepay_meta.migrations (number, name) values ($1, $2)", number, path.name)
        return [path.name for _, path in new]
    finally:
        await connection.close()


async def _ensure_role(connection: asyncpg.Connection, role: str, password: str) -> None:
    """Roles belong to the whole server: another database's migration may have made it already."""
    if not await connection.fetchval("select exists (select from pg_roles where rolname = $1)", role):
        await connection.execute(f"create role {role} login")
    if password:
        statement = await connection.fetchval("select format('alter role %I password %L', $1::text, $2::text)", role, password)
        await connection.execute(statement)


async def version(connection: asyncpg.Connection) -> int:
    """The number of the last migration applied; 0 for an empty database."""
    if await connection.fetchval("select to_regclass('oncepay_meta.migrations')") is None:
        return 0
    return int(await connection.fetchval("select coalesce(max(number), 0) from oncepay_meta.migrations"))
