"""Planning a move: what it would move, how long that takes, and what stands in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from oncepay.moves import BUSY, LAG_MAX_BYTES, PAUSE_LIMIT_S, Move
from oncepay.shardmap import ShardMap, read_takers
from shard.mover.errors import MoveError
from shard.mover.pace import expected_s
from shard.mover.records import Records, new_id, now_ms
from shard.mover.run import Mover
from shard.mover.side import Side
from shard.mover.tables import Table, same_tables

SAMPLE_ROWS = 1_000
WAL_SAMPLE_S = 1.0
ASSUMED_ROWS_PER_S = 20_000
"""What a copy makes on a small machine, for an estimate before there is one."""
SLOTS_NEEDED = 3
"""Streams there and back, and the one that remembers changes."""

_ROOM = """
select (select count(*) from pg_replication_slots)::integer as slots,
       current_setting('max_replication_slots')::integer as slots_max,
       (select count(*) from pg_subscription)::integer as subscriptions,
       current_setting('max_logical_replication_workers')::integer as workers_max,
       (select case when setting::bigint < 0 then -1 else setting::bigint << 20 end from pg_settings
        where name = 'max_slot_wal_keep_size') as keep_bytes,
       (select coalesce(max(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), restart_lsn)), 0) from pg_replication_slots)::bigint
           as kept_bytes,
       pg_database_size(current_database()) as database_bytes,
       (select coalesce(sum(size), 0) from pg_ls_waldir())::bigint as wal_bytes,
       (select max(number) from oncepay_meta.migrations) as migration,
       current_setting('sync_replication_slots') as synced,
       current_setting('synchronous_standby_names') as quorum
"""


class Check(msgspec.Struct, frozen=True):
    """One condition of a move. A `fatal` one that fails keeps it from starting."""

    name: str
    ok: bool
    detail: str
    fatal: bool = True


class ShardRoom(msgspec.Struct, frozen=True):
    """A shard's disk and log in bytes. `wal_bytes_per_s`: what it writes now; `keep_bytes`: what its slots may keep (-1: all)."""

    shard: str
    database_bytes: int
    wal_bytes: int
    wal_bytes_per_s: int
    kept_bytes: int
    keep_bytes: int


