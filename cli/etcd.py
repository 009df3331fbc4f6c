"""`oncepay etcd`: its backups, and what has to be done when one is restored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, fail, handle_errors, home, output_option
from cli.deployment import config_option, dry_run_option, end_on_terminate, reporting, settings_of, with_etcd
from oncepay.errors import EtcdUnavailable, OncepayError, Unavailable

if TYPE_CHECKING:
    from cli.deployment import Report
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings

FILE = click.Path(path_type=Path, dir_okay=False)


class Unsettled(OncepayError):
    """The shards' tables can't be read, so there is no map to be made of them."""

    slug = "map-unsettled"


class StillRunning(OncepayError):
    """What has to be stopped for this still runs."""

    status = 409
    slug = "still-running"


@click.group(short_help="Back up etcd, and restore it.")
def etcd() -> None:
    """Back up etcd, and restore it: the shard map, the pool of keys, API keys, Patroni's records.

    \b
    Example:
      oncepay etcd backup etcd.snapshot
      oncepay etcd restore etcd.snapshot --dry-run
    """


@etcd.command(short_help="Save a snapshot of etcd, and check it.")
@click.argument("file", type=FILE)
@config_option
@dry_run_option
@output_option
@handle_errors
def backup(file: Path, config: str | None, dry_run: bool, output: str) -> None:
    """Save a snapshot of etcd into FILE, with mode 0600: it holds the secrets that etcd holds.

    It is checked before it gets its name.

    \b
    Example:
      oncepay etcd backup etcd-$(date +%F).snapshot
    """
    import msgspec

    from deploy.etcd_snapshot import save

    settings = settings_of(config)
    if dry_run:
        with_etcd(settings, lambda client: client.get("map"))
        click.echo(json.dumps({"file": str(file), "dry_run": True}) if output == "json" else f"etcd would be saved into {file}")
        return
    found = save(settings.etcd, file)
    if output == "json":
        click.echo(json.dumps({"file": str(file), **msgspec.to_builtins(found), "dry_run": False}))
    else:
        click.echo(f"{found.keys:,} keys at revision {found.revision:,}, {found.size_bytes / 2**20:.1f} MiB, in {file}")


@etcd.command(short_help="Make the local cluster's etcd anew from a snapshot.")
@click.argument("file", type=FILE)
@click.option("--yes", is_flag=True, help="Don't ask.")
@dry_run_option
@output_option
@handle_errors
def restore(file: Path, yes: bool, dry_run: bool, output: str) -> None:
    """Make the local cluster's etcd anew from a snapshot. Everything is stopped for it, and started again.

    What a snapshot remembers is old. So all blocks of keys are given up (their keys would be issued twice), nobody is believed
    to lead a shard or to be in its quorum (of each shard the node with the most log leads first), and the shard map is made from
    the shards' own tables, with a newer version. What etcd had before is kept beside it. When it fails or is cut off, call it
    again: until one is over `oncepay up` refuses.

    \b
    Example:
      oncepay etcd restore etcd.snapshot --dry-run
      oncepay etcd restore etcd.snapshot
    """
    import msgspec

    from cli.up import hooks
    from deploy.etcd_snapshot import look
    from deploy.local import Cluster
    from deploy.local.etcd_restore import restore_etcd

    end_on_terminate()
    cluster = Cluster(home())
    plan = cluster.plan
    done: dict[str, Any] = {"file": str(file), **msgspec.to_builtins(look(file)), "dry_run": dry_run}
    if not dry_run:
        if not yes:
            click.confirm("Stop the whole cluster, and replace what etcd has?", abort=True, err=True)
        with reporting(output) as report:

            def prepare(settings: Settings) -> None:
                done.update(with_etcd(settings, lambda client: _forget(client, shards=plan.shards)))

            def settle(settings: Settings) -> None:
                done.update(with_etcd(settings, lambda client: _settle(client, settings, False, report)))

            kept = restore_etcd(cluster, file, prepare=prepare, settle=settle, hooks=hooks(cluster), report=report)
            done["kept"] = str(kept)
    if output == "json":
        click.echo(json.dumps(done))
    elif dry_run:
        click.echo(f"etcd would be made anew from {done['keys']:,} keys at revision {done['revision']:,}")
    else:
        _say_settled(done)
        click.echo(f"{done['retired']} blocks of keys given up; what etcd had is in {done['kept']}")
        _say_old(done)
    if not dry_run:
        _end_with_open_moves(done)


@etcd.command(short_help="After a restore by hand: forget what is old, before anything else starts.")
@config_option
@click.option("--yes", is_flag=True, help="Don't ask.")
@dry_run_option
@output_option
@handle_errors
def forget(config: str | None, yes: bool, dry_run: bool, output: str) -> None:
    """After etcd was restored by hand (`etcdutl snapshot restore`), and while nothing but etcd runs: give up all blocks of keys,
    and forget who leads the shards and who is in their quorums. Refused while the Patroni of any node answers.

    \b
    Example:
      oncepay etcd forget --config /etc/oncepay/oncepay.toml
    """
    settings = settings_of(config)
    with_etcd(settings, lambda client: _check_stopped(client, settings))
    if not yes and not dry_run:
        click.confirm("Are all key services and nodes stopped? Forget who leads, and give up all blocks?", abort=True, err=True)
    done = with_etcd(settings, lambda client: _forget(client, dry_run=dry_run))
    done["dry_run"] = dry_run
    if output == "json":
        click.echo(json.dumps(done))
    else:
        would = "would be " if dry_run else ""
        click.echo(f"{done['retired']} blocks of keys {would}given up; leaders of {', '.join(done['shards'])} {would}forgotten")
        _say_old(done)


@etcd.command(short_help="Make the shard map from the shards' own tables.")
@config_option
@dry_run_option
@output_option
@handle_errors
def settle(config: str | None, dry_run: bool, output: str) -> None:
    """Make the shard map from the shards' own tables, which have the last word. Nothing is written when the two agree.

    \b
    Example:
      oncepay etcd settle --dry-run
    """
    settings = settings_of(config)
    with reporting(output) as report:
        done = with_etcd(settings, lambda client: _settle(client, settings, dry_run, report))
    if config is None and not dry_run:
        from deploy.local import Cluster
        from deploy.local.etcd_restore import is_over

        is_over(Cluster(home()))
    done["dry_run"] = dry_run
    if output == "json":
        click.echo(json.dumps(done))
    else:
        _say_settled(done)
    _end_with_open_moves(done)


async def _check_stopped(client: Etcd, settings: Settings) -> None:
    """Raises StillRunning. Of a quorum that is forgotten while a leader is frozen, one that lacks payments could be elected."""
    from deploy.members import PatroniRest, read, shard_names

    members = [member for shard in await shard_names(client) for member in (await read(client, shard)).members]
    async with PatroniRest(settings.patroni) as rest:
        if alive := await rest.answering(members):
            raise StillRunning(f"Patroni answers of {', '.join(alive)}: stop every node and every key service first")


async def _forget(client: Etcd, *, shards: Sequence[str] | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Blocks of keys, and what Patroni must not believe of an old snapshot. With `shards` no others are left registered."""
    from deploy.etcd_snapshot import FORGOTTEN
    from deploy.members import shard_names
    from keygen import upkeep

    known = await shard_names(client)
    retired = await upkeep.retire_all(client, dry_run=dry_run)
    for shard in known if not dry_run else ():
        if shards is not None and shard not in shards:
            await client.delete(f"shards/{shard}")
        for key in FORGOTTEN:
            await client.delete_prefix(f"patroni/{shard}/{key}")
    apikeys, _ = await client.get_prefix("apikeys/")
    names = sorted(str(json.loads(kv.value).get("name", "")) for kv in apikeys)
    return {"retired": retired, "shards": known, "api_keys": names}


