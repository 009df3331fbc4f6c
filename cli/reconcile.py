"""`oncepay reconcile`: Stripe's and Tipalti's books against ours, both ways."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, client_errors, handle_errors, home, output_option
from oncepay.errors import OncepayError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.local.status import Status
    from oncepay.client import Oncepay

SHOWN_MAX = 50
PAUSE_S = 0.2
DAY = click.DateTime(["%Y-%m-%d"])


class ReconciliationFailed(OncepayError):
    """The reconciliation broke off."""

    slug = "reconciliation-failed"


@click.command(short_help="Compare Stripe's and Tipalti's books with ours, both ways.")
@click.option("--from", "first", type=DAY, help="First day (UTC), inclusive. By default the day before `--to`.")
@click.option("--to", "last", type=DAY, help="Last day (UTC), inclusive; today by default.")
@click.option(
    "--grace", "grace_s", type=click.IntRange(0), help="Seconds that what is new may still be on its way; else the setting."
)
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the differences to this file.")
@click.option("--dry-run", is_flag=True, help="Only say what would be compared. (A run books what no payment caused.)")
@output_option
@handle_errors
def reconcile(
    first: dt.datetime | None,
    last: dt.datetime | None,
    grace_s: int | None,
    csv_file: Path | None,
    dry_run: bool,
    output: str,
) -> None:
    """Compare Stripe's balance transactions and payouts to the bank with the ledger's entries, both ways; and Tipalti's payments
    and fundings with the payouts and theirs.

    What no payment caused (payouts to the bank, Stripe's adjustments and fees, money from the bank to Tipalti) is booked first.
    Every difference is named with its likely cause and what to do; exit code 1 when there is one. It also runs daily by itself.

    \b
    Example:
      oncepay reconcile --from 2026-10-01 --to 2026-10-31 --csv october.csv
      oncepay reconcile --output json
    """
    from deploy.local import Cluster

    to = (last or dt.datetime.now(dt.UTC)).date()
    begin = first.date() if first else to - dt.timedelta(days=1)
    if begin > to:
        raise click.UsageError("--to is before --from")
    if dry_run:
        asked = {"from": str(begin), "to": str(to), "dry_run": True}
        click.echo(json.dumps(asked) if output == "json" else f"would compare {begin} to {to}, and book what no payment caused")
        return
    status = Cluster(home()).status()
    with client_errors():
        result = asyncio.run(_reconcile(status, begin, to, grace_s, csv_file, quiet=output == "json"))
    if output == "json":
        click.echo(json.dumps(result))
    else:
        show(result)
    if not result["ok"]:
        raise SystemExit(WRONG)


async def _reconcile(
    status: Status, first: dt.date, last: dt.date, grace_s: int | None, csv_file: Path | None, *, quiet: bool
) -> dict[str, Any]:
    from oncepay.client import Oncepay

    urls = status.urls
    async with Oncepay(
        router=urls["router"], keygen=urls["keygen"], aggregator=urls["aggregator"], api_key=status.api_key
    ) as client:
        with _bar(quiet=quiet) as advance:
            result = await reconciled(client, first, last, advance, grace_s=grace_s)
        if csv_file is not None:
            text = await client.aggregator("GET", f"/v1/reconciliations/{result['id']}/differences.csv")
            await asyncio.to_thread(csv_file.write_bytes, text)
    return result


async def reconciled(
    client: Oncepay,
    first: dt.date,
    last: dt.date,
    advance: Callable[[int], None] = lambda _: None,
    *,
    grace_s: int | None = None,
) -> dict[str, Any]:
    """Run a reconciliation to its end; what `oncepay reconcile --output json` prints. Raises ReconciliationFailed."""
    asked = {"from": str(first), "to": str(last)} | ({} if grace_s is None else {"grace_s": grace_s})
    run = json.loads(await client.aggregator("POST", "/v1/reconciliations", asked))
    path = f"/v1/reconciliations/{run['id']}"
    while run["state"] == "running":
        await asyncio.sleep(PAUSE_S)
        run = json.loads(await client.aggregator("GET", path))
        advance(run["checked"].get("read", 0))
    if run["state"] != "done":
        raise ReconciliationFailed(f"{run['problem']}; {run['id']} can be asked again")
    differences: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = json.loads(await client.aggregator("GET", f"{path}/differences{f'?cursor={cursor}' if cursor else ''}"))
        differences += page["differences"]
        cursor = page["cursor"]
    return {
        "ok": not differences, "id": run["id"], "from": str(first), "to": str(last), "checked": run["checked"],
        "kinds": run["kinds"], "differences": differences,
    }  # fmt: skip


class _bar:
    """`with _bar(quiet=…) as advance`: how much of Stripe's and Tipalti's lists has been read, on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __enter__(self) -> Callable[[int], None]:
        if self._quiet:
            return lambda _: None
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("transactions of Stripe's and Tipalti's"), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = self._progress.add_task("read", total=None)
        self._progress.start()
        return lambda read: self._progress.update(task, completed=read)

    def __exit__(self, *error: object) -> None:
        if not self._quiet:
            self._progress.stop()


def show(result: dict[str, Any]) -> None:
    """What was compared, then each difference with its cause and what to do."""
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(result["checked"].items()))
    for found in result["differences"][:SHOWN_MAX]:
        amount = ""
        if found["expected_minor"] is not None:
            amount = f": {found['expected_minor']} {found['currency']} expected, {found['actual_minor']} found"
        what = found["transaction"] or found["entry"] or found["source"] or ""
        of = f" of {found['key']}" if found["key"] else ""
        click.echo(f"✗ {found['kind']} {what}{of}{amount}")
        for line in (found["detail"], found["cause"], found["advice"]):
            if line:
                click.echo(f"    {line}")
    if len(result["differences"]) > SHOWN_MAX:
        click.echo(f"… and {len(result['differences']) - SHOWN_MAX:,} more: --csv FILE writes them all")
    head = "✓ reconciled" if result["ok"] else f"✗ {len(result['differences']):,} differences"
    click.echo(f"{head} from {result['from']} to {result['to']}: {counts}")
