"""`oncepay demo`: a cluster of its own, 6,919 real purchases, verified and shown."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, client_errors, handle_errors, home, output_option, port_base
from cli.deployment import end_on_terminate

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.local import Cluster
    from deploy.local.status import Status
    from loadtest.replay import Tally

ALL = 6_919
WEBHOOKS = "oncepay_router_webhooks_total"
STATEMENT_LONG = frozenset({"entries", "positions", "cursor"})
"""What the JSON answer leaves out of the statement."""
FAULTS: dict[str, Any] = {
    "latency_ms": [2, 12],
    "error_before": 0.01,
    "error_after": 0.005,
    "lost_answer": 0.02,
    "processing": 0.03,
    "processing_s": [1, 5],
    "webhook_lost": 0.2,
    "webhook_doubled": 0.1,
    "webhook_reordered": 0.05,
    "webhook_delay_s": [0, 0.5],
}
"""How the stand-in for Stripe misbehaves in a demo: shares of its calls and webhooks, seconds, milliseconds."""


@click.command(short_help="Replay 6,919 real purchases on a cluster of its own, and verify.")
@click.option("--count", type=click.IntRange(1, ALL), default=ALL, show_default=True, help="How many purchases.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the faults and of the declined cards.")
@click.option("--speed", type=click.FloatRange(min=0.01), help="Days of the data a second; as fast as it goes by default.")
@click.option("--reshard", is_flag=True, help="Move half of a shard to another one in the midst of the replay.")
@click.option("--keep", is_flag=True, help="Leave the cluster running, to look around.")
@output_option
@handle_errors
def demo(count: int, seed: int, speed: float | None, reshard: bool, keep: bool, output: str) -> None:
    """Start a cluster, replay real purchases of an online music shop on it, verify every promise, pay sellers, reconcile, stop.

    The stand-in for Stripe declines some, asks some for time, loses some answers and webhooks and doubles others; the
    same seed gives the same shares. The cluster lives in the folder `demo` of ONCEPAY_HOME and is deleted at the start.

    \b
    Example:
      oncepay demo
      oncepay demo --count 500 --keep
      oncepay demo --reshard
      oncepay demo --output json
    """
    from rich.console import Console

    from cli.summary import show
    from deploy.local import Cluster

    end_on_terminate()
    console = Console(highlight=False, quiet=output == "json")
    cluster = Cluster(home() / "demo", free_base(port_base()))
    cluster.down(purge=True)
    began_s = time.monotonic()
    try:
        start(cluster, console)
        startup_s = time.monotonic() - began_s
        status = cluster.status()
        set_faults(status, seed)
        with client_errors():
            result = asyncio.run(run(status, count, seed, speed, console, cluster, reshard=reshard))
        result["startup_seconds"] = round(startup_s, 1)
        if output == "json":
            click.echo(json.dumps(public(result)))
        else:
            show(console, result)
    finally:
        if keep and cluster.is_running():
            console.print(f"The cluster goes on in {cluster.home}: ONCEPAY_HOME={cluster.home} oncepay status; oncepay down")
        else:
            cluster.down()
    if not result["verify"]["ok"] or not result["reconciliation"]["ok"] or result["payments"]["pending"]:
        raise SystemExit(WRONG)


def free_base(wanted: int | None) -> int:
    """The first port of a free span: the wanted one, or the next ones after it when a cluster has them already."""
    from deploy.local.errors import PortTaken
    from deploy.local.ports import DEFAULT_BASE, SPAN, Port, check_free

    first = DEFAULT_BASE if wanted is None else wanted
    for base in range(first, min(first + 10 * SPAN, 65_536 - SPAN), SPAN):
        try:
            check_free(Port(number, "demo") for number in range(base, base + SPAN))
        except PortTaken:
            continue
        return base
    return first


def start(cluster: Cluster, console: Console) -> None:
    """Bring the cluster up, with a spinner that names what is awaited."""
    from cli.up import hooks

    with console.status("starting a cluster: 3 etcd members, 2 shards of 3 Postgres nodes, the services") as spinner:

        def on_progress(progress: Any) -> None:
            if progress.left:
                spinner.update(f"starting: waiting for {', '.join(progress.left[:4])}{' …' if len(progress.left) > 4 else ''}")

        cluster.up(hooks=hooks(cluster), on_progress=on_progress)


def set_faults(status: Status, seed: int) -> None:
    """Turn the stand-in's faults on."""
    import urllib.request

    body = json.dumps({"seed": seed, **FAULTS}).encode()
    request = urllib.request.Request(f"{status.urls['stripe']}/_control/faults", data=body, method="PUT")  # noqa: S310
    with urllib.request.urlopen(request, timeout=10):  # noqa: S310
        pass


