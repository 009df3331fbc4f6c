"""`oncepay shards resnapshot`: rebuild what the aggregator derives from shards, out of their tables, while payments go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, fail, handle_errors, home, output_option
from oncepay.errors import OncepayError, Unavailable

if TYPE_CHECKING:
    import aiohttp

    from cli.needed import Part
    from deploy.local import Status
    from oncepay.etcd import Etcd

PAUSE_S = 0.3
ANSWER_S = 30.0
REPLACED_MAX = 10
"""So many looks without an answer from an active worker, and the rebuild counts as lost."""


class RebuildFailed(OncepayError):
    """The rebuild failed; nothing has changed."""

    slug = "rebuild-failed"


@click.command("resnapshot", short_help="Rebuild what the aggregator derives from shards.")
@click.argument("names", metavar="SHARD...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All shards, one after the other.")
@click.option("--dry-run", is_flag=True, help="Only say what would be rebuilt, and how the feed is.")
@output_option
@handle_errors
def resnapshot(names: tuple[str, ...], every: bool, dry_run: bool, output: str) -> None:
    """Rebuild what the aggregator derives from shards, out of their tables.

    For a halted feed: what lay between the slot and the aggregator can't come any more. Payments go on meanwhile; the
    aggregator shows what it had until all is there, and is then exactly at a later position. What a shard gave away before
    its feed was applied is rebuilt first, from the shards that have it now.

    \b
    Example:
      oncepay shards resnapshot s0 --dry-run
      oncepay shards resnapshot s0
    """
    from cli.deployment import with_etcd
    from deploy.local import Cluster

    if bool(names) == every:
        raise click.UsageError("name the shards, or say --all")
    cluster = Cluster(home())
    status, token = cluster.status(), cluster.settings.internal_token
    known = [shard.name for shard in status.shards]
    for name in names:
        if name not in known:
            raise click.UsageError(f"there is no shard {name}; there are {', '.join(known)}")
    chosen = known if every else list(dict.fromkeys(names))
    parts = with_etcd(cluster.settings, lambda etcd: _parts(etcd, status, chosen))
    if output == "text":
        for part in parts:
            if part.shard not in chosen:
                click.echo(f"{part.shard} too: {part.why}")
    results = asyncio.run(_all(status, token, parts, dry_run, output))
    failed = [result for result in results if result["state"] == "failed"]
    if output == "json":
        click.echo(json.dumps({"ok": not failed, "dry_run": dry_run, "shards": results}))
    else:
        for result in results:
            click.echo(_said(result, dry_run))
    if failed:
        if output == "text":
            left = [part.shard for part in parts[len(results) :]]
            after = f"; {', '.join(left)} must come after that: run it again" if left else ""
            fail(WRONG, f"nothing has changed for the shards that failed{after}", as_json=False)
        raise SystemExit(WRONG)


def _said(result: dict[str, Any], dry_run: bool) -> str:
    feed = result["feed"] or "it moves"
    if dry_run:
        return f"{result['shard']}: {result['worker']} would rebuild it; the feed: {feed}"
    if result["state"] == "failed":
        return f"{result['shard']}: failed: {result['problem']}"
    return f"{result['shard']}: {result['rows']:,} rows in {result['seconds']:.1f} s; the feed goes on from {result['position']}"


async def _parts(etcd: Etcd, status: Status, chosen: list[str]) -> list[Part]:
    """What is to be rebuilt, in this order. Where the aggregator can't say how far it is, no feed counts as applied."""
    import msgspec

    from cli.aggregator import ask_status
    from cli.needed import in_order
    from oncepay.feed import parse_lsn
    from oncepay.moves import MOVES_PREFIX, Move
    from oncepay.shardmap import read_map

    current = await read_map(etcd)
    if current is None:
        raise Unavailable("etcd has no shard map: `oncepay etcd settle`")
    kvs, _ = await etcd.get_prefix(MOVES_PREFIX)
    moves = [msgspec.json.decode(kv.value, type=Move) for kv in kvs]
    positions: dict[str, int] = {}
    with contextlib.suppress(Unavailable):
        positions = {feed["shard"]: parse_lsn(feed["position"]) for feed in (await ask_status(status))["feeds"]}
    return in_order(chosen, moves, current, positions)


async def _all(status: Status, token: str, parts: list[Part], dry_run: bool, output: str) -> list[dict[str, Any]]:
    """The results, in order; they end where a shard failed that another one needs."""
    import aiohttp

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), headers=headers) as http:
        results: list[dict[str, Any]] = []
        for part in parts:
            results.append({**await _one(http, status, part.shard, dry_run, output), "why": part.why})
            if part.why and results[-1]["state"] == "failed" and not dry_run:
                break
        return results


async def _one(http: aiohttp.ClientSession, status: Status, shard: str, dry_run: bool, output: str) -> dict[str, Any]:
    port, found = await _active(http, status, shard)
    progress = found["progress"]
    if not dry_run:
        run = (await _ask(http, "POST", port))["progress"]["run"]
        with _bar(shard, show=output == "text") as show:
            progress = await _until_over(http, port, run, show)
    members = {name: progress[name] for name in ("state", "rows", "position", "problem", "seconds")}
    return {"shard": shard, "worker": found["name"], "feed": found["feed"], **members}


async def _until_over(http: aiohttp.ClientSession, port: int, run: int, show: Callable[[int, int], None]) -> dict[str, Any]:
    """Follow one run. Raises Unavailable when the worker that ran it is gone: then nothing has changed, or all has."""
    unanswered = 0
    while True:
        try:
            progress: dict[str, Any] = (await _ask(http, "GET", port))["progress"]
        except Unavailable as error:
            unanswered += 1
            if unanswered == REPLACED_MAX:
                raise Unavailable(f"the worker was replaced while it rebuilt ({error}): run it again") from error
        else:
            unanswered = 0
            if progress["run"] != run:
                raise RebuildFailed("the worker was replaced while it rebuilt: run it again")
            show(progress["rows"], progress["expected"])
            if progress["state"] != "running":
                return progress
        await asyncio.sleep(PAUSE_S)


async def _active(http: aiohttp.ClientSession, status: Status, shard: str) -> tuple[int, dict[str, Any]]:
    """The shard's active worker: its port, and how its feed is. Raises Unavailable when there is none."""
    reasons = []
    for process in status.processes:
        if process.name.startswith(f"worker-{shard}-") and process.port:
            try:
                return process.port, await _ask(http, "GET", process.port)
            except Unavailable as error:
                reasons.append(f"{process.name}: {error}")
    raise Unavailable(f"no worker of shard {shard} is active ({'; '.join(reasons) or 'there is none'})")


async def _ask(http: aiohttp.ClientSession, method: str, port: int) -> dict[str, Any]:
    import aiohttp

    try:
        async with http.request(method, f"http://127.0.0.1:{port}/v1/resnapshot") as answer:
            body: dict[str, Any] = await answer.json(content_type=None)
            if answer.status >= 400:
                raise Unavailable(str(body.get("detail") or answer.status))
            return body
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unavailable(repr(error)) from error


class _bar:
    """`with _bar(shard, show=True) as show`: a bar with an estimate; `show(rows, expected)`."""

    def __init__(self, shard: str, *, show: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(shard), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
        self._task = self._progress.add_task(shard, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        return lambda rows, expected: self._progress.update(self._task, completed=rows, total=max(rows, expected) or None)

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
