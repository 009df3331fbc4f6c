"""`oncepay aggregator`: the derived data as a whole."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, handle_errors, home, output_option
from cli.resnapshot import resnapshot
from oncepay.errors import Unavailable

if TYPE_CHECKING:
    from deploy.local.status import Status

ANSWER_S = 10.0


@click.group(short_help="Look after the derived data.")
def aggregator() -> None:
    """Look after the derived data.

    \b
    Example:
      oncepay aggregator status
      oncepay aggregator rebuild
    """


@aggregator.command(short_help="Make the derived data anew, out of the shards, while payments go on.")
@click.argument("names", metavar="[SHARD]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Only say what would be rebuilt, and how the feeds are.")
@output_option
@handle_errors
def rebuild(names: tuple[str, ...], dry_run: bool, output: str) -> None:
    """Make the derived data anew, out of the shards' tables, while payments go on; of all shards when none is named.

    Shard by shard (as `oncepay shards resnapshot`): readers see the old until all of a shard's is new, then the new, exactly
    at a later position. The copy of Stripe's ledger and past reconciliations stay as they are.

    \b
    Example:
      oncepay aggregator rebuild
      oncepay aggregator rebuild s1 --dry-run
    """
    context = click.get_current_context()
    context.invoke(resnapshot, names=names, every=not names, dry_run=dry_run, output=output)


@aggregator.command(short_help="How far each feed is, how much there is, and what the audit found.")
@output_option
@handle_errors
def status(output: str) -> None:
    """How far each shard's feed is applied, how much there is, and what the last audit and reconciliation found.

    Exit code 1 when the audit or the reconciliation found a difference.

    \b
    Example:
      oncepay aggregator status --output json
    """
    from deploy.local import Cluster

    found = asyncio.run(_status(Cluster(home()).status()))
    if output == "json":
        click.echo(json.dumps(found))
    else:
        _show(found)
    if not found["ok"]:
        raise SystemExit(WRONG)


async def ask_status(cluster: Status) -> dict[str, Any]:
    """What the aggregator says of itself. Raises Unavailable."""
    import aiohttp

    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), headers=headers) as http:
            async with http.get(f"{cluster.urls['aggregator']}/v1/status") as answer:
                found: dict[str, Any] = await answer.json(content_type=None)
                if answer.status != 200:
                    raise Unavailable(str(found.get("detail") or answer.status))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unavailable(f"the aggregator can't be reached: {error!r}") from error
    return found


async def _status(cluster: Status) -> dict[str, Any]:
    found = await ask_status(cluster)
    dsns = {shard.name: shard.dsn for shard in cluster.shards}
    behind = await asyncio.gather(*(_behind_bytes(dsns.get(feed["shard"]), feed["position"]) for feed in found["feeds"]))
    for feed, count in zip(found["feeds"], behind, strict=True):
        feed["behind_bytes"] = count
    return {"ok": not found["audit"]["differences"] and not found["differences"], **found}


async def _behind_bytes(dsn: str | None, position: str) -> int | None:
    """How much log the shard has past the position; None when it has no leader now."""
    import asyncpg

    if dsn is None:
        return None
    try:
        connection = await asyncpg.connect(dsn, timeout=ANSWER_S)
        try:
            return int(await connection.fetchval("select pg_current_wal_flush_lsn() - $1::text::pg_lsn", position))
        finally:
            await connection.close()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return None


def _show(found: dict[str, Any]) -> None:
    for feed in found["feeds"]:
        behind = "its shard can't be read" if feed["behind_bytes"] is None else f"{feed['behind_bytes']:,} bytes behind"
        click.echo(f"{feed['shard']}: at {feed['position']}, {behind}, applied {feed['applied_at']}")
    click.echo("rows, about: " + ", ".join(f"{count:,} {name}" for name, count in found["rows"].items()))
    audit = found["audit"]
    if audit["ended_at"]:
        click.echo(f"audit of {audit['ended_at']}: {audit['entries']:,} entries, {len(audit['differences'])} differences")
    for what in audit["differences"]:
        click.echo(f"  ✗ {what}")
    if found["reconciled_at"]:
        click.echo(f"reconciled {found['reconciled_at']}: {found['differences']} differences")
