"""`oncepay status`: what runs, where, and how well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.common import handle_errors, home, output_option

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.local import Status


@click.command(short_help="Show what runs, where, and how well.")
@output_option
@handle_errors
def status(output: str) -> None:
    """Show the processes, the shards with their leaders and lags, and the shard map.

    \b
    Example:
      oncepay status
      oncepay status --output json
    """
    from deploy.local import Cluster
    from deploy.local.status import render

    found = Cluster(home()).status()
    if output == "json":
        click.echo(render(found), nl=False)
        return
    from rich.console import Console

    console = Console(highlight=False)
    if found.stopping:
        console.print("The cluster is being stopped.")
    console.print(process_table(found))
    if found.shards:
        console.print(node_table(found))
        console.print(map_table(found))


def yes(healthy: bool) -> str:
    return "[green]yes[/green]" if healthy else "[red]no[/red]"


def process_table(found: Status) -> Table:
    from rich.table import Table

    table = Table("process", "pid", "port", "healthy", title="Processes", title_justify="left")
    for process in found.processes:
        table.add_row(process.name, str(process.pid or "—"), str(process.port or ""), yes(process.healthy))
    return table


def node_table(found: Status) -> Table:
    from rich.table import Table

    table = Table("shard", "node", "role", "lag (bytes)", "port", "Postgres", "Patroni", title="Nodes", title_justify="left")
    for shard in found.shards:
        for node in shard.nodes:
            role = f"[bold]{node.role}[/bold]" if node.name == shard.leader else node.role
            lag = "—" if node.lag_bytes is None else f"{node.lag_bytes:,}"
            pids = (str(pid or "—") for pid in (node.pid, node.patroni_pid))
            table.add_row(shard.name, node.name, role, lag, str(node.port), *pids)
    return table


def map_table(found: Status) -> Table:
    from rich.table import Table

    table = Table("first slot", "last slot", "shard", title="Shard map", title_justify="left")
    rows = sorted((first, last, shard.name) for shard in found.shards for first, last in shard.ranges)
    for first, last, name in rows:
        table.add_row(str(first), str(last), name)
    return table
