"""What a shard's leader knows of itself: for operators and for `oncepay doctor`. Reads only, in the operator's role."""

from __future__ import annotations

from importlib import resources

import asyncpg
import msgspec

from oncepay.errors import ShardUnavailable
from oncepay.ownership import Owned
from oncepay.settings import PostgresSettings

ASK_S = 10.0
ROLE = "oncepay_operator"
_SQL = (resources.files("shard.store") / "sql" / "facts.sql").read_text()


class StandbyFacts(msgspec.Struct, frozen=True):
    """A member that streams; `behind_bytes` is what it hasn't flushed yet."""

    node: str
    state: str
    sync_state: str
    behind_bytes: int | None


class SlotFacts(msgspec.Struct, frozen=True):
    """A replication slot; `kept_bytes` of the log are kept for it. `confirmed` is a logical slot's position, in bytes."""

    slot: str
    type: str
    active: bool
    wal_status: str | None
    confirmed: int | None
    kept_bytes: int | None


class ArchiveFacts(msgspec.Struct, frozen=True):
    """The archive of the log. `failing`: the last try failed."""

    mode: str
    archived: int
    last: str | None
    last_at: str | None
    failed: int
    failing: bool | None
    last_failed: str | None

    def trouble(self, segment: str) -> str:
        """Why the leader can't be taken to have archived that segment; empty when it has."""
        if self.failing:
            return f"the archive of the log fails at {self.last_failed}"
        last = self.last or ""
        if last.endswith(".history") or last[8:24] >= segment[8:]:
            return ""
        return f"the leader has not archived {segment}, its last is {last or 'none'}"


class Facts(msgspec.Struct, frozen=True):
    """One shard. `ranges` are those that its own table has, which is the last word; `migration` is the last one applied.

    `flushed` is the position of the log's end, in bytes.
    """

    shard: str
    incarnation: str
    migration: int
    ranges: list[tuple[int, int]]
    map_version: int | None
    worker_epoch: int
    flushed: int
    in_recovery: bool
    database_bytes: int
    payments_estimate: int
    synchronous_standby_names: str
    slot_wal_limit_bytes: int
    standbys: list[StandbyFacts]
    slots: list[SlotFacts]
    archive: ArchiveFacts
    longest_transaction_s: float


async def owned(host: str, port: int, postgres: PostgresSettings) -> list[Owned]:
    """The ranges in the shard's own table. Raises ShardUnavailable."""
    rows = await _ask(host, port, postgres, "select first, last, map_version from oncepay.ranges order by first")
    return [Owned(row["first"], row["last"], row["map_version"]) for row in rows]


async def facts(host: str, port: int, postgres: PostgresSettings) -> Facts:
    """Ask the leader at that address. Raises ShardUnavailable."""
    [row] = await _ask(host, port, postgres, _SQL)
    return msgspec.json.decode(row[0], type=Facts)


async def _ask(host: str, port: int, postgres: PostgresSettings, query: str) -> list[asyncpg.Record]:
    try:
        connection = await asyncpg.connect(
            host=host, port=port, user=ROLE, password=postgres.operator_password, database=postgres.database, timeout=ASK_S
        )
        try:
            return list(await connection.fetch(query, timeout=ASK_S))
        finally:
            connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ShardUnavailable(f"the leader at {host}:{port} can't be asked: {error!r}") from error
