"""A shard that was restored from a backup: what makes it a new incarnation, and what it remembers of the one it was."""

from __future__ import annotations

import datetime as dt
import re
from importlib import resources

import asyncpg
import msgspec

_SQL = (resources.files("shard.store") / "sql" / "restored.sql").read_text()


class Origin(msgspec.Struct, frozen=True):
    """Which shard it was, with the ranges that this one owned then, and the time of its last change (UTC)."""

    of_shard: str
    of_incarnation: str
    ranges: list[tuple[int, int]]
    up_to: dt.datetime | None


def statements(shard: str, incarnation: str) -> str:
    """What is executed on the restored database before anybody can reach it. Raises ValueError for names that can't be."""
    for name in (shard, incarnation):
        if not re.fullmatch(r"[a-z0-9]{1,64}", name):
            raise ValueError(f"{name!r} is no name of a shard or an incarnation")
    return _SQL.format(shard=f"'{shard}'", incarnation=f"'{incarnation}'")


async def origin(connection: asyncpg.Connection) -> Origin | None:
    """What this database was before it was last restored; None when it never was."""
    if await connection.fetchval("select to_regclass('oncepay_meta.restored')") is None:
        return None
    row = await connection.fetchrow(
        "select of_shard, of_incarnation, ranges::text as ranges, up_to from oncepay_meta.restored order by at desc limit 1"
    )
    if row is None:
        return None
    ranges = msgspec.json.decode(row["ranges"], type=list[tuple[int, int]])
    return Origin(row["of_shard"], row["of_incarnation"], ranges, row["up_to"])
