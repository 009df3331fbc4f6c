"""`oncepay shards accept`: a restored shard takes the place of the one that was lost."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from cli.common import handle_errors, home, output_option
from cli.deployment import Report, dry_run_option, end_on_terminate, reporting, shard_argument, with_etcd
from cli.shards.backups import parse_time
from cli.shards.compare import beside_providers, reader_session
from cli.shards.grow import StillNeeded, named_in
from oncepay.errors import EtcdUnavailable, NotFound, OncepayError, ShardUnavailable, WrongState

if TYPE_CHECKING:
    import datetime as dt

    import asyncpg

    from deploy.local.bring_up import Progress
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings
    from oncepay.shardmap import ShardMap

Ranges = list[tuple[int, int]]


@click.command(short_help="Let a restored shard take the place of the one that was lost.")
@shard_argument
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--since", help="Compare with what Stripe made since then (ISO 8601). By default with all.")
@dry_run_option
@output_option
@handle_errors
def accept(shard: str, yes: bool, since: str | None, dry_run: bool, output: str) -> None:
    """Give a restored shard the slots of the shard that it was, whose nodes are lost for good, and let its workers begin.

    It is refused while any node of the lost shard is in touch with etcd. Compare it first (`oncepay shards compare NAME`): what
    it doesn't have was acknowledged and is lost. Remove the lost shard afterwards, so that its nodes never come back.

    Payout runs are held from then on. When the shard works it is compared with Stripe and Tipalti: if they know no more than it,
    runs are free again, else they wait for `oncepay payouts release NAME`.

    \b
    Example:
      oncepay shards compare s9
      oncepay shards accept s9 --dry-run
      oncepay shards accept s9
      oncepay shards remove s0 --dead
    """
    from deploy.local import Cluster

    end_on_terminate()
    moment = parse_time(since) if since else None
    cluster = Cluster(home())
    cluster.check_shard(shard)
    settings = cluster.settings
    with reporting(output) as report:
        done = with_etcd(settings, lambda etcd: _take_over(etcd, settings, shard, True, report))
    done["dry_run"] = dry_run
    if not dry_run:
        if not yes:
            text = ", ".join(f"{first}–{last}" for first, last in done["ranges"])
            click.confirm(f"Are the nodes of {done['of']} lost for good? Give its slots {text} to {shard}?", abort=True, err=True)
        with reporting(output) as report:

            def on_progress(progress: Progress) -> None:
                report(f"waiting for {', '.join(progress.left)}" if progress.left else "settling")

            until_s = time.time()
            done.update(with_etcd(settings, lambda etcd: _take_over(etcd, settings, shard, False, report)))
            report(f"starting the workers of {shard}")
            cluster.accept_shard(shard, on_progress=on_progress)
            done.update(with_etcd(settings, lambda etcd: checked(etcd, settings, shard, moment, until_s, report)))
    if output == "json":
        click.echo(json.dumps(done))
    else:
        takes = "would take" if dry_run else "has taken"
        click.echo(f"{shard} {takes} the place of {done['of']} in version {done['map_version']} of the map")
        if done.get("payouts_held"):
            click.echo(f"payout runs are held: {done['payouts_held']}")
            click.echo(f"first: oncepay shards compare {shard}; oncepay shards adopt {shard}")
        click.echo(f"next: oncepay shards resnapshot {shard}; oncepay shards remove {done['of']} --dead; oncepay verify")
        if done.get("payouts_held"):
            click.echo(f"when all of the list was worked off: oncepay payouts release {shard}")


async def checked(
    etcd: Etcd, settings: Settings, shard: str, since: dt.datetime | None, until_s: float, report: Report
) -> dict[str, Any]:
    """What Stripe and Tipalti know beyond the shard; runs are held unless that is nothing. `payouts_held` is why they are."""
    from oncepay.payout_hold import hold, release
    from shard.store.restored import origin

    lacks: dict[str, Any] = {}
    try:
        connection = await reader_session(etcd, settings, shard)
        try:
            was = await origin(connection)
            assert was is not None
            lacks = await beside_providers(connection, settings, was, since, report, until_s)
        finally:
            connection.terminate()
    except OncepayError as error:
        why = f"{shard} couldn't be compared with Stripe and Tipalti: {error}"
    else:
        why = "" if lacks["ok"] else said(lacks)
    if why:
        await hold(etcd, shard, why)
    else:
        await release(etcd, shard)
    return {"payouts_held": why or None, "lacks": lacks or None}


def said(lacks: dict[str, Any]) -> str:
    """How much of what the shard doesn't have."""
    stripe, tipalti = lacks["stripe"], lacks["tipalti"]
    kinds = {"payments": stripe, "refunds": stripe["refunds"], "disputes": stripe["disputes"]}
    parts = [f"{of['missing']:,} {name} are missing" for name, of in kinds.items() if of["missing"]]
    parts += [f"of {of['behind']:,} {name} Stripe knows more" for name, of in kinds.items() if of["behind"]]
    parts += [f"{tipalti['missing']:,} payouts are missing"] if tipalti["missing"] else []
    parts += [f"{tipalti['left_out']:,} sellers' payouts weren't asked for"] if tipalti["left_out"] else []
    return ", ".join(parts)


