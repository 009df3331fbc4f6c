"""`oncepay shards list | show`: who owns what, who leads, and what each node does."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from cli.common import handle_errors, output_option
from cli.deployment import config_option, settings_of, shard_argument, with_etcd
from oncepay.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.members import ShardMembers
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings


@click.command("list", short_help="Every shard, its slots, its leader and its nodes.")
@config_option
@output_option
@handle_errors
def list_shards(config: str | None, output: str) -> None:
    """Every shard, the ranges of slots that the map gives it, its leader, and how many of its nodes do their work.

    \b
    Example:
      oncepay shards list
      oncepay shards list --output json
    """
    settings = settings_of(config)
    found = with_etcd(settings, lambda etcd: _all(etcd, settings))
    if output == "json":
        click.echo(json.dumps(found))
        return
    from rich.console import Console

    Console(highlight=False).print(_table(found["shards"]))


@click.command(short_help="One shard in detail.")
@shard_argument
@config_option
@output_option
@handle_errors
def show(shard: str, config: str | None, output: str) -> None:
    """One shard in detail: nodes, quorum, replication slots, schema, archive.

    \b
    Example:
      oncepay shards show s0
    """
    settings = settings_of(config)
    found = with_etcd(settings, lambda etcd: _one(etcd, settings, shard))
    click.echo(json.dumps(found) if output == "json" else _text(found))


async def _all(etcd: Etcd, settings: Settings) -> dict[str, Any]:
    from deploy.members import shard_names
    from oncepay.shardmap import read_map

    names = await shard_names(etcd)
    known = await read_map(etcd)
    shards = await asyncio.gather(*(_seen(etcd, settings, name) for name in names))
    for shard in shards:
        shard["ranges"] = [[item.first, item.last] for item in known.ranges if item.shard == shard["name"]] if known else []
    return {"map_version": known.version if known else None, "shards": shards}


async def _one(etcd: Etcd, settings: Settings, name: str) -> dict[str, Any]:
    from deploy.members import shard_names

    if name not in (names := await shard_names(etcd)):
        raise NotFound(f"there is no shard {name}: there are {', '.join(names) or 'none'}")
    found = await _all(etcd, settings)
    return next(shard for shard in found["shards"] if shard["name"] == name)


async def _seen(etcd: Etcd, settings: Settings, name: str) -> dict[str, Any]:
    """What etcd and the shard's leader tell; `facts` is null, with a reason in `problem`, when the leader can't be asked."""
    import msgspec

    from deploy.members import read
    from shard.store.facts import facts

    members = await read(etcd, name)
    told, problem = None, ""
    try:
        told = await facts(*members.leading().address, settings.postgres)
    except Unavailable as error:
        problem = str(error)
    return {
        "name": name,
        "leader": members.leader,
        "nodes": [_node(members, member.name) for member in members.members],
        "voters": sorted(members.sync.voters),
        "facts": msgspec.to_builtins(told) if told else None,
        "problem": problem,
    }


def _node(members: ShardMembers, name: str) -> dict[str, Any]:
    member = members.member(name)
    host, port = member.address
    return {
        "name": name,
        "role": "leader" if name == members.leader else member.role,
        "state": member.replication_state or member.state,
        "timeline": member.timeline,
        "host": host,
        "port": port,
        "pending_restart": member.pending_restart,
    }


def _ranges(shard: dict[str, Any]) -> str:
    return ", ".join(f"{first}–{last}" for first, last in shard["ranges"]) or "none"


def _working(shard: dict[str, Any]) -> int:
    return sum(node["name"] == shard["leader"] or node["state"] == "streaming" for node in shard["nodes"])


def _table(shards: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("shard", "slots", "leader", "nodes", "migration", "size", title="Shards", title_justify="left")
    for shard in shards:
        facts = shard["facts"] or {}
        size = f"{facts['database_bytes'] / 2**20:,.0f} MiB" if facts else "?"
        nodes = f"{_working(shard)} of {len(shard['nodes'])}"
        table.add_row(shard["name"], _ranges(shard), shard["leader"] or "—", nodes, str(facts.get("migration", "?")), size)
    return table


def _text(shard: dict[str, Any]) -> str:
    lines = [f"shard {shard['name']}: slots {_ranges(shard)}"]
    behind = {item["node"]: item for item in (shard["facts"] or {"standbys": []})["standbys"]}
    for node in shard["nodes"]:
        standby = behind.get(node["name"])
        lag = f", {standby['behind_bytes'] or 0:,} bytes behind, {standby['sync_state']}" if standby else ""
        pending = ", waits for a restart" if node["pending_restart"] else ""
        where = f"{node['host']}:{node['port']}"
        lines.append(f"  {node['name']:<8} {node['role']:<8} {node['state']}, timeline {node['timeline']}{lag}{pending}  {where}")
    lines.append(f"  voters   {', '.join(shard['voters']) or 'none'}")
    if shard["facts"] is None:
        return "\n".join([*lines, f"  the leader can't be asked: {shard['problem']}"])
    facts = shard["facts"]
    lines.append(
        f"  schema   migration {facts['migration']}; incarnation {facts['incarnation']}; map version {facts['map_version']}"
    )
    lines.append(f"  size     {facts['database_bytes'] / 2**20:,.1f} MiB, some {facts['payments_estimate']:,} payments")
    for slot in facts["slots"]:
        state = "in use" if slot["active"] else "not in use"
        lines.append(f"  slot     {slot['slot']}: {slot['type']}, {state}, {slot['kept_bytes'] or 0:,} bytes of the log kept")
    archive = facts["archive"]
    failing = f"; FAILING at {archive['last_failed']}" if archive["failing"] else ""
    lines.append(f"  archive  {archive['mode']}, {archive['archived']:,} segments, last {archive['last'] or 'none'}{failing}")
    return "\n".join(lines)
