"""`oncepay shards backup | backups | restore`: base backups with the log, and a shard made out of them."""

from __future__ import annotations

import datetime as dt
import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, handle_errors, home, output_option
from cli.deployment import (
    Report,
    config_option,
    dry_run_option,
    end_on_terminate,
    reporting,
    settings_of,
    shard_argument,
    with_etcd,
)
from oncepay.errors import NotFound, ShardUnavailable

if TYPE_CHECKING:
    from deploy.backup import Backup, BackupFolder, Source
    from deploy.local import Cluster
    from deploy.local.bring_up import Progress
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings

RESTORE_S = 24 * 3600.0
"""A bound for a restore that hangs; a big shard takes hours."""

folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the shard's backups are. By default ONCEPAY_HOME/backups/SHARD, into which its nodes archive their log.",
)


@click.command(short_help="Make a base backup of a shard, and verify it.")
@shard_argument
@folder_option
@click.option(
    "--keep", type=click.IntRange(1), metavar="N", help="Delete older ones than the newest N, with the log only they need."
)
@click.option("--log-only", is_flag=True, help="Only archive the log up to now.")
@config_option
@dry_run_option
@output_option
@handle_errors
def backup(
    shard: str, folder: Path | None, keep: int | None, log_only: bool, config: str | None, dry_run: bool, output: str
) -> None:
    """Make a base backup of a shard while it works, from a standby where there is one; verify every file of it, and the log.

    The first backup makes the archive's folder. From then on all nodes archive the shard's log there, and the shard can be
    restored to any moment after the backup's end. Exit code 1 where the shard archives no log: then it is the base backup alone.

    \b
    Example:
      oncepay shards backup s0
      oncepay shards backup s0 --keep 7 --output json
    """
    end_on_terminate()
    settings = settings_of(config)
    began_s = time.monotonic()
    with reporting(output) as report:
        local = config is None and folder is None
        done = _backup(settings, shard, _folder(shard, folder), keep, log_only, dry_run, report, local=local)
    done["seconds"] = round(time.monotonic() - began_s, 2)
    if output == "json":
        click.echo(json.dumps(done))
    elif dry_run:
        click.echo(f"{done['node']} would be copied into {done['folder']}")
    elif log_only:
        click.echo(f"the log is archived up to segment {done['archived_to']}")
    else:
        size = done["backup"]["size_bytes"] / 2**20
        click.echo(f"backup {done['backup']['id']} of {done['node']}, {size:,.1f} MiB, verified, in {done['seconds']:.1f} s")
    if not dry_run and done["archived_to"] is None:
        if output == "text":
            click.echo(f"{shard} doesn't archive its log (archive_mode is off): nothing after this can be restored", err=True)
        raise SystemExit(WRONG)


@click.command(short_help="The backups of a shard.")
@shard_argument
@folder_option
@output_option
@handle_errors
def backups(shard: str, folder: Path | None, output: str) -> None:
    """The backups of a shard, oldest first, how far its log is archived, and what is missing of it.

    \b
    Example:
      oncepay shards backups s0
    """
    import msgspec

    from deploy.backup import spoken

    place = _folder(shard, folder)
    known, archived = place.all(), place.archived()
    missing = place.missing(known[0]) if known else []
    if output == "json":
        told = {"archived": len(archived), "archived_to": archived[-1:], "missing": missing}
        click.echo(json.dumps({"backups": msgspec.to_builtins(known), **told}))
        return
    for each in known:
        size = f"{each.size_bytes / 2**20:>9,.1f} MiB"
        click.echo(f"{each.id}  {size}  of {each.node}, timeline {each.timeline}, from {each.first_segment}")
    click.echo(f"{len(known)} backups, {len(archived)} segments of the log{f', up to {archived[-1]}' if archived else ''}")
    if missing:
        click.echo(f"MISSING from the log: {spoken(missing)}. What came after can be restored from a later backup only")