async def _settle(client: Etcd, settings: Settings, dry_run: bool, report: Report) -> dict[str, Any]:
    """Compare the map with the shards' tables, and write a newer one where they differ. Raises NotOneMap, Unsettled."""
    import msgspec

    from cli.shards.grow import open_moves
    from deploy.members import read, shard_names
    from oncepay.ownership import Owned, map_of
    from oncepay.shardmap import MAP_KEY, ShardMap
    from shard.store.facts import owned

    report("reading the shards' tables")
    tables: dict[str, list[Owned]] = {}
    for shard in await shard_names(client):
        try:
            tables[shard] = await owned(*(await read(client, shard)).leading().address, settings.postgres)
        except Unavailable as error:
            raise Unsettled(f"{error}; every shard has to be up for this") from error
    kv = await client.get(MAP_KEY)
    known = msgspec.json.decode(kv.value, type=ShardMap) if kv else None
    made = map_of(tables, known_version=known.version if known else 0)
    newest = max((each.map_version for table in tables.values() for each in table), default=0)
    same = known is not None and known.ranges == made.ranges and known.version >= newest
    if not (same or dry_run):
        report("writing the map")
        if await client.compare_and_put(MAP_KEY, msgspec.json.encode(made), kv.mod_revision if kv else 0) is None:
            raise EtcdUnavailable("somebody else changed the map at the same time: call again")
    version = known.version if same and known else made.version
    return {"map_version": version, "map_changed": not same, "open_moves": await open_moves(client)}


def _say_settled(done: dict[str, Any]) -> None:
    if not done["map_changed"]:
        click.echo(f"the map and the shards' tables agree at version {done['map_version']}")
    else:
        would = "would be" if done["dry_run"] else "is"
        click.echo(f"the map {would} made from the shards' tables, version {done['map_version']}")


def _end_with_open_moves(done: dict[str, Any]) -> None:
    """Exit as something that is wrong when moves are open: their records may be older than what became of them."""
    if done["open_moves"]:
        fail(WRONG, f"these moves are not over: {', '.join(done['open_moves'])}; see `oncepay reshard status`", as_json=False)


def _say_old(done: dict[str, Any]) -> None:
    click.echo(f"API keys as they were then: {', '.join(done['api_keys']) or 'none'}. Those revoked since are valid again: look")
