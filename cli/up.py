"""`oncepay up`: start the local cluster."""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from cli.common import handle_errors, home, output_option, port_base
from cli.deployment import dry_run_option

if TYPE_CHECKING:
    from deploy.local import Cluster, Hooks
    from deploy.local.preview import Start

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def migration(module: str) -> Callable[..., object] | None:
    """`migrate` of that module; None while there is no such module."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if found is None:
        return None
    migrate = importlib.import_module(module).migrate
    assert callable(migrate)
    return migrate  # type: ignore[no-any-return]


def finish(result: object) -> None:
    """Wait for what a migration may have returned as a coroutine."""
    import asyncio
    import inspect

    if inspect.iscoroutine(result):
        asyncio.run(result)


def hooks(cluster: Cluster) -> Hooks:
    """The migrations of the shards and of the aggregator."""
    from deploy.local import Hooks
    from shard.store.migrate import passwords_of

    migrate_shard = migration("shard.store.migrate")
    migrate_aggregator = migration("aggregator.migrate")

    def on_leader(shard: str, dsn: str, ranges: list[tuple[int, int]]) -> None:
        if migrate_shard is not None:
            finish(migrate_shard(dsn, passwords=passwords_of(cluster.settings.postgres), shard=shard, ranges=ranges))

    def on_aggregator(dsn: str) -> None:
        if migrate_aggregator is not None:
            finish(migrate_aggregator(dsn, passwords=passwords_of(cluster.settings.postgres)))

    return Hooks(on_leader=on_leader, on_aggregator=on_aggregator)


def terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one is not to cut off what is taken back; `timeout` sends two
    raise KeyboardInterrupt


@click.command(short_help="Start the local cluster.")
@click.option("--foreground", is_flag=True, help="Stay, and stop everything on Ctrl-C or SIGTERM.")
@click.option("--stripe-key-file", type=FILE, help="Use the real Stripe account whose secret key is in this file.")
@click.option("--stripe-webhook-secret-file", type=FILE, help="Its webhook signing secret, if webhooks reach this machine.")
@click.option("--netns", is_flag=True, help="Give each node a network namespace of its own, so that it can be cut off (root).")
@click.option("--only", hidden=True, help="Parts to start, separated by commas.")
@click.option("--shards", hidden=True, help="The shards of a new cluster, separated by commas.")
@dry_run_option
@output_option
@handle_errors
def up(
    foreground: bool,
    stripe_key_file: Path | None,
    stripe_webhook_secret_file: Path | None,
    netns: bool,
    only: str | None,
    shards: str | None,
    dry_run: bool,
    output: str,
) -> None:
    """Start the local cluster, and return when everything is ready.

    It runs on by itself until `oncepay down`. All of its data is in ONCEPAY_HOME, all of its ports are the 70 from
    ONCEPAY_PORT_BASE on. It talks to stand-ins for Stripe and Tipalti unless a Stripe key is given.

    \b
    Example:
      oncepay up
      oncepay up --dry-run
      ONCEPAY_HOME=/tmp/other ONCEPAY_PORT_BASE=9000 oncepay up --foreground
    """
    from deploy.local import Cluster
    from deploy.local.bring_up import Progress
    from deploy.local.cluster import DEFAULT_SHARDS
    from deploy.local.status import render

    if stripe_webhook_secret_file and not stripe_key_file:
        raise click.UsageError("--stripe-webhook-secret-file goes with --stripe-key-file")
    try:
        names = shards.split(",") if shards else DEFAULT_SHARDS
        cluster = Cluster(home(), port_base(), names, only.split(",") if only else None, netns=netns)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if dry_run:
        say_what_would_start(cluster.would_start(stripe_key_file, stripe_webhook_secret_file), output)
        return
    signal.signal(signal.SIGTERM, terminate)
    started_s = time.monotonic()
    as_json = output == "json"

    def start(on_progress: Callable[[Progress], None] | None) -> None:
        cluster.up(
            hooks=hooks(cluster),
            on_progress=on_progress,
            on_warning=lambda text: click.echo(f"warning: {text}", err=True),
            stripe_key_file=stripe_key_file,
            stripe_webhook_secret_file=stripe_webhook_secret_file,
        )

    if as_json:
        start(None)
        click.echo(render(cluster.status()), nl=False)
    else:
        start_with_spinner(start)
        say_ready(cluster, time.monotonic() - started_s, foreground)
    if foreground:
        try:
            cluster.wait()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            cluster.down()


def say_what_would_start(found: Start, output: str) -> None:
    """Where the cluster would be, on which ports, and what would run in it."""
    if output == "json":
        click.echo(json.dumps({"ok": True, "dry_run": True, **found.as_json()}))
        return
    click.echo(f"A {'new ' if found.is_new else ''}cluster would be started in {found.home}.")
    click.echo(f"  shards     {', '.join(found.shards)}")
    click.echo(f"  parts      {', '.join(found.parts)}")
    click.echo(f"  ports      from {found.port_base} on:")
    for port in found.listens:
        click.echo(f"    {port.number:<9}{port.purpose}")
    if found.ends:
        click.echo(f"{len(found.ends)} processes of an earlier run would be ended first.")


def start_with_spinner(start: Callable[[Callable[[object], None]], None]) -> None:
    """One line for each process that gets ready, and a spinner that names what is awaited."""
    from rich.console import Console

    from deploy.local.bring_up import Progress

    console = Console(highlight=False)
    with console.status("starting") as spinner:

        def on_progress(progress: object) -> None:
            assert isinstance(progress, Progress)
            console.print(f"[green]✓[/green] {progress.name:<14} [dim]{progress.after_s:5.1f} s[/dim]")
            if progress.left:
                spinner.update(f"waiting for {', '.join(progress.left[:4])}{' …' if len(progress.left) > 4 else ''}")

        start(on_progress)


def say_ready(cluster: Cluster, seconds: float, foreground: bool) -> None:
    """Where everything is."""
    click.echo(f"The cluster is ready after {seconds:.1f} s.")
    for name, url in cluster.status().urls.items():
        click.echo(f"  {name:<11}{url}")
    click.echo(f"  API key    in {cluster.layout.api_key}")
    if foreground:
        click.echo("Ctrl-C stops it.")
