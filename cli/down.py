"""`oncepay down`: stop the local cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from cli.common import handle_errors, home, output_option
from cli.deployment import dry_run_option

if TYPE_CHECKING:
    from deploy.local import Cluster


@click.command(short_help="Stop the local cluster; its data stays.")
@click.option("--purge", is_flag=True, help="Delete its data too.")
@dry_run_option
@output_option
@handle_errors
def down(purge: bool, dry_run: bool, output: str) -> None:
    """Stop the local cluster. Its data stays, unless --purge is given.

    --purge also stops the clusters in sub-folders of ONCEPAY_HOME, as those of `demo` and of campaigns, and deletes their data
    and reports. Nothing else that lies there is touched.

    \b
    Example:
      oncepay down
      oncepay down --purge --dry-run
      oncepay down --purge
    """
    from deploy.local import Cluster

    cluster = Cluster(home())
    if dry_run:
        say_what_would_end(cluster, purge=purge, output=output)
        return
    was_running = cluster.down(purge=purge)
    left = [str(cluster.home / name) for name in cluster.layout.names()] if purge else []
    if output == "json":
        click.echo(json.dumps({"ok": True, "was_running": was_running, "purged": purge, **({"left": left} if purge else {})}))
        return
    click.echo("The cluster is stopped." if was_running else f"No cluster was running in {cluster.home}.")
    if left:
        click.echo(f"Its data is deleted. These aren't a cluster's, and were left: {', '.join(left)}")
    elif purge:
        click.echo(f"{cluster.home} is deleted.")


def say_what_would_end(cluster: Cluster, *, purge: bool, output: str) -> None:
    """What `down` would stop and delete."""
    found = cluster.would_end(purge=purge)
    if output == "json":
        click.echo(json.dumps({"ok": True, "dry_run": True, "purge": purge, **found.as_json()}))
        return
    names = sorted({f"{each.name} in {each.home}" for each in found.stops})
    for what, each in (("would be stopped", names), ("would be deleted", found.deletes), ("would be left", found.left)):
        if each:
            click.echo(f"These {what}:")
        for one in each:
            click.echo(f"  {one}")
    if not found.stops:
        click.echo(f"Nothing runs in {cluster.home}.")