class Plan(msgspec.Struct, frozen=True):
    """A planned move with its figures: rows and bytes by table, how long the copy takes, what it needs on both sides."""

    move: Move
    rows: dict[str, int]
    bytes: int
    copy_s: float
    shards: tuple[ShardRoom, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the move may start."""
        return all(check.ok or not check.fatal for check in self.checks)


async def plan(
    mover: Mover, current: ShardMap, first: int, last: int, target: str, *, rate_rows_per_s: int = 0,
    pause_limit_s: float = PAUSE_LIMIT_S, lag_max_bytes: int = LAG_MAX_BYTES, keep: bool = True,
) -> Plan:  # fmt: skip
    """Plan to move `first` to `last` to `target`, and with `keep` keep the plan in etcd, if every check holds.

    Raises MoveRefused when another move has these slots, MoveError for a range or a shard that can't be.
    """
    source = _owner(current, first, last)
    if source == target:
        raise MoveError(f"shard {target} owns slots {first}-{last} already")
    if target not in await read_takers(mover.records.etcd):
        raise MoveError(f"there is no shard {target} that may take slots")
    sides = [Side(shard, mover.leaders, mover.settings, "oncepay-mover plan") for shard in (source, target)]
    try:
        made = await _figures(mover.records, sides, first, last, rate_rows_per_s)
    finally:
        for side in sides:
            await side.close()
    move = Move(
        id=new_id(), first=first, last=last, source=source, target=target, created_at_ms=now_ms(), changed_at_ms=now_ms(),
        rows_total=sum(made.rows.values()), bytes_total=made.bytes, rate_rows_per_s=rate_rows_per_s,
        pause_limit_s=pause_limit_s, lag_max_bytes=lag_max_bytes,
    )  # fmt: skip
    found = msgspec.structs.replace(made, move=move)
    if keep and found.ok:
        await mover.records.create(move)
    return found


def _owner(current: ShardMap, first: int, last: int) -> str:
    owners = {item.shard for item in current.ranges if item.first <= last and first <= item.last}
    if len(owners) != 1:
        raise MoveError(f"slots {first}-{last} are on several shards ({', '.join(sorted(owners))}): plan a move for each part")
    return owners.pop()


async def _figures(records: Records, sides: Sequence[Side], first: int, last: int, rate: int) -> Plan:
    source, target = sides
    tables = await same_tables(source, target)
    rows = {table.name: await _count(source, table, first, last) for table in tables}
    size = sum([await _size(source, table, first, last, rows[table.name]) for table in tables])
    before = [await side.position() for side in sides]
    await asyncio.sleep(WAL_SAMPLE_S)
    written = [await side.position() - start for side, start in zip(sides, before, strict=True)]
    found = [await side.one(_ROOM) for side in sides]
    rooms = []
    for side, row, wal in zip(sides, found, written, strict=True):
        assert row is not None
        rooms.append(
            ShardRoom(
                side.shard, row["database_bytes"], row["wal_bytes"], int(wal / WAL_SAMPLE_S), row["kept_bytes"], row["keep_bytes"]
            )
        )
    copy_s = round(expected_s(sum(rows.values()), rate, ASSUMED_ROWS_PER_S), 1)
    checks = [check for side, row in zip(sides, found, strict=True) if row for check in _room_checks(side.shard, row)]
    one, other = found[0] or {}, found[1] or {}
    checks.append(
        Check("schema", one["migration"] == other["migration"], f"migrations {one['migration']} and {other['migration']}")
    )
    kept = rooms[0].wal_bytes_per_s * copy_s + size
    enough = rooms[0].keep_bytes < 0 or kept < rooms[0].keep_bytes / 2
    detail = f"the copy keeps some {kept / 2**20:.0f} MiB of {source.shard}'s log"
    checks.append(Check("log", enough, f"{detail}; its slots may keep {rooms[0].keep_bytes / 2**20:.0f} MiB"))
    busy = [
        move.id for move in await records.all() if move.state in BUSY and {move.source, move.target} & {s.shard for s in sides}
    ]
    checks.append(Check("queue", not busy, f"waits for {', '.join(busy)}" if busy else "starts at once", fatal=False))
    return Plan(Move(id="", first=0, last=0, source="", target=""), rows, size, copy_s, tuple(rooms), tuple(checks))


def _room_checks(shard: str, row: object) -> list[Check]:
    assert isinstance(row, object)
    found = dict(row)  # type: ignore[call-overload]
    slots, workers = found["slots_max"] - found["slots"], found["workers_max"] - found["subscriptions"]
    quorum = found["quorum"]
    return [
        Check(f"{shard}: slots", slots >= SLOTS_NEEDED, f"{slots} of max_replication_slots are free, {SLOTS_NEEDED} are needed"),
        Check(f"{shard}: workers", workers >= 1, f"{workers} of max_logical_replication_workers are free"),
        Check(f"{shard}: quorum", bool(quorum) and "*" not in quorum, f"synchronous_standby_names is '{quorum}'"),
        Check(
            f"{shard}: failover", found["synced"] == "on",
            f"sync_replication_slots is {found['synced']}: with off, a failover makes the copy begin anew", fatal=False,
        ),
    ]  # fmt: skip


async def _count(side: Side, table: Table, first: int, last: int) -> int:
    row = await side.one(f"select count(*) as rows from {table.qualified} where slot between $1 and $2", first, last)  # noqa: S608
    assert row is not None
    return int(row["rows"])


async def _size(side: Side, table: Table, first: int, last: int, rows: int) -> int:
    """Bytes of the rows, from the average of some."""
    row = await side.one(
        f"select coalesce(avg(pg_column_size(t)), 0)::float8 as size from"  # noqa: S608
        f" (select * from {table.qualified} where slot between $1 and $2 limit {SAMPLE_ROWS}) t",
        first,
        last,
    )
    assert row is not None
    return int(row["size"] * rows)
