"""What etcd and the shards show: members, the map beside the shards' own tables, quorum, replication slots, schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.findings import Finding, Level
from oncepay.errors import Unavailable

if TYPE_CHECKING:
    from cli.deployment import Report
    from deploy.local import Cluster
    from deploy.members import ShardMembers
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings
    from oncepay.shardmap import ShardMap
    from shard.store.facts import Facts

LAG_BYTES = 64 * 2**20
NODES = 3
TRANSACTION_S = 60.0
OLD_ETCD = ("3.5.0", "3.5.1", "3.5.2")


async def look_at_shards(etcd: Etcd, settings: Settings, cluster: Cluster | None, report: Report) -> list[Finding]:
    """Raises EtcdUnavailable when etcd can't be read: then nothing is known of the shards."""
    from deploy.members import shard_names
    from oncepay.shardmap import read_map

    report("looking at etcd")
    known = await read_map(etcd)
    found = list(_etcd_members(await etcd.member_versions(), local=cluster is not None))
    names = await shard_names(etcd)
    if known is None:
        found.append(
            Finding("problem", "map", "etcd has no shard map: nothing can be routed", "runbook etcd-restore, if etcd was lost")
        )
    for owner in known.shards() if known else ():
        if owner not in names:
            found.append(Finding("problem", "map", f"slots belong to {owner}, which isn't registered", "`oncepay shards list`"))
    report("looking at the shards")
    for findings in await asyncio.gather(*(_shard(etcd, settings, name, known, cluster) for name in names)):
        found += findings
    return found


def _etcd_members(versions: dict[str, str], *, local: bool) -> Iterator[Finding]:
    for endpoint, version in versions.items():
        if not version:
            text = f"member {endpoint} doesn't answer"
            yield Finding("problem", "etcd", text, "start it; with one more away nothing can be changed in etcd")
        elif version in OLD_ETCD and not local:
            advice = "upgrade to 3.5.21 or later, or 3.6"
            yield Finding("problem", "etcd", f"member {endpoint} runs {version}, which can lose consistency on a crash", advice)


async def _shard(etcd: Etcd, settings: Settings, name: str, known: ShardMap | None, cluster: Cluster | None) -> list[Finding]:
    from deploy.members import read
    from shard.store.facts import facts

    members = await read(etcd, name)
    found = [*_members(members), *judge_rules(members)]
    if members.leader is None:
        return found
    try:
        told = await facts(*members.leading().address, settings.postgres)
    except Unavailable as error:
        return [*found, Finding("problem", name, str(error), "runbook shard-without-leader")]
    mapped = sorted((item.first, item.last) for item in known.ranges if item.shard == name) if known else []
    restored = cluster is not None and name in cluster.restored()
    return found + list(judge(name, told, mapped, restored=restored))


def _members(members: ShardMembers) -> Iterator[Finding]:
    name = members.shard
    if members.leader is None:
        yield Finding("problem", name, "has no leader: its payments wait, then get 503", "runbook shard-without-leader")
    streaming = [member.name for member in members.standbys() if member.streams]
    working = len(streaming) + (members.leader is not None)
    if working < NODES:
        missing = f"{working} of {NODES} nodes work"
        level: Level = "problem" if working < 2 else "warning"
        yield Finding(level, name, missing, f"`oncepay shards show {name}` names them; see the missing one's log")
    for member in members.members:
        if member.pending_restart:
            text = f"{member.name} has settings that wait for a restart"
            yield Finding("warning", name, text, f"`oncepay shards restart {name}`")


def judge_rules(members: ShardMembers) -> Iterator[Finding]:
    """Patroni's rules are in etcd since the shard was made: they may be older than this code, or somebody has changed them."""
    from deploy.patroni import broken_rules

    for rule, found, wanted, promised in broken_rules(members.config) if members.config else ():
        text = f"its rule {rule} is {json.dumps(found)} in Patroni's configuration, and should be {json.dumps(wanted)}"
        advice = "`patronictl edit-config` sets it; in a local cluster `oncepay down` and `up` do"
        yield Finding("problem" if promised else "warning", members.shard, text, advice)