@click.command(short_help="Make a new shard out of a backup.")
@shard_argument
@click.option("--as", "name", required=True, metavar="NAME", help="The new shard's name.")
@click.option(
    "--to-time", help="The moment to restore to (ISO 8601, UTC unless it says otherwise). By default as far as the log goes."
)
@click.option(
    "--backup", "backup_id", default="", metavar="ID", help="The backup to begin with. By default the newest before --to-time."
)
@folder_option
@dry_run_option
@output_option
@handle_errors
def restore(shard: str, name: str, to_time: str | None, backup_id: str, folder: Path | None, dry_run: bool, output: str) -> None:
    """Make a new shard of the local cluster out of a backup of SHARD and the log, as it was at a moment.

    The new shard is a new incarnation: it owns no slots, no worker works for it, and SHARD itself is left alone. Compare it
    with Stripe and with the shards that own the slots now: `oncepay shards compare NAME`.

    \b
    Example:
      oncepay shards restore s0 --as s9 --to-time 2026-11-25T12:00:00Z --dry-run
      oncepay shards restore s0 --as s9 --to-time 2026-11-25T12:00:00Z
      oncepay shards compare s9
    """
    from deploy.local import Cluster

    end_on_terminate()
    moment = parse_time(to_time) if to_time else None
    cluster = Cluster(home())
    cluster.check_addition(name)
    place = _folder(shard, folder)
    place.check(shard)
    chosen = place.choose(id=backup_id, to_time=moment)
    if moment is None:
        place.check_log(chosen)  # a moment that can't be reached is refused by Postgres, the log's end is any end
    done: dict[str, Any] = {
        "shard": name,
        "of": shard,
        "backup": chosen.id,
        "to_time": moment.isoformat() if moment else None,
        "incarnation": uuid.uuid4().hex,
        "dry_run": dry_run,
    }
    began_s = time.monotonic()
    if not dry_run:
        with reporting(output) as report:
            _archive_what_is_left(cluster, shard, place, None if moment else chosen, report)
            _restore(cluster, place, chosen, done, report)
    done["seconds"] = round(time.monotonic() - began_s, 1)
    if output == "json":
        click.echo(json.dumps(done))
        return
    when = f"as it was at {done['to_time']}" if moment else "as far as its log goes"
    click.echo(f"{name} {'would be' if dry_run else 'is'} {shard} {when}, from backup {chosen.id}; it owns nothing")
    if not dry_run:
        click.echo(f"next: oncepay shards compare {name}")


