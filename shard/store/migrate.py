"""Numbered migrations of a shard's database, under a lock, each in a transaction of its own.

A migration's file name starts with its number; `version` of a database is the number of the last one applied.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources

import asyncpg

ROLES: dict[str, str] = {
    "oncepay_router": "login connection limit 60",
    "oncepay_worker": "login replication connection limit 20",
    "oncepay_aggregator": "login connection limit 10",
    "oncepay_operator": "login connection limit 10",
    "oncepay_reader": "login connection limit 20",
}
_LOCK = 0x6F6E6365


def migrations() -> list[tuple[int, str, str]]:
    """All migrations that this version of the code knows: (number, file name, SQL), ascending."""
    folder = resources.files("shard.store") / "migrations"
    found = [(int(f.name.split("_")[0]), f.name, f.read_text()) for f in folder.iterdir() if re.match(r"\d{4}_.*\.sql$", f.name)]
    return sorted(found)


LATEST = max(number for number, _, _ in migrations())


async def migrate(dsn: str, *, shard: str, ranges: Sequence[tuple[int, int]], passwords: Mapping[str, str]) -> list[str]:
    """Bring the database that `dsn` names (as superuser) up to date; the names of the migrations that were applied.

    Makes the roles and sets their passwords; a fresh database becomes `shard`, owner of `ranges` at map version 1.
    """
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("select pg_advisory_lock($1)", _LOCK)
        await _make_roles(connection, passwords)
        await connection.execute("create schema if not exists oncepay_meta")
        await connection.execute(
            "create table if not exists oncepay_meta.migrations"
            " (number integer primary key, name text not null, applied_at timestamptz not null default now())"
        )
        await connection.execute(
            "grant usage on schema oncepay_meta to public; grant select on oncepay_meta.migrations to public"
        )
        applied = {row["number"] for row in await connection.fetch("select number from oncepay_meta.migrations")}
        done = []
        for number, name, sql in migrations():
            if number not in applied:
                await _apply(connection, number, name, sql)
                done.append(name)
        await _identify(connection, shard, ranges)
        return done
    finally:
        await connection.close()


async def _apply(connection: asyncpg.Connection, number: int, name: str, sql: str) -> None:
    async with connection.transaction():
        await connection.execute(sql)
        await connection.execute("insert into oncepay_meta.migrations (number, name) values ($1, $2)", number, name)


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
