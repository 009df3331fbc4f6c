"""`oncepay down`: stop the local cluster."""

from __future__ import annotations

import json

import click

from cli.common import handle_errors, home, output_option


@click.command(short_help="Stop the local cluster; its data stays.")
@click.option("--purge", is_flag=True, help="Delete its data too.")
@output_option
@handle_errors
def down(purge: bool, output: str) -> None:
    """Stop the local cluster. Its data stays, unless --purge is given.

    \b
    Example:
      oncepay down
      oncepay down --purge
    """
    from deploy.local import Cluster

    cluster = Cluster(home())
    was_running = cluster.down(purge=purge)
    if output == "json":
        click.echo(json.dumps({"ok": True, "was_running": was_running, "purged": purge}))
        return
    click.echo("The cluster is stopped." if was_running else f"No cluster was running in {cluster.home}.")
    if purge:
        click.echo(f"{cluster.home} is deleted.")