def parse_time(text: str) -> dt.datetime:
    """ISO 8601; UTC unless it says otherwise. Raises click.UsageError."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(f"--to-time {text!r} is no time as in 2026-11-25T12:00:00Z") from None
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def _folder(shard: str, folder: Path | None) -> BackupFolder:
    from deploy.backup import BackupFolder
    from deploy.local.layout import Layout

    return BackupFolder(folder.resolve() if folder is not None else Layout(home().resolve()).backups(shard))


def _backup(
    settings: Settings,
    shard: str,
    place: BackupFolder,
    keep: int | None,
    log_only: bool,
    dry_run: bool,
    report: Report,
    *,
    local: bool,
) -> dict[str, Any]:
    """With `local` the nodes of the local cluster archive into that folder, as whom they run."""
    import msgspec

    from deploy import os_user
    from deploy.backup import take
    from deploy.programs import postgres_bin

    report(f"looking at {shard}")
    source, archives = with_etcd(settings, lambda etcd: _source(etcd, settings, shard))
    place.check(source.shard)
    done: dict[str, Any] = {"shard": shard, "node": source.node, "folder": str(place.folder), "dry_run": dry_run}
    if dry_run:
        return done
    done["archived_to"] = None
    since = place.choose() if log_only else next(reversed(place.all()), None)
    if not log_only:
        place.make(os_user.for_postgres() if local else None)
        taken = take(place, source, settings.postgres.backup_password, postgres_bin(), report)
        done["backup"] = msgspec.to_builtins(taken)
        since = since or taken
    if archives:
        report("archiving the log")
        done["archived_to"] = with_etcd(settings, lambda etcd: archive_to_now(etcd, settings, shard, place, since))
    elif log_only:
        raise NotFound(f"the nodes of {shard} don't archive their log (archive_mode is off)")
    done["dropped"] = []
    if keep and not log_only:
        place.check(source.shard)  # another shard's may have come meanwhile
        done["dropped"] = place.drop_older(keep)
    return done


async def _source(etcd: Etcd, settings: Settings, shard: str) -> tuple[Source, bool]:
    """What is backed up, from a standby where one streams; and whether the shard archives its log."""
    from deploy.backup import Source
    from deploy.members import read
    from shard.store.facts import facts

    members = await read(etcd, shard)
    if not members.members:
        raise NotFound(f"there is no shard {shard}, or none of its nodes is in touch with etcd")
    leader = members.leading()
    told = await facts(*leader.address, settings.postgres)
    node = next((member for member in members.standbys() if member.streams), leader)
    host, port = node.address
    source = Source(told.shard, told.incarnation, told.migration, told.ranges, node.name, host, port)
    return source, told.archive.mode != "off"


async def archive_to_now(etcd: Etcd, settings: Settings, shard: str, place: BackupFolder, since: Backup | None) -> str:
    """Have the log archived up to now, all of it `since` that backup; the last segment's name.

    Raises ShardUnavailable, BackupFailed, LogMissing.
    """
    from deploy.backup import await_archived
    from deploy.members import read
    from shard.store.facts import facts

    segment = await switch_log(etcd, settings, shard)

    async def trouble() -> str:
        leader = (await read(etcd, shard)).leading()
        return (await facts(*leader.address, settings.postgres)).archive.trouble(segment)

    await await_archived(place, segment, trouble, since)
    return segment


async def switch_log(etcd: Etcd, settings: Settings, shard: str) -> str:
    """End the segment that the leader writes; the name of the one that was ended. Raises ShardUnavailable.

    A commit comes first, so that the log reaches to now.
    """
    import asyncpg

    from deploy.members import read

    host, port = (await read(etcd, shard)).leading().address
    postgres = settings.postgres
    try:
        connection = await asyncpg.connect(
            host=host, port=port, user="oncepay_backup", password=postgres.backup_password, database=postgres.database, timeout=10
        )
        try:
            await connection.execute("select pg_logical_emit_message(true, 'oncepay-backup', '')")
            return str(await connection.fetchval("select pg_walfile_name(pg_switch_wal())"))
        finally:
            connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ShardUnavailable(f"the leader of {shard} can't end a segment of its log: {error!r}") from error


def _archive_what_is_left(cluster: Cluster, shard: str, place: BackupFolder, since: Backup | None, report: Report) -> None:
    """While the shard lives, its log up to now, all of it `since` that backup; without it the archive ends where it ends."""
    if not cluster.is_running() or not place.wal.is_dir():
        return
    settings = cluster.settings
    report(f"archiving what {shard} has not archived yet")
    try:
        with_etcd(settings, lambda etcd: archive_to_now(etcd, settings, shard, place, since))
    except ShardUnavailable as error:
        report(f"{shard} can't be asked, so the archive is all there is ({error})")


def _restore(cluster: Cluster, place: BackupFolder, chosen: Backup, done: dict[str, Any], report: Report) -> None:
    from cli.up import hooks
    from deploy.programs import postgres_bin
    from shard.store.restored import statements

    postgres = cluster.settings.postgres
    plan = {
        "backup": str(place.data(chosen)),
        "archive": str(place.wal),
        "to_time": done["to_time"] or "",
        "sql": statements(done["shard"], done["incarnation"]),
        "database": postgres.database,
        "user": postgres.superuser,
        "bin_dir": str(postgres_bin()),
    }

    def on_progress(progress: Progress) -> None:
        report(f"waiting for {', '.join(progress.left)}" if progress.left else "settling")

    report(f"recovering {done['shard']} from {chosen.id}")
    cluster.add_shard(done["shard"], hooks=hooks(cluster), on_progress=on_progress, timeout_s=RESTORE_S, restore=plan)
