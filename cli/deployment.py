"""Which deployment a command means: the local cluster, or the one whose settings file is named."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.common import home

if TYPE_CHECKING:
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings

T = TypeVar("T")

config_option = click.option(
    "--config", type=click.Path(dir_okay=False), help="The deployment's settings file. By default the local cluster's."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
shard_argument = click.argument("shard")

Report = Callable[[str], None]


def settings_of(config: str | None) -> Settings:
    """The settings in that file, or those of the local cluster. Raises SettingsError, NotRunning."""
    if config is not None:
        from oncepay.settings import load

        return load(config)
    from deploy.local import Cluster

    return Cluster(home()).settings


def with_etcd(settings: Settings, work: Callable[[Etcd], Coroutine[Any, Any, T]]) -> T:
    """Run `work` with the deployment's etcd."""
    from oncepay.etcd import Etcd

    async def run() -> T:
        async with Etcd(settings.etcd) as etcd:
            return await work(etcd)

    return asyncio.run(run())


def end_on_terminate() -> None:
    """SIGTERM from here on ends the command as Ctrl-C does, so that what it has begun is taken back."""
    from cli.up import terminate

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def reporting(output: str) -> Iterator[Report]:
    """Shows each step as it begins, and how long the one before took; on standard error, and not with `--output json`."""
    if output == "json":
        yield lambda _text: None
        return
    from rich.console import Console

    console = Console(highlight=False, stderr=True)
    running: list[tuple[str, float]] = []

    def over() -> None:
        if running:
            text, began_s = running.pop()
            console.print(f"[green]✓[/green] {text} [dim]{time.monotonic() - began_s:.1f} s[/dim]")

    with console.status("starting") as spinner:

        def report(text: str) -> None:
            over()
            running.append((text, time.monotonic()))
            spinner.update(text)

        yield report
        over()