def judge(name: str, facts: Facts, mapped: list[tuple[int, int]], *, restored: bool) -> Iterator[Finding]:
    """What the leader's own account of the shard shows; `mapped` are the ranges that etcd's map gives it."""
    from oncepay.shardmap import merged

    if facts.shard != name:
        yield Finding(
            "problem", name, f"its database says that it is {facts.shard}", "the nodes were mixed up: stop, and compare"
        )
    if merged(facts.ranges) != merged(mapped):
        text = f"its own table gives it {_text(facts.ranges)}, the map {_text(mapped)}"
        yield Finding("problem", name, text, "the table is right; `oncepay reshard status` tells of a move that was cut off")
    if restored:
        text = "was restored from a backup, and owns nothing until it has been checked"
        yield Finding("warning", name, text, f"`oncepay shards compare {name}`, then remove it or take what it has")
    yield from _schema(name, facts)
    yield from _quorum(name, facts)
    yield from _slots(name, facts, restored=restored)
    if facts.archive.failing:
        text = f"the archive of its log fails at {facts.archive.last_failed}: the log piles up on the leader's disk"
        yield Finding("problem", name, text, "runbook backups: is there room, and may Postgres write there?")
    if facts.archive.mode == "off":
        text = "its log isn't archived (archive_mode is off): what follows a base backup can't be restored"
        yield Finding("warning", name, text, "runbook backups: set archive_mode and archive_command")
    if facts.longest_transaction_s > TRANSACTION_S:
        text = f"a transaction has been open for {facts.longest_transaction_s:,.0f} s"
        yield Finding("warning", name, text, "it keeps dead rows and blocks migrations: find it in pg_stat_activity")


def _schema(name: str, facts: Facts) -> Iterator[Finding]:
    from shard.store.migrate import LATEST

    if facts.migration < LATEST:
        text = f"its schema is at migration {facts.migration}, this code needs {LATEST}"
        yield Finding("problem", name, text, "`oncepay shards migrate`")
    elif facts.migration > LATEST:
        yield Finding(
            "problem", name, f"its schema is newer ({facts.migration}) than this code ({LATEST})", "use the newer Oncepay"
        )


def _quorum(name: str, facts: Facts) -> Iterator[Finding]:
    voting = [standby for standby in facts.standbys if standby.sync_state in ("quorum", "sync")]
    if not voting:
        text = "no standby counts in the quorum: nothing is acknowledged"
        yield Finding("problem", name, text, "get a standby to stream: runbook shard-without-leader")
    for standby in facts.standbys:
        if (standby.behind_bytes or 0) > LAG_BYTES:
            text = f"{standby.node} is {(standby.behind_bytes or 0) / 2**20:,.0f} MiB behind"
            yield Finding("warning", name, text, "look at its disk and its processor")


def _slots(name: str, facts: Facts, *, restored: bool) -> Iterator[Finding]:
    from deploy.patroni import FEED_SLOT

    feed = next((slot for slot in facts.slots if slot.slot == FEED_SLOT), None)
    if feed is None:
        yield Finding("problem", name, f"the feed's slot {FEED_SLOT} is missing", "runbook feed-halted")
    elif not feed.active and not restored:
        yield Finding("problem", name, "nobody reads its feed: derived data stands still", "runbook worker-away")
    for slot in facts.slots:
        if slot.wal_status == "lost":
            yield Finding("problem", name, f"slot {slot.slot} has lost its place in the log", "runbook slot-keeps-wal")
        elif 0 < facts.slot_wal_limit_bytes < 2 * (slot.kept_bytes or 0):
            text = f"slot {slot.slot} keeps {(slot.kept_bytes or 0) / 2**20:,.0f} MiB of the log, over half of its limit"
            yield Finding("problem", name, text, "runbook slot-keeps-wal")


def _text(ranges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{first}–{last}" for first, last in ranges) or "no slots"
