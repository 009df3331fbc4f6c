"""`oncepay verify`: check the promises from outside, row by row."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, handle_errors, home, output_option
from oncepay.errors import OncepayError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.local import Cluster, Status
    from loadtest.checker import Report, Target
    from loadtest.checker.model import Progress
    from oncepay.settings import Settings, TipaltiSettings

STAND_IN_KEY = "sk_test_verify"
"""The stand-in for Stripe takes any key that begins like this."""
STAND_IN_TOKEN = "rt_test_verify"  # noqa: S105 (the stand-in for Tipalti takes any that begins like this)

WAIT_S = 60.0
LEADER_PAUSE_S = 1.0
SHOWN_MAX = 50
WIDE = 110

PROMISES = {
    1: ("Once", "no key has two charges or two rows", "keys"),
    3: ("No money without a row", "every confirmed PaymentIntent has its row", "confirmed_intents"),
    4: ("Terminal is terminal", "rows and Stripe agree on every end", "payments"),
    5: ("Balanced", "entries sum to zero, splits to the total", "entries"),
    6: ("Derived equals source", "the aggregator is the fold of the entries", "derived_entries"),
    7: ("Reconciled", "Stripe's transactions and Tipalti's payments have their postings", "balance_transactions"),
}
"""What this can see: promise 2 (nothing lost) needs a history of what was acknowledged, which chaos campaigns keep."""


Slots = tuple[tuple[int, int], ...]


async def moving_slots(settings: Settings) -> Slots:
    """The slots of moves that are not over: two shards may have their rows."""
    from oncepay.etcd import Etcd
    from shard.mover.records import Records

    async with Etcd(settings.etcd) as etcd:
        return tuple((move.first, move.last) for move in await Records(etcd).all() if not move.over)


def target_of(
    status: Status,
    *,
    stripe_key: str = STAND_IN_KEY,
    wait_s: float = WAIT_S,
    since: int = 0,
    tipalti: TipaltiSettings | None = None,
    moving: Slots = (),
) -> Target:
    """Where the checker finds a cluster's parts. Raises Unreachable when a shard has no leader or a part isn't there."""
    from loadtest.checker import ShardTarget, Target, Unreachable

    shards = []
    for shard in status.shards:
        if shard.restored:
            continue  # it holds copies of other shards' rows, and owns none
        if shard.dsn is None:
            raise Unreachable(f"shard {shard.name} has no leader now")
        ranges = tuple((int(first), int(last)) for first, last in shard.ranges)
        shards.append(ShardTarget(shard.name, shard.dsn, ranges))
    if not shards or "stripe" not in status.urls or "aggregator" not in status.urls:
        raise Unreachable("the cluster runs without shards, Stripe or an aggregator: there is nothing to verify")
    return Target(
        shards=tuple(shards),
        aggregator_dsn=status.aggregator_dsn,
        aggregator_url=status.urls["aggregator"],
        api_key=status.api_key,
        stripe_url=status.urls["stripe"],
        stripe_key=stripe_key,
        since=since,
        wait_s=wait_s,
        tipalti_url=status.urls.get("tipalti", "") if tipalti is None else tipalti.base_url,
        tipalti_client_id=tipalti.client_id if tipalti else "",
        tipalti_client_secret=tipalti.client_secret if tipalti else "",
        tipalti_refresh_token=tipalti.refresh_token if tipalti else STAND_IN_TOKEN,
        moving=moving,
    )


class NotVerified(OncepayError):
    """A part of the cluster answers what can't be read."""

    slug = "not-verified"


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """The checker knows nothing of the project, and so raises errors of its own."""
    from loadtest.checker import CheckerError, Unreachable

    try:
        yield
    except Unreachable as error:
        raise Unavailable(str(error)) from error
    except CheckerError as error:
        raise NotVerified(str(error)) from error


async def verify_cluster(
    status: Status,
    *,
    stripe_key: str = STAND_IN_KEY,
    wait_s: float = WAIT_S,
    since: int = 0,
    progress: Progress | None = None,
    moving: Slots = (),
) -> dict[str, Any]:
    """Check the cluster that `status` describes; the object that `oncepay verify --output json` prints.

    Raises Unavailable when a part can't be reached, NotVerified when one answers what can't be read.
    """
    from loadtest.checker import verify as check
    from loadtest.checker.model import silent

    with _own_errors():
        target = target_of(status, stripe_key=stripe_key, wait_s=wait_s, since=since, moving=moving)
        return as_json(await check(target, progress or silent))


