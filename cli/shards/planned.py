"""`oncepay shards switchover | restart | migrate`: planned work on running shards."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from cli.common import handle_errors, output_option
from cli.deployment import Report, config_option, dry_run_option, reporting, settings_of, shard_argument, with_etcd
from oncepay.errors import NotFound

if TYPE_CHECKING:
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings


@click.command(short_help="Hand a shard's lead over to a standby.")
@shard_argument
@click.option("--to", default="", metavar="NODE", help="The standby that shall lead. By default the one that is furthest.")
@config_option
@dry_run_option
@output_option
@handle_errors
def switchover(shard: str, to: str, config: str | None, dry_run: bool, output: str) -> None:
    """Hand a shard's lead over to a standby. Clients see a slower answer, no error.

    \b
    Example:
      oncepay shards switchover s0 --dry-run
      oncepay shards switchover s0 --to s0-2
    """
    settings = settings_of(config)

    async def work(etcd: Etcd) -> dict[str, Any]:
        from deploy.members import PatroniRest
        from deploy.planned import Planned

        async with PatroniRest(settings.patroni) as rest:
            planned = Planned(etcd, settings, rest, shard, report)
            step = await planned.plan_switchover(to)
            report(step.text())
            seconds = 0.0 if dry_run else await planned.switchover(step.other)
            return {"shard": shard, "from": step.node, "to": step.other, "seconds": round(seconds, 2), "dry_run": dry_run}

    with reporting(output) as report:
        done = with_etcd(settings, work)
    if output == "json":
        click.echo(json.dumps(done))
    elif dry_run:
        click.echo(f"{done['from']} would hand over to {done['to']}")
    else:
        click.echo(f"{done['to']} leads, and acknowledged a commit after {done['seconds']:.1f} s")


@click.command(short_help="Restart the Postgres of a shard's nodes, one after the other.")
@shard_argument
@config_option
@dry_run_option
@output_option
@handle_errors
def restart(shard: str, config: str | None, dry_run: bool, output: str) -> None:
    """Restart the Postgres of a shard's nodes, one after the other, while the shard takes payments.

    A standby restarts only when the other one has flushed all that the leader has; the leader hands over and restarts last.
    When it stops half-way, call it again.

    \b
    Example:
      oncepay shards restart s0 --dry-run
      oncepay shards restart s0
    """
    settings = settings_of(config)

    async def work(etcd: Etcd) -> dict[str, Any]:
        from deploy.members import PatroniRest
        from deploy.planned import Planned

        async with PatroniRest(settings.patroni) as rest:
            planned = Planned(etcd, settings, rest, shard, report)
            steps = await planned.plan_restart()
            began_s = time.monotonic()
            if not dry_run:
                await planned.restart(steps)
            seconds = round(time.monotonic() - began_s, 2)
            return {"shard": shard, "steps": [step.text() for step in steps], "seconds": seconds, "dry_run": dry_run}

    with reporting(output) as report:
        done = with_etcd(settings, work)
    if output == "json":
        click.echo(json.dumps(done))
    elif dry_run:
        click.echo("\n".join(f"{n}. {text}" for n, text in enumerate(done["steps"], 1)))
    else:
        click.echo(f"all nodes of {shard} restarted in {done['seconds']:.1f} s")


@click.command(short_help="Bring the shards' schemas up to date.")
@click.argument("shards", nargs=-1, metavar="[SHARD]...")
@config_option
@dry_run_option
@output_option
@handle_errors
def migrate(shards: tuple[str, ...], config: str | None, dry_run: bool, output: str) -> None:
    """Bring the schemas of all shards (or of those named) up to date, one after the other, while they take payments.

    Each migration is a transaction of its own, so a run that was cut off is taken up by the next one.

    \b
    Example:
      oncepay shards migrate --dry-run
      oncepay shards migrate
    """
    settings = settings_of(config)
    with reporting(output) as report:
        done = with_etcd(settings, lambda etcd: _migrate(etcd, settings, shards, dry_run, report))
    if output == "json":
        click.echo(json.dumps({"shards": done, "dry_run": dry_run}))
        return
    would = "would be " if dry_run else ""
    for item in done:
        names = ", ".join(item["migrations"])
        click.echo(f"{item['shard']}: {f'{would}applied: {names}' if names else 'up to date'}")


async def _migrate(
    etcd: Etcd, settings: Settings, wanted: tuple[str, ...], dry_run: bool, report: Report
) -> list[dict[str, Any]]:
    from deploy.members import read, shard_names
    from oncepay.shardmap import read_map

    names = await shard_names(etcd)
    known = await read_map(etcd)
    if unknown := sorted(set(wanted) - set(names)):
        raise NotFound(f"there is no shard {', '.join(unknown)}: there are {', '.join(names) or 'none'}")
    leaders = {name: (await read(etcd, name)).leading().address for name in names if name in wanted or not wanted}
    done = []
    for name, address in leaders.items():
        report(f"{'looking at' if dry_run else 'migrating'} {name}")
        # A fresh shard gets what the first map gives it; what came later, moves have given.
        first = known.ranges if known is not None and known.version == 1 else ()
        ranges = [(item.first, item.last) for item in first if item.shard == name]
        done.append({"shard": name, "migrations": await _migrate_one(settings, name, address, ranges, dry_run)})
    return done


async def _migrate_one(
    settings: Settings, shard: str, address: tuple[str, int], ranges: list[tuple[int, int]], dry_run: bool
) -> list[str]:
    """As superuser on the shard's leader."""
    from urllib.parse import quote

    import asyncpg

    from oncepay.errors import ShardUnavailable
    from shard.store import migrate as schema

    postgres = settings.postgres
    login = f"{quote(postgres.superuser, safe='')}:{quote(postgres.superuser_password, safe='')}"
    dsn = f"postgresql://{login}@{address[0]}:{address[1]}/{postgres.database}"
    try:
        if dry_run:
            connection = await asyncpg.connect(dsn)
            try:
                return await schema.pending(connection)
            finally:
                await connection.close()
        return await schema.migrate(dsn, shard=shard, ranges=ranges, passwords=schema.passwords_of(postgres))
    except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as error:
        raise ShardUnavailable(f"shard {shard} can't be migrated: {error!r}; call again") from error
