"""`oncepay shards add | remove`: shards of the local cluster come and go while it runs."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import click

from cli.common import handle_errors, home, output_option
from cli.deployment import dry_run_option, end_on_terminate, reporting, shard_argument, with_etcd
from oncepay.errors import OncepayError, Unavailable

if TYPE_CHECKING:
    from deploy.local import Cluster
    from deploy.local.bring_up import Progress
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings

FEED_S = 30.0
LOOK_S = 0.5
OVER = frozenset({"finished", "rolled_back", "aborted"})
"""States in which a move is over."""


class StillNeeded(OncepayError):
    """The shard is still needed."""

    status = 409
    slug = "shard-needed"


@click.command(short_help="Add an empty shard to the local cluster.")
@shard_argument
@dry_run_option
@output_option
@handle_errors
def add(shard: str, dry_run: bool, output: str) -> None:
    """Add an empty shard of three nodes to the running local cluster. It owns no slots until a range is moved to it.

    \b
    Example:
      oncepay shards add s2
      oncepay reshard plan --split s0
    """
    from cli.up import hooks
    from deploy.local import Cluster

    end_on_terminate()
    cluster = Cluster(home())
    began_s = time.monotonic()
    with reporting(output) as report:

        def on_progress(progress: Progress) -> None:
            report(f"waiting for {', '.join(progress.left)}" if progress.left else "settling")

        if dry_run:
            cluster.check_addition(shard)
        else:
            report(f"starting {shard}")
            cluster.add_shard(shard, hooks=hooks(cluster), on_progress=on_progress)
    seconds = round(time.monotonic() - began_s, 1)
    if output == "json":
        click.echo(json.dumps({"shard": shard, "seconds": seconds, "dry_run": dry_run}))
    else:
        click.echo(f"{shard} would be added" if dry_run else f"{shard} is ready after {seconds:.1f} s, and owns nothing yet")


@click.command(short_help="Remove a shard that owns nothing from the local cluster.")
@shard_argument
@click.option("--dead", is_flag=True, help="Its nodes are lost: don't ask its database, believe the shard map.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@dry_run_option
@output_option
@handle_errors
def remove(shard: str, dead: bool, yes: bool, dry_run: bool, output: str) -> None:
    """Remove a shard from the running local cluster, and delete its nodes' data. Its backups stay.

    It is refused while the shard owns a range or takes part in a move, and before the aggregator has all of its changes.

    \b
    Example:
      oncepay reshard plan --empty s2
      oncepay shards remove s2
    """
    from deploy.local import Cluster

    end_on_terminate()
    cluster = Cluster(home())
    settings = cluster.settings
    cluster.supervisor()  # raises when the cluster doesn't run

    def check() -> None:
        with_etcd(settings, lambda etcd: check_removal(etcd, settings, cluster, shard, dead=dead))

    with reporting(output) as report:
        report(f"looking whether {shard} is needed")
        check()
    if not dry_run:
        if not yes:
            click.confirm(f"Delete shard {shard} with all of its data?", abort=True, err=True)
        with reporting(output) as report:
            report(f"removing {shard}")
            cluster.remove_shard(shard, check)  # again: the question may have stood for long
    if output == "json":
        click.echo(json.dumps({"shard": shard, "removed": not dry_run, "dry_run": dry_run}))
    else:
        click.echo(f"{shard} {'would be' if dry_run else 'is'} removed")


async def check_removal(etcd: Etcd, settings: Settings, cluster: Cluster, shard: str, *, dead: bool) -> None:
    """Raises StillNeeded, naming what holds the shard; ShardUnavailable when it can't be asked."""
    from deploy.members import read
    from oncepay.shardmap import read_map
    from shard.store.facts import facts

    cluster.check_shard(shard)
    known = await read_map(etcd)
    if known is None:
        raise StillNeeded("etcd has no shard map, so nobody knows what the shard owns")
    if mapped := [(item.first, item.last) for item in known.ranges if item.shard == shard]:
        raise StillNeeded(
            f"the map gives {shard} the slots {_text(mapped)}: move them first (`oncepay reshard plan --empty {shard}`)"
        )
    moves, _ = await etcd.get_prefix("moves/")
    without = f", with --lost {shard}" if dead else ""
    for kv in moves:
        if (move := named_in(kv.value, shard)) is not None:
            raise StillNeeded(
                f"move {kv.key.rpartition('/')[2]} of {shard} is in state {move}: finish or abort it first{without}"
            )
    if dead:
        return
    try:
        told = await facts(*(await read(etcd, shard)).leading().address, settings.postgres)
    except Unavailable as error:
        raise type(error)(f"{error}; if its nodes are lost for good, use --dead") from error
    if told.ranges:
        raise StillNeeded(f"{shard}'s own table gives it the slots {_text(told.ranges)}, the map doesn't: see `oncepay doctor`")
    if shard not in cluster.restored():
        await _feed_drained(etcd, settings, shard, told.flushed)


async def _feed_drained(etcd: Etcd, settings: Settings, shard: str, position: int) -> None:
    """Until the aggregator has all changes up to `position`; what it doesn't have goes with the shard. Raises StillNeeded."""
    from deploy.members import read
    from deploy.patroni import FEED_SLOT
    from shard.store.facts import facts

    deadline_s = time.monotonic() + FEED_S
    while True:
        told = await facts(*(await read(etcd, shard)).leading().address, settings.postgres)
        confirmed = next((slot.confirmed for slot in told.slots if slot.slot == FEED_SLOT), None)
        if confirmed is not None and confirmed >= position:
            return
        if time.monotonic() > deadline_s:
            raise StillNeeded(
                f"the aggregator doesn't have all changes of {shard}: is worker-{shard}-1 at work? (runbook feed-lag)"
            )
        await asyncio.sleep(LOOK_S)


async def open_moves(etcd: Etcd) -> list[str]:
    """The ids of the moves that aren't over."""
    moves, _ = await etcd.get_prefix("moves/")
    return [kv.key.rpartition("/")[2] for kv in moves if json.loads(kv.value).get("state") not in OVER]


def named_in(record: bytes, shard: str) -> str | None:
    """The state of a move that names the shard and isn't over; None for another one."""
    try:
        move: Any = json.loads(record)
    except ValueError:
        return None
    if not isinstance(move, dict) or shard not in [value for value in move.values() if isinstance(value, str)]:
        return None
    state = str(move.get("state", "unknown"))
    return None if state in OVER else state


def _text(ranges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{first}–{last}" for first, last in ranges)
