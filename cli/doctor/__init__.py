"""`oncepay doctor`: what is wrong with this machine and this cluster, and what to do about it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from cli.common import UNREACHABLE, WRONG, handle_errors, home, output_option
from cli.deployment import config_option, reporting
from cli.findings import Finding, Level, say
from oncepay.errors import Unavailable

if TYPE_CHECKING:
    from cli.deployment import Report
    from deploy.local import Cluster
    from oncepay.settings import Settings


@click.command(short_help="Say what is wrong here, and what to do.")
@config_option
@output_option
@handle_errors
def doctor(config: str | None, output: str) -> None:
    """Look at this machine, the settings, etcd, every shard and every service; say what is wrong, and what to do about it.

    With --config only what can be seen from afar: the settings, etcd and the shards.

    \b
    Example:
      oncepay doctor
      oncepay doctor --output json
    """
    with reporting(output) as report:
        found, reached = examine(config, report)
    wrong = [each for each in found if each.level == "problem"]
    if output == "json":
        click.echo(json.dumps({"ok": not wrong, "reached": reached, "findings": [each._asdict() for each in found]}))
    else:
        say(found, nothing="nothing is wrong")
    if not reached:
        raise SystemExit(UNREACHABLE)
    if wrong:
        raise SystemExit(WRONG)


def examine(config: str | None, report: Report) -> tuple[list[Finding], bool]:
    """All findings, and whether the cluster that should run could be reached."""
    from pathlib import Path

    from cli.config import findings
    from cli.doctor.machine import look_at_machine
    from oncepay.settings import load

    if config is not None:
        settings = load(config)
        report("looking at the settings")
        found = findings(settings, Path(config))
        more, reached = _cluster(settings, None, report)
        return found + more, reached
    from deploy.local import Cluster, NotRunning

    report("looking at this machine")
    cluster = Cluster(home())
    try:
        settings = cluster.settings
    except NotRunning:
        none = Finding("warning", "cluster", f"there is none in {cluster.home}", "start one with `oncepay up`")
        return [*look_at_machine(cluster, running=False, known=False), none], True
    running = cluster.is_running()
    found = look_at_machine(cluster, running=running, known=True)
    report("looking at the settings")
    found += findings(load(cluster.layout.settings), cluster.layout.settings) if cluster.layout.settings.exists() else []
    if not running:
        left = cluster.pids()
        text = f"doesn't run, but {len(left)} of its processes do" if left else "doesn't run"
        level: Level = "problem" if left else "warning"
        advice = "`oncepay up` ends what is left and starts it; its data is whole" if left else "start it with `oncepay up`"
        return [*found, Finding(level, "cluster", text, advice)], True
    more, reached = _cluster(settings, cluster, report)
    return found + more, reached


def _cluster(settings: Settings, cluster: Cluster | None, report: Report) -> tuple[list[Finding], bool]:
    """What etcd, the shards and, in the local cluster, the services show."""
    import asyncio

    from cli.doctor.services import look_at_services
    from cli.doctor.shards import look_at_shards
    from oncepay.etcd import Etcd

    async def run() -> list[Finding]:
        async with Etcd(settings.etcd) as etcd:
            return await look_at_shards(etcd, settings, cluster, report)

    found, reached = [], True
    try:
        found += asyncio.run(run())
    except Unavailable as error:
        advice = "get two of three members up; see their logs. Routers and shards go on meanwhile, keys last for minutes"
        found.append(Finding("problem", "etcd", str(error), advice))
        reached = False
    if cluster is not None:
        report("looking at the processes")
        found += look_at_services(cluster)
    return found, reached