def as_json(report: Report) -> dict[str, Any]:
    """The report as others script against it."""
    return {
        "ok": report.ok,
        "checked": dict(sorted(report.checked.items())),
        "open": report.open,
        "differences": [
            {"promise": found.promise, "what": found.what, "key": found.key, "advice": found.advice}
            for found in report.differences
        ],
        "seconds": round(report.seconds, 1),
    }


@click.command(short_help="Check every promise from outside, row by row.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, 3600), default=WAIT_S, show_default=True, help="Seconds for work in flight."
)
@click.option("--since", type=click.DateTime(), help="Leave out what Stripe made before (UTC), for an account with a past.")
@output_option
@handle_errors
def verify(wait_s: float, since: dt.datetime | None, output: str) -> None:
    """Read every shard, Stripe and the aggregator, row by row, and name whatever doesn't match.

    Waits for work in flight. What is still open then is counted and is no difference, and so are PaymentIntents that were
    never confirmed and that no row names (orphans). Exit code 1 when something differs, 3 when a part can't be reached.

    \b
    Example:
      oncepay verify
      oncepay verify --wait 0 --output json
    """
    from deploy.local import Cluster

    cluster = Cluster(home())
    found = _status(cluster, wait_s)
    stripe_key = cluster.settings.stripe.api_key or STAND_IN_KEY
    since_s = int(since.replace(tzinfo=dt.UTC).timestamp()) if since else 0

    async def check(progress: Progress | None) -> dict[str, Any]:
        moving = await moving_slots(cluster.settings)
        return await verify_cluster(found, stripe_key=stripe_key, wait_s=wait_s, since=since_s, progress=progress, moving=moving)

    with _progress_bars(quiet=output == "json") as progress:
        verdict = asyncio.run(check(progress))
    if output == "json":
        click.echo(json.dumps(verdict))
    else:
        from rich.console import Console

        show(Console(highlight=False), verdict)
    if not verdict["ok"]:
        raise SystemExit(WRONG)


def _status(cluster: Cluster, wait_s: float) -> Status:
    """The cluster's status, once every shard has a leader or the time is over."""
    deadline = time.monotonic() + wait_s
    while True:
        found = cluster.status()
        if all(shard.dsn for shard in found.shards) or time.monotonic() >= deadline:
            return found
        time.sleep(LEADER_PAUSE_S)


@contextlib.contextmanager
def _progress_bars(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar for each thing that is read, on standard error."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def show(console: Console, verdict: dict[str, Any]) -> None:
    """A table of the promises, then each difference with its key and what to do."""
    from rich.markup import escape
    from rich.table import Table

    checked, differences = verdict["checked"], verdict["differences"]
    wide = console.width >= WIDE
    table = Table("", "promise", "checked", *(("",) if wide else ()), title="Promises", title_justify="left")
    for number, (name, meaning, counter) in PROMISES.items():
        wrong = sum(1 for found in differences if found["promise"] == number)
        mark = f"[red]✗ {wrong:,}[/red]" if wrong else "[green]✓[/green]"
        count = f"{checked.get(counter, 0):,} {counter.replace('_', ' ')}"
        table.add_row(mark, f"{number} {name}", count, *((f"[dim]{meaning}[/dim]",) if wide else ()))
    console.print(table)
    for found in differences[:SHOWN_MAX]:
        console.print(f"[red]✗[/red] promise {found['promise']}  [bold]{escape(found['key'])}[/bold]: {escape(found['what'])}")
        console.print(f"    [dim]{escape(found['advice'])}[/dim]")
    if len(differences) > SHOWN_MAX:
        console.print(f"… and {len(differences) - SHOWN_MAX:,} more: `oncepay verify --output json` names them all")
    console.print(_summary(verdict))


def _summary(verdict: dict[str, Any]) -> str:
    checked = verdict["checked"]
    states = ", ".join(f"{checked[name]:,} {name}" for name in ("succeeded", "failed", "canceled") if checked.get(name))
    parts = [f"{checked.get('payments', 0):,} payments" + (f" ({states})" if states else ""), f"{verdict['open']:,} open"]
    if checked.get("orphans"):
        parts.append(f"{checked['orphans']:,} unconfirmed PaymentIntents that no row names")
    if checked.get("awaited"):
        parts.append(f"{checked['awaited']:,} things that may still come")
    parts.append(f"{verdict['seconds']} s")
    head = (
        "[bold green]✓ verified[/bold green]"
        if verdict["ok"]
        else f"[bold red]✗ {_plural(len(verdict['differences']), 'difference')}[/bold red]"
    )
    return f"{head}: {', '.join(parts)}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
