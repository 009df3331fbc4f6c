"""`oncepay payouts`: pay sellers what they are owed, and see what became of it."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import click

from cli.common import handle_errors, home, output_option
from cli.deployment import config_option, settings_of, with_etcd
from oncepay.errors import OncepayError, Unavailable

if TYPE_CHECKING:
    import aiohttp

    from oncepay.etcd import Etcd

T = TypeVar("T")

ANSWER_S = 600.0
"""A run of very many sellers asks Tipalti about each payee first."""
PAGE = 500
SHOWN_MAX = 40
LISTED_S = 120.0
"""How long all payouts of a large run may take to be listed: the feed brings them."""
LISTED_PAUSE_S = 1.0
COLUMNS = (
    *("key", "seller", "currency", "sequence", "status", "amount_minor", "amount", "payee", "ref_code", "payment"),
    *("tipalti_fee_minor", "tipalti_fee_currency", "reason", "run", "created_by", "approved_by", "created_at", "updated_at"),
)

url_option = click.option("--url", help="The aggregator's origin. By default the local cluster's.")
key_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file with the API key. By default the local cluster's.",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only show the payout that is meant.")
csv_option = click.option(
    "--csv",
    "csv_file",
    type=click.File("w", lazy=True),
    help="Also write the payouts to this file; - is standard output.",
)


class Refused(OncepayError):
    """The aggregator refused."""

    slug = "refused"


@click.group(short_help="Pay sellers what they are owed, and see what became of it.")
def payouts() -> None:
    """Pay sellers what they are owed, and see what became of it.

    \b
    Example:
      oncepay payouts run --dry-run
      oncepay payouts run
      oncepay payouts list --status awaiting_approval
      oncepay payouts approve payout:records-4:usd:7 --api-key-file second-operator.key
      oncepay payouts show payout:records-4:usd:7
    """


@payouts.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be paid.")
@click.option("--currency", help="Only balances in this currency.")
@click.option("--seller", "sellers", multiple=True, help="Only this seller; may be given again.")
@csv_option
@url_option
@key_option
@output_option
@handle_errors
def run(
    dry_run: bool,
    currency: str | None,
    sellers: tuple[str, ...],
    csv_file: Any,
    url: str | None,
    api_key_file: Path | None,
    output: str,
) -> None:
    """Make a payout of each seller's balance, or say why it is held.

    A run may be made again at any time, and by several at once: no balance is paid twice. Tipalti is told by the shards'
    workers, a moment later.

    \b
    Example:
      oncepay payouts run --dry-run --csv payouts.csv
      oncepay payouts run --currency usd --output json
    """
    if output == "json" and csv_file is not None and csv_file.name == "-":
        raise click.UsageError("standard output is the JSON object: write the CSV to a file")
    body = {"dry_run": dry_run, "currency": currency, "sellers": list(sellers) or None}

    async def call(api: Api) -> dict[str, Any]:
        found = await api.call("POST", "/v1/payouts", body)
        made, listed = sum(total["payouts"] for total in found["totals"]), len(found["payouts"])
        if csv_file is not None and listed < made:
            if dry_run:
                click.echo(f"the file has the first {listed:,} of {made:,} payouts: a dry run lists no more", err=True)
            else:
                found["payouts"] = await _all_of(api, found["run"], made)
        return found

    found = _run(url, api_key_file, call)
    if csv_file is not None:
        _write_csv(csv_file, found["payouts"])
    if output == "json":
        click.echo(json.dumps(found))
    elif csv_file is None or csv_file.name != "-":
        _show_run(found)


async def _all_of(api: Api, run: str, made: int) -> list[dict[str, Any]]:
    """A run's payouts, which the aggregator lists as the feed brings them. Raises Unavailable when some don't come."""
    deadline_s = time.monotonic() + LISTED_S
    while True:
        rows = [row async for row in api.pages("/v1/payouts", {"run": run}, None)]
        if len(rows) >= made:
            return rows
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"all {made:,} payouts are made, but only {len(rows):,} are listed after {LISTED_S:g} s (is the feed behind?):"
                f" oncepay payouts list --run {run} --limit {made} --csv FILE, later"
            )
        await asyncio.sleep(LISTED_PAUSE_S)


@payouts.command(name="list")
@click.option("--seller", help="Only this seller's.")
@click.option("--currency", help="Only in this currency.")
@click.option("--status", help="Only in this state, as awaiting_approval or paid.")
@click.option("--run", "run_id", help="Only those of this run.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True, help="How many, newest first.")
@csv_option
@url_option
@key_option
@output_option
@handle_errors
def list_(
    seller: str | None,
    currency: str | None,
    status: str | None,
    run_id: str | None,
    limit: int,
    csv_file: Any,
    url: str | None,
    api_key_file: Path | None,
    output: str,
) -> None:
    """List payouts, newest first.

    \b
    Example:
      oncepay payouts list --seller records-4
      oncepay payouts list --status created --limit 100000 --csv by-hand.csv
    """
    if output == "json" and csv_file is not None and csv_file.name == "-":
        raise click.UsageError("standard output is the JSON object: write the CSV to a file")
    wanted = {"seller": seller, "currency": currency, "status": status, "run": run_id}

    async def read(api: Api) -> list[dict[str, Any]]:
        return [row async for row in api.pages("/v1/payouts", {k: v for k, v in wanted.items() if v is not None}, limit)]

    found = _run(url, api_key_file, read)
    if csv_file is not None:
        _write_csv(csv_file, found)
    if output == "json":
        click.echo(json.dumps({"payouts": found}))
    elif csv_file is None or csv_file.name != "-":
        _show_rows(found)


@payouts.command()
@click.argument("key")
@url_option
@key_option
@output_option
@handle_errors
def show(key: str, url: str | None, api_key_file: Path | None, output: str) -> None:
    """Show a payout with its ledger entries, as its shard has it now.

    \b
    Example:
      oncepay payouts show payout:records-4:usd:7
    """
    found = _run(url, api_key_file, lambda api: api.call("GET", _path(key)))
    if output == "json":
        click.echo(json.dumps(found))
        return
    payout = found["payout"]
    _show_one(payout)
    for entry in found["entries"]:
        click.echo(f"  {entry['kind']}")
        for posting in entry["postings"]:
            click.echo(f"    {posting['account']:<40} {_money(posting['amount'], entry['currency']):>20}")


@payouts.command()
@click.argument("key")
@dry_run_option
@url_option
@key_option
@output_option
@handle_errors
def approve(key: str, url: str | None, api_key_file: Path | None, dry_run: bool, output: str) -> None:
    """Approve a payout that another operator's run has made. Tipalti is told a moment later.

    \b
    Example:
      oncepay payouts approve payout:records-4:usd:7 --api-key-file second-operator.key
    """
    _command(key, "approve", None, url, api_key_file, dry_run, output)


@payouts.command()
@click.argument("key")
@click.option("--reason", default="", help="Why.")
@dry_run_option
@url_option
@key_option
@output_option
@handle_errors
def decline(key: str, reason: str, url: str | None, api_key_file: Path | None, dry_run: bool, output: str) -> None:
    """Stop a payout that Tipalti wasn't told of. The seller's balance is then what it was.

    \b
    Example:
      oncepay payouts decline payout:records-4:usd:7 --reason "bank details in doubt"
    """
    _command(key, "decline", {"reason": reason}, url, api_key_file, dry_run, output)


@payouts.command()
@click.argument("key")
@click.option("--reference", required=True, help="The bank's reference of the transfer.")
@dry_run_option
@url_option
@key_option
@output_option
@handle_errors
def book(key: str, reference: str, url: str | None, api_key_file: Path | None, dry_run: bool, output: str) -> None:
    """Book a payout that was paid by hand, where there is no Tipalti.

    \b
    Example:
      oncepay payouts list --status created --csv by-hand.csv
      oncepay payouts book payout:records-4:usd:7 --reference WIRE-20391
    """
    _command(key, "book", {"reference": reference}, url, api_key_file, dry_run, output)


@payouts.command()
@click.argument("shard")
@click.option("--dry-run", is_flag=True, help="Only show what holds payout runs.")
@config_option
@output_option
@handle_errors
def release(shard: str, dry_run: bool, config: str | None, output: str) -> None:
    """Let payout runs be made again that `oncepay shards accept SHARD` holds, when what the shard lacked was worked off.

    \b
    Example:
      oncepay shards compare s9
      oncepay payouts release s9
    """
    from oncepay import payout_hold

    async def work(etcd: Etcd) -> tuple[bool, list[payout_hold.Hold]]:
        found = await payout_hold.holds(etcd)
        if dry_run:
            return any(each.shard == shard for each in found), found
        return await payout_hold.release(etcd, shard), [each for each in found if each.shard != shard]

    was_held, left = with_etcd(settings_of(config), work)
    if output == "json":
        held = [{"shard": each.shard, "why": each.why, "since": each.since.isoformat()} for each in left]
        click.echo(json.dumps({"shard": shard, "released": was_held and not dry_run, "held": held, "dry_run": dry_run}))
        return
    if not dry_run:
        click.echo(f"{shard} holds payout runs no more" if was_held else f"{shard} held no payout runs")
    for each in left:
        click.echo(f"held by {each.shard} since {each.since:%Y-%m-%d %H:%M} UTC: {each.why}")


def _command(key: str, name: str, body: object, url: str | None, api_key_file: Path | None, dry_run: bool, output: str) -> None:
    async def call(api: Api) -> dict[str, Any]:
        if dry_run:
            return dict((await api.call("GET", _path(key)))["payout"])
        return await api.call("POST", f"{_path(key)}/{name}", body)

    found = _run(url, api_key_file, call)
    if output == "json":
        click.echo(json.dumps(found | ({"dry_run": True} if dry_run else {})))
        return
    if dry_run:
        click.echo(f"would {name}:")
    _show_one(found)


class Api:
    """The aggregator, called over HTTP."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")

    async def call(self, method: str, path: str, body: object = None, query: dict[str, str] | None = None) -> dict[str, Any]:
        """The answer. Raises Unavailable or Refused."""
        import aiohttp
        from yarl import URL

        url = URL(self._url + path, encoded=True).update_query(query or {})
        try:
            async with self._session.request(method, url, json=body) as answer:
                found = await answer.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Unavailable(f"the aggregator at {self._url} can't be reached: {error!r}") from error
        if answer.status >= 400:
            text = f"{found.get('title', answer.status)}: {found.get('detail', '')}".rstrip(": ")
            raise Unavailable(text) if answer.status == 503 else Refused(text)
        return dict(found)

    async def pages(self, path: str, query: dict[str, str], limit: int | None) -> AsyncIterator[dict[str, Any]]:
        """The rows of a list, newest first, at most `limit`."""
        left, cursor = limit, None
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = await self.call("GET", path, query=query | {"limit": str(size)} | ({"cursor": cursor} if cursor else {}))
            for row in page["payouts"]:
                yield row
            left = None if left is None else left - len(page["payouts"])
            cursor = page["cursor"]
            if cursor is None:
                return


