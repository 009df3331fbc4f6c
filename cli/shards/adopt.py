"""`oncepay shards adopt`: a shard that took a lost one's place takes in the refunds and disputes that its rows don't know."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, handle_errors, output_option
from cli.deployment import Report, config_option, dry_run_option, reporting, settings_of, shard_argument, with_etcd
from cli.shards.backups import parse_time
from cli.shards.compare import after_stripe, reader_session
from oncepay.errors import OncepayError, Unavailable, WrongState

if TYPE_CHECKING:
    from oncepay.driver import Driver
    from oncepay.etcd import Etcd
    from oncepay.settings import Settings

CONCURRENCY = 8
SHOWN_MAX = 20


@click.command(short_help="Take in refunds and disputes that a restored shard doesn't know.")
@shard_argument
@click.option("--since", help="Leave out what Stripe made before (ISO 8601). By default nothing.")
@dry_run_option
@config_option
@output_option
@handle_errors
def adopt(shard: str, since: str | None, dry_run: bool, config: str | None, output: str) -> None:
    """Look at Stripe for every payment of a restored shard of which Stripe has a refund or a dispute that its row lacks.

    The shard must have its slots by then (`oncepay shards accept`). It may be called again at any time: what is known is left
    alone. Exit code 1 when something couldn't be taken in.

    \b
    Example:
      oncepay shards adopt s9 --dry-run
      oncepay shards adopt s9
    """
    settings = settings_of(config)
    moment = parse_time(since) if since else None
    with reporting(output) as report:
        done = with_etcd(settings, lambda etcd: _adopt(etcd, settings, shard, moment, dry_run, report))
    if output == "json":
        click.echo(json.dumps(done))
    else:
        would = "would look" if dry_run else "looked"
        click.echo(f"{would} at {done['payments']:,} payments; {len(done['left'])} couldn't be taken in")
        for each in done["left"][:SHOWN_MAX]:
            click.echo(f"  {each['key']}  {each['what']}  {each['why']}")
    if done["left"]:
        raise SystemExit(WRONG)


async def _adopt(
    etcd: Etcd, settings: Settings, shard: str, since: dt.datetime | None, dry_run: bool, report: Report
) -> dict[str, Any]:
    from oncepay.driver import Driver
    from oncepay.stripe_client import StripeGateway
    from shard.store.restored import origin
    from shard.store.store import Shards

    connection = await reader_session(etcd, settings, shard)
    try:
        was = await origin(connection)
        if was is None:
            raise WrongState(f"{shard} was not made from a backup: there is nothing to take in")
        if not dry_run and not await connection.fetchval("select count(*) from oncepay.ranges"):
            raise WrongState(f"{shard} owns nothing: `oncepay shards accept {shard}` first")
        async with StripeGateway(settings.stripe) as stripe:
            since_s = int(since.timestamp()) if since else 0
            lacks = (await after_stripe(connection, stripe, was, since_s, report))["after"]
    finally:
        connection.terminate()
    wanted = sorted({(each["key"], f"{each['kind']}s") for each in lacks})
    done: dict[str, Any] = {"shard": shard, "dry_run": dry_run, "payments": len({key for key, _ in wanted}), "left": []}
    if dry_run or not wanted:
        return done | {"adopt": lacks}
    report(f"looking at {done['payments']:,} payments")
    password = settings.postgres.router_password
    shards = Shards(etcd, settings, role="oncepay_router", password=password, actor="operator")
    await shards.start()
    try:
        async with StripeGateway(settings.stripe) as stripe:
            done["left"] = await looked(Driver(shards, stripe, fee_back=settings.fee.refunded), wanted)
    finally:
        await shards.stop()
    return done | {"adopt": lacks}


async def looked(driver: Driver, wanted: list[tuple[str, Any]]) -> list[dict[str, str]]:
    """Have each payment's refunds or disputes looked at; those where that failed. Raises Unavailable."""
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(key: str, what: Any) -> dict[str, str] | None:
        async with places:
            try:
                await driver.look_after(key, what, "looked at after a restore")
            except Unavailable:
                raise
            except OncepayError as error:
                return {"key": key, "what": what, "why": str(error)}
            return None

    return [left for left in await asyncio.gather(*(one(*each) for each in wanted)) if left is not None]