async def _take_over(etcd: Etcd, settings: Settings, shard: str, dry_run: bool, report: Report) -> dict[str, Any]:
    """First the shard's own table, which has the last word, then the map; cut off in between it may be called again."""
    import msgspec

    from oncepay.etcd import Put, mod_revision_is
    from oncepay.payout_hold import hold
    from oncepay.shardmap import MAP_KEY, SHARDS_PREFIX, Range, ShardMap, is_removing
    from shard.store.restored import origin

    report(f"looking at {shard}")
    connection = await _superuser(etcd, settings, shard)
    try:
        was = await origin(connection)
        if was is None:
            raise WrongState(f"{shard} was not made from a backup")
        kv = await etcd.get(MAP_KEY)
        record = await etcd.get(SHARDS_PREFIX + shard)
        if record is None or is_removing(record.value):
            raise WrongState(f"{shard} is being removed")
        if kv is None:
            raise WrongState("etcd has no shard map: `oncepay etcd settle`")
        known = msgspec.json.decode(kv.value, type=ShardMap)
        rows = await connection.fetch("select first, last from oncepay.ranges order by first")
        owned = [(row["first"], row["last"]) for row in rows]
        if owned and not any(item.shard == was.of_shard for item in known.ranges):
            return {"shard": shard, "of": was.of_shard, "ranges": owned, "map_version": known.version}  # only workers are missing
        ranges = await _check(etcd, known, was.of_shard, was.ranges)
        if owned and owned != ranges:
            raise WrongState(f"{shard} owns {owned} already, and {was.of_shard} has {ranges} in the map: see `oncepay doctor`")
        version = known.version + 1
        if not dry_run:
            await hold(etcd, shard, "it took a lost shard's place, and wasn't compared with Stripe and Tipalti since")
            report(f"giving {shard} its slots")
            if not owned:
                await _own(connection, ranges, version)
            taken = tuple(
                Range(item.first, item.last, shard if item.shard == was.of_shard else item.shard) for item in known.ranges
            )
            made = msgspec.json.encode(ShardMap(version, taken))
            unchanged = [mod_revision_is(MAP_KEY, kv.mod_revision), mod_revision_is(record.key, record.mod_revision)]
            if not (await etcd.txn(unchanged, [Put(MAP_KEY, made)])).succeeded:
                raise EtcdUnavailable("somebody else changed the map or the shard at the same time: call again")
    finally:
        connection.terminate()
    return {"shard": shard, "of": was.of_shard, "ranges": ranges, "map_version": version}


async def _check(etcd: Etcd, known: ShardMap, lost: str, had: Ranges) -> Ranges:
    """The ranges that the map gives the lost shard. Raises WrongState, StillNeeded."""
    from deploy.members import read
    from oncepay.shardmap import merged

    ranges = [(item.first, item.last) for item in known.ranges if item.shard == lost]
    if not ranges:
        raise WrongState(f"the map gives {lost} nothing: there is no place to take")
    whole = merged(had)
    if beyond := [part for part in ranges if not any(first <= part[0] and part[1] <= last for first, last in whole)]:
        raise WrongState(f"{lost} got the slots {beyond} only after the moment that was restored: their rows are not there")
    alive = await read(etcd, lost)
    if alive.leader is not None or alive.members:
        names = ", ".join(member.name for member in alive.members) or alive.leader
        raise StillNeeded(f"{names} of {lost} is in touch with etcd: only a shard whose nodes are lost can be replaced")
    moves, _ = await etcd.get_prefix("moves/")
    for kv in moves:
        if (state := named_in(kv.value, lost)) is not None:
            raise StillNeeded(f"move {kv.key.rpartition('/')[2]} of {lost} is in state {state}: end it first, with --lost {lost}")
    return ranges


async def _own(connection: asyncpg.Connection, ranges: Ranges, version: int) -> None:
    """In one transaction, which waits for the shard's quorum."""
    rows = [(first, last, version) for first, last in ranges]
    async with connection.transaction():
        await connection.executemany("insert into oncepay.ranges (first, last, map_version) values ($1, $2, $3)", rows)


async def _superuser(etcd: Etcd, settings: Settings, shard: str) -> asyncpg.Connection:
    import asyncpg

    from deploy.members import read

    members = await read(etcd, shard)
    if not members.members:
        raise NotFound(f"no node of shard {shard} is in touch with etcd")
    host, port = members.leading().address
    postgres = settings.postgres
    try:
        return await asyncpg.connect(
            host=host,
            port=port,
            user=postgres.superuser,
            password=postgres.superuser_password,
            database=postgres.database,
            timeout=10,
        )
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ShardUnavailable(f"the leader of {shard} can't be asked: {error!r}") from error