def _run(url: str | None, api_key_file: Path | None, call: Callable[[Api], Awaitable[T]]) -> T:
    """Call the aggregator. Raises Unavailable or Refused."""
    if url is None or api_key_file is None:
        from deploy.local import Cluster

        status = Cluster(home()).status()
        url = url or status.urls["aggregator"]
        api_key = api_key_file.read_text().strip() if api_key_file else status.api_key
    else:
        api_key = api_key_file.read_text().strip()

    async def open_and_call(origin: str) -> T:
        import aiohttp

        headers = {"Authorization": f"Bearer {api_key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            return await call(Api(session, origin))

    return asyncio.run(open_and_call(url))


def _path(key: str) -> str:
    return f"/v1/payouts/{quote(key, safe='')}"


def _money(amount_minor: int, currency: str) -> str:
    from oncepay.money import format_minor

    return format_minor(amount_minor, currency)


def _plain(amount_minor: int, currency: str) -> str:
    """An amount in major units as spreadsheets read it: `12.30`."""
    from oncepay.money import exponent

    digits = exponent(currency)
    whole, part = divmod(amount_minor, 10**digits)
    return f"{whole}.{part:0{digits}d}" if digits else str(whole)


def _write_csv(file: Any, rows: Iterable[dict[str, Any]]) -> None:
    """A line a payout. Texts that a spreadsheet would take for a formula get an apostrophe."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        own = row | {
            "amount_minor": row["amount"],
            "amount": _plain(row["amount"], row["currency"]),
            "tipalti_fee_minor": row["tipalti_fee"],
        }
        writer.writerow([_cell(own[name]) for name in COLUMNS])
    file.flush()


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def _show_run(found: dict[str, Any]) -> None:
    head = "would be paid" if found["dry_run"] else "to be paid"
    if not found["totals"]:
        click.echo("nothing to pay")
    for total in found["totals"]:
        waits = f", {total['awaiting_approval']:,} of them wait for approval" if total["awaiting_approval"] else ""
        click.echo(f"{_money(total['amount'], total['currency'])} {head} in {total['payouts']:,} payouts{waits}")
    _show_rows(found["payouts"][:SHOWN_MAX])
    if len(found["payouts"]) > SHOWN_MAX:
        click.echo(f"… and more: oncepay payouts list --run {found['run']}")
    for reason, count in sorted(found["held_by_reason"].items()):
        click.echo(f"{count:,} held: {reason}")
    for item in found["held"][:SHOWN_MAX]:
        detail = f" ({item['detail']})" if item["detail"] else ""
        click.echo(f"  {item['seller']}: {_money(item['balance'], item['currency'])}: {item['reason']}{detail}")


def _show_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table("key", "status", "amount", "payee", "reason", "created")
    for row in rows:
        amount = _money(row["amount"], row["currency"])
        table.add_row(escape(row["key"]), row["status"], amount, escape(row["payee"]), escape(row["reason"]), row["created_at"])
    Console(highlight=False).print(table)


def _show_one(payout: dict[str, Any]) -> None:
    click.echo(f"{payout['key']}  {payout['status']}  {_money(payout['amount'], payout['currency'])}")
    for name in ("payee", "ref_code", "payment", "reason", "run", "created_by", "approved_by", "created_at", "updated_at"):
        if payout[name]:
            click.echo(f"  {name.replace('_', ' ')}: {payout[name]}")
    if payout["tipalti_fee"]:
        click.echo(f"  Tipalti's fee: {_money(payout['tipalti_fee'], payout['tipalti_fee_currency'])}")
