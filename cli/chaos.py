"""`oncepay chaos`: break something on purpose, under payments, and see that nothing is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, handle_errors, home, output_option, port_base
from cli.deployment import dry_run_option, end_on_terminate

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.local import Cluster, Status
    from deploy.local.faults import Fault, Hands, Moment

WARM_UP = 30
"""Payments before the fault, and after it."""
WHOLE_S = 60.0
CAMPAIGN_HOME = "chaos"
MEANING = {
    "begun": "payments come in; it begins",
    "broken": "it is broken",
    "done": "what follows from it has followed",
    "undone": "it is undone",
    "whole": "everything is whole again",
}


class Faults(click.Group):
    """A group with a command for each fault, beside its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from deploy.local.faults import FAULTS

        return [*super().list_commands(ctx), *FAULTS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from deploy.local.faults import FAULTS

        kind = FAULTS.get(cmd_name)
        return fault_command(kind) if kind is not None else super().get_command(ctx, cmd_name)


@click.group(cls=Faults, short_help="Break something on purpose, and see that nothing is lost.")
def chaos() -> None:
    """Break something on purpose on the running local cluster, under payments, and mend it again.

    \b
    Example:
      oncepay chaos list
      oncepay chaos kill-node
      oncepay chaos campaign --minutes 10 --seed 7
    """


HELP = """{does}, while buyers pay; undo it, and check what the buyers were told.

    Shows the shard before and after, how long no payment was accepted, the slowest answer, and how often a caller was told
    to come again. Exit code 1 when a payment was lost, doubled or answered backwards. The payments stay in the books.
    Afterwards: {undoes}.

    \b
    Example:
      oncepay chaos {name}
      oncepay chaos {name} --shard s1 --output json
    """


def fault_command(kind: type[Fault]) -> click.Command:
    """`oncepay chaos <fault>`."""

    @click.option("--shard", default="s0", show_default=True, help="Whose nodes it hits.")
    @click.option("--hold", "hold_s", type=click.FloatRange(0, 600), metavar="SECONDS", help="How long it lasts at least.")
    @click.option("--dry-run", is_flag=True, help="Only say what it would do.")
    @output_option
    @handle_errors
    def command(shard: str, hold_s: float | None, dry_run: bool, output: str) -> None:
        inflict_one(kind, shard, hold_s, dry_run=dry_run, output=output)

    does = kind.does[0].upper() + kind.does[1:]
    return click.command(kind.name, short_help=does + ".", help=HELP.format(does=does, undoes=kind.undoes, name=kind.name))(
        command
    )


@chaos.command("list", short_help="List the faults.")
@output_option
@handle_errors
def list_faults(output: str) -> None:
    """List the faults: what each does, what undoes it, and how long payments may stand still for it.

    \b
    Example:
      oncepay chaos list
    """
    from deploy.local.faults import FAULTS

    if output == "json":
        rows = [
            {"name": kind.name, "does": kind.does, "undoes": kind.undoes, "gap_s": kind.gap_s, "slowest_s": kind.slowest_s}
            for kind in FAULTS.values()
        ]
        click.echo(json.dumps({"faults": rows}))
        return
    for kind in FAULTS.values():
        click.echo(f"{kind.name:<28} It {kind.does}.")
        click.echo(f"{'':<28} Afterwards: {kind.undoes}.")


@chaos.command("heal", short_help="Undo what an interrupted fault left.")
@dry_run_option
@output_option
@handle_errors
def heal(dry_run: bool, output: str) -> None:
    """Thaw every process of the cluster, start those that were taken down, and join networks that were cut.

    A fault that was interrupted undoes itself; this is for one that was killed.

    \b
    Example:
      oncepay chaos heal --dry-run
      oncepay chaos heal
    """
    from deploy.local import Cluster
    from deploy.local.faults import mend, would_mend

    cluster = Cluster(home())
    if dry_run:
        found = would_mend(cluster)
        if output == "json":
            click.echo(json.dumps({"ok": True, "dry_run": True, **found}))
            return
        click.echo(f"{found['thawed']} processes would be thawed, {len(found['started'])} started: {', '.join(found['started'])}")
        click.echo(f"networks of these would be joined, if they are cut: {', '.join(found['joins']) or 'none'}")
        click.echo(f"small disks of these would be forgotten: {', '.join(found['disks']) or 'none'}")
        return
    mended = mend(cluster)
    if output == "json":
        click.echo(json.dumps({"ok": True, **mended}))
    else:
        click.echo(f"{mended['thawed']} processes were thawed, {len(mended['started'])} started: {', '.join(mended['started'])}")


def inflict_one(kind: type[Fault], shard: str, hold_s: float | None, *, dry_run: bool, output: str) -> None:
    """Inflict it on the running cluster, and show what came of it."""
    from rich.console import Console

    from cli.up import hooks
    from deploy.local import Cluster
    from deploy.local.faults import Hands

    cluster = Cluster(home())
    status = cluster.status()
    if shard not in [each.name for each in status.shards]:
        raise click.UsageError(f"there is no shard {shard!r}: there are {', '.join(each.name for each in status.shards)}")
    console = Console(highlight=False, quiet=output == "json")
    hands = Hands(cluster, shard, hooks(cluster))
    if dry_run:
        plan = {"fault": kind.name, "shard": shard, "leader": hands.leader(), "does": kind.does, "undoes": kind.undoes}
        click.echo(json.dumps({"ok": True, "dry_run": True, **plan}) if output == "json" else describe(kind, hands))
        return
    console.print(f"{describe(kind, hands)}\n")
    end_on_terminate()
    result = asyncio.run(run(cluster, status, hands, kind(hands), hold_s, console))
    if output == "json":
        click.echo(json.dumps(result))
    else:
        show(console, result)
    if not result["ok"]:
        raise SystemExit(WRONG)


def describe(kind: type[Fault], hands: Hands) -> str:
    """What will be done, to whom."""
    return f"{kind.name} on shard {hands.shard} (leader {hands.leader()}): it {kind.does}.\nAfterwards: {kind.undoes}."


def summary(hands: Hands) -> dict[str, Any]:
    """The shard now, as it is shown before and after."""
    view = hands.view()
    leader = view.nodes.get(view.leader or "")
    return {
        "leader": view.leader,
        "timeline": leader.timeline if leader else None,
        "voters": sorted(view.voters),
        "nodes": {name: {"role": node.role, "running": node.running, "lsn": node.lsn} for name, node in view.nodes.items()},
    }


async def run(
    cluster: Cluster, status: Status, hands: Hands, fault: Fault, hold_s: float | None, console: Console
) -> dict[str, Any]:
    """Inflict it while buyers pay; the object that `--output json` prints."""
    from deploy.local.faults import inflict
    from loadtest.recorder import Recorder

    ranges = next(shard.ranges for shard in status.shards if shard.name == hands.shard)
    await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", WHOLE_S, 0.5)
    before = await asyncio.to_thread(summary, hands)
    began_s = 0.0
    async with Recorder(status.urls["router"], status.api_key, ranges) as recorder:
        await recorder.more(WARM_UP)

        def on_moment(moment: Moment) -> None:
            nonlocal began_s
            began_s = began_s or moment.at_s
            hit = f" ({fault.target})" if fault.target and moment.what == "broken" else ""
            console.print(
                f"[dim]{moment.at_s - began_s:6.1f} s[/dim]  {MEANING[moment.what]}{hit}; {len(recorder.told)} payments"
            )

        enough = threading.Event()
        try:
            times = await asyncio.to_thread(inflict, fault, hold_s=hold_s, on_moment=on_moment, enough=enough)
        except asyncio.CancelledError:
            enough.set()  # the thread undoes it, and is waited for
            console.print("interrupted: it is undone")
            raise
        await recorder.more(WARM_UP)
        await recorder.stop()
        violations = await recorder.check()
    after = await asyncio.to_thread(summary, hands)
    begun = times["begun"]
    return {
        "ok": not violations,
        "fault": fault.name,
        "shard": hands.shard,
        "target": fault.target,
        "before": before,
        "after": after,
        "acknowledged": len(recorder.told),
        "amount": recorder.paid(),
        "gap_s": round(recorder.gap_s(begun), 2),
        "slowest_s": round(recorder.slowest_s(begun), 2),
        "refused": recorder.refused(begun),
        "promised": {"gap_s": fault.gap_s, "slowest_s": fault.slowest_s},
        "moments_s": {what: round(at_s - begun, 2) for what, at_s in times.items()},
        "violations": violations,
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """Before and after, and what the buyers saw."""
    from rich.table import Table

    table = Table("", "leader", "timeline", "may be elected", title=f"Shard {result['shard']}", title_justify="left")
    for when in ("before", "after"):
        shard = result[when]
        table.add_row(when, str(shard["leader"]), str(shard["timeline"]), ", ".join(shard["voters"]))
    console.print(table)
    promised = result["promised"]["gap_s"]
    bound = f" (promised: {promised:g} s)" if promised else ""
    console.print(
        f"no payment was accepted for {result['gap_s']:.2f} s at most{bound}; the slowest answer took {result['slowest_s']:.2f} s"
    )
    console.print(f"{result['refused']} times a caller was told to come again or lost its connection")
    if result["ok"]:
        console.print(
            f"[green]✓[/green] all {result['acknowledged']:,} payments that were acknowledged are there, once: {result['amount']}"
        )
    for violation in result["violations"]:
        console.print(f"[red]✗[/red] {violation}")


@chaos.command("campaign", short_help="Fault after fault on a cluster of its own, seeded, and verify.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="No fault begins later than this."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of the faults, and of Stripe's misbehaviour.")
@click.option("--keep", is_flag=True, help="Leave the cluster running, to look around.")
@output_option
@handle_errors
def campaign(minutes: float, seed: int, keep: bool, output: str) -> None:
    """Start a cluster, inflict one fault after the other on it while buyers pay and Stripe misbehaves, and verify.

    Every payment that was acknowledged is held against the platform: none lost, none doubled, none answered backwards; then
    every promise is verified row by row. Writes a report and the whole history to the folder chaos-reports of ONCEPAY_HOME.
    The cluster lives in its folder chaos and is deleted at the start. Exit code 1 when anything was violated.

    \b
    Example:
      oncepay chaos campaign --minutes 10 --seed 7
      oncepay chaos campaign --minutes 2 --output json
    """
    from rich.console import Console

    from cli.campaign import Campaign
    from cli.demo import free_base
    from cli.demo import start as start_cluster
    from deploy.local import Cluster
    from deploy.local.layout import Layout

    end_on_terminate()
    console = Console(highlight=False, quiet=output == "json")
    cluster = Cluster(home() / CAMPAIGN_HOME, free_base(port_base()))
    cluster.down(purge=True)
    try:
        start_cluster(cluster, console)
        result = Campaign(cluster, minutes, seed, Layout(home()).reports, console).run()
    finally:
        if keep and cluster.is_running():
            console.print(f"The cluster goes on: ONCEPAY_HOME={cluster.home} oncepay status; oncepay down")
        else:
            cluster.down()
    if output == "json":
        click.echo(json.dumps(result))
    if not result["ok"]:
        raise SystemExit(WRONG)
