"""`oncepay shards check-cache`: the workers' pending caches beside the tables."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import click

from cli.common import WRONG, fail, handle_errors, home, output_option
from oncepay.errors import Unavailable

if TYPE_CHECKING:
    import aiohttp

    from deploy.local import Status

States = dict[str, tuple[int, str]]
"""Payments with open work: key → (version, status)."""

WAIT_S = 20.0
"""How long a difference may last: the feed is a moment behind the table."""
PAUSE_S = 0.5
ANSWER_S = 30.0
SHOWN_MAX = 50


@click.command("check-cache", short_help="Compare the workers' pending caches with the tables.")
@click.option("--wait", "wait_s", type=click.FloatRange(0, 600), default=WAIT_S, show_default=True, metavar="SECONDS",
              help="How long a difference has to last to count.")  # fmt: skip
@output_option
@handle_errors
def check_cache(wait_s: float, output: str) -> None:
    """Compare what each shard's active worker holds as pending with the shard's table.

    A payment that is in motion may differ for a moment; what still differs after --wait is named.

    \b
    Example:
      oncepay shards check-cache
      oncepay shards check-cache --output json
    """
    from deploy.local import Cluster

    cluster = Cluster(home())
    status, token = cluster.status(), cluster.settings.internal_token
    pending, differences = asyncio.run(_check(status, token, wait_s))
    if output == "json":
        click.echo(json.dumps({"ok": not differences, "pending": pending, "differences": differences}))
    else:
        click.echo(f"{pending:,} pending, {len(differences):,} differences")
        for item in differences[:SHOWN_MAX]:
            click.echo(f"  {item['shard']}  {item['key']}  cache: {item['cache']}  table: {item['table']}")
    if differences:
        if output == "text":
            fail(WRONG, "the cache differs from the table", as_json=False)
        raise SystemExit(WRONG)


def differing(cache: States, table: States) -> set[str]:
    """The keys that are in one only, or in another state."""
    return {key for key in cache.keys() | table.keys() if cache.get(key) != table.get(key)}


async def _check(status: Status, token: str, wait_s: float) -> tuple[int, list[dict[str, object]]]:
    """How many are pending over all shards, and what differs for good."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:
        results = await asyncio.gather(
            *(_check_shard(http, status, shard.name, shard.dsn, wait_s) for shard in status.shards if not shard.restored)
        )
    return sum(pending for pending, _ in results), [item for _, found in results for item in found]


async def _check_shard(
    http: aiohttp.ClientSession, status: Status, shard: str, dsn: str | None, wait_s: float
) -> tuple[int, list[dict[str, object]]]:
    """Compare until nothing differs, or until some keys have differed in every comparison of `wait_s` seconds."""
    if dsn is None:
        raise Unavailable(f"shard {shard} has no leader now")
    deadline_s = time.monotonic() + wait_s
    lasting: set[str] | None = None
    while True:
        cache, table = await _cache(http, status, shard), await _table(dsn)
        now = differing(cache, table)
        lasting = now if lasting is None else lasting & now
        if not lasting or time.monotonic() > deadline_s:
            break
        await asyncio.sleep(PAUSE_S)
    differences: list[dict[str, object]] = [
        {"shard": shard, "key": key, "cache": cache.get(key), "table": table.get(key)} for key in sorted(lasting)
    ]
    return len(table), differences


async def _cache(http: aiohttp.ClientSession, status: Status, shard: str) -> States:
    """The listing of the shard's active worker; those that stand by answer 503. Raises Unavailable when none is active."""
    import aiohttp

    reasons = []
    for process in status.processes:
        if process.name.startswith(f"worker-{shard}-") and process.port:
            try:
                async with http.get(f"http://127.0.0.1:{process.port}/v1/cache") as answer:
                    body = await answer.json(content_type=None)
                    if answer.status == 200:
                        return {key: (version, state) for key, version, state in body["pending"]}
                    reasons.append(f"{process.name}: {body.get('detail') or answer.status}")
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                reasons.append(f"{process.name}: {error!r}")
    raise Unavailable(f"no worker of shard {shard} lists its cache ({'; '.join(reasons) or 'there is none'})")


async def _table(dsn: str) -> States:
    import asyncpg

    try:
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            rows = await connection.fetch(_OPEN)
        finally:
            await connection.close()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Unavailable(f"the table can't be read: {error!r}") from error
    return {row["key"]: (row["version"], row["status"]) for row in rows}


_OPEN = """
with owned as (select first, last from oncepay.ranges)
select key, version, status from oncepay.payments p
where open_work and exists (select from owned r where p.slot between r.first and r.last)
union all
select key, version, status from oncepay.payouts p
where open_work and exists (select from owned r where p.slot between r.first and r.last)
"""