async def run(
    status: Status, count: int, seed: int, speed: float | None, console: Console, cluster: Cluster, *, reshard: bool = False
) -> dict[str, Any]:
    """Replay, verify, pay sellers, reconcile, and gather what is shown. With `reshard` half of a shard moves meanwhile."""
    from cli.demo_reshard import BEGIN_AT, split
    from cli.ending import ending
    from cli.reshard import as_json as reshard_json
    from cli.verify import verify_cluster
    from loadtest.purchases import purchases
    from loadtest.replay import replay
    from oncepay.client import Oncepay

    urls = status.urls
    async with Oncepay(
        router=urls["router"], keygen=urls["keygen"], aggregator=urls["aggregator"], api_key=status.api_key
    ) as client:
        found = list(purchases(count))
        begin = asyncio.Event()
        moving = asyncio.create_task(split(cluster.settings, begin, console.print)) if reshard else None
        with progress_bar(console, len(found)) as advance:
            settled = itertools.count(1)

            def on_settled() -> None:
                advance()
                if next(settled) >= BEGIN_AT * len(found):
                    begin.set()

            tally = await replay(client, found, seed=seed, days_per_s=speed, on_settled=on_settled)
        move = await moving if moving else None
        if reshard:
            status = await asyncio.to_thread(cluster.status)
        verifying_s = time.monotonic()
        with console.status("verifying every payment at the shards, at Stripe and in the derived data"):
            verdict = await verify_cluster(status)
        verified_s = time.monotonic()
        top = await client.derived("/v1/sellers", limit=8)
        with console.status("paying sellers, and holding the books against Stripe's"):
            end = await ending(client, cluster.settings, status, [row["seller"] for row in top["sellers"]])
        return {
            **figures(tally),
            "verify": verdict,
            "move": reshard_json(move) if move else None,
            "verify_seconds": round(verified_s - verifying_s, 1),
            **end,
            "ending_seconds": round(time.monotonic() - verified_s, 1),
            "tally": tally,
            "sellers": top,
            "totals": await client.derived("/v1/totals"),
            "counts": await stripe_counts(urls["stripe"]),
            "by_poll": await settled_by(status),
        }


def figures(tally: Tally) -> dict[str, Any]:
    """The members of the answer that others script against."""
    names = ("submitted", "succeeded", "failed", "canceled", "refused", "pending")
    return {
        "payments": {name: getattr(tally, name) for name in names},
        "amount_minor": {"usd": tally.amount_minor},
        "seconds": round(tally.seconds, 1),
    }


def public(result: dict[str, Any]) -> dict[str, Any]:
    """What --output json prints."""
    names = ("payments", "amount_minor", "seconds", "startup_seconds", "verify_seconds", "verify", "ending_seconds", "move")
    shown = {name: result[name] for name in names if name != "move" or result[name]}
    statement = {name: value for name, value in (result["statement"] or {}).items() if name not in STATEMENT_LONG}
    return shown | {name: result[name] for name in ("payouts", "reconciliation")} | {"statement": statement or None}


async def stripe_counts(url: str) -> dict[str, Any]:
    """What the stand-in counted: webhooks, and faults by kind."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{url}/_control/counts") as answer:
        counts: dict[str, Any] = await answer.json()
        return counts


async def settled_by(status: Status) -> dict[str, int]:
    """How many payments a webhook brought word of first, and how many the workers' polls moved last."""
    import aiohttp
    import asyncpg

    found = {"webhook": 0, "poll": 0}
    for shard in status.shards:
        connection = await asyncpg.connect(shard.dsn)
        try:
            moved = "select count(*) from oncepay.payments where actor like 'worker%'"
            found["poll"] += await connection.fetchval(moved)
        finally:
            await connection.close()
    async with aiohttp.ClientSession() as session:
        for process in status.processes:
            if process.name.startswith("router"):
                async with session.get(f"http://127.0.0.1:{process.port}/metrics") as answer:
                    lines = (await answer.text()).splitlines()
                applied = (line for line in lines if line.startswith(WEBHOOKS) and 'outcome="applied"' in line)
                found["webhook"] += round(sum(float(line.rsplit(" ", 1)[1]) for line in applied))
    return found


class progress_bar:
    """`with progress_bar(console, total) as advance`: a bar with the rate and an estimate."""

    def __init__(self, console: Console, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("replaying purchases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task("replay", total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
