"""`oncepay shards compare`: a restored shard beside the shards that own its slots now, and beside Stripe."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, fail, handle_errors, output_option
from cli.deployment import Report, config_option, reporting, settings_of, shard_argument, with_etcd
from cli.shards.backups import parse_time
from oncepay.errors import NotFound, ShardUnavailable, WrongState

if TYPE_CHECKING:
    import asyncpg

    from oncepay.etcd import Etcd
    from oncepay.settings import Settings
    from oncepay.stripe_client import StripeGateway
    from shard.store.restored import Origin

SHOWN_MAX = 20
KEPT_MAX = 10_000
"""So many differences of a kind are named; all are counted."""


@click.command(short_help="Compare a restored shard with its slots' owners and with Stripe.")
@shard_argument
@click.option("--since", help="Leave out intents that Stripe made before (ISO 8601). By default none.")
@config_option
@output_option
@handle_errors
def compare(shard: str, since: str | None, config: str | None, output: str) -> None:
    """Compare a shard that was restored from a backup with what etcd, the owners of its slots, and Stripe know.

    Names every payment that Stripe has and the shard lacks, or whose outcome it lacks, and the refunds and disputes of its
    payments that their rows lack; every payout that Tipalti has after the last one of a seller's that the shard has; and, where
    the slots' owner can be asked, what the two have otherwise. Exit code 1 when Stripe or Tipalti knows more than the shard.

    \b
    Example:
      oncepay shards restore s0 --as s9 --to-time 2026-11-25T12:00:00Z
      oncepay shards compare s9 --output json
    """
    settings = settings_of(config)
    moment = parse_time(since) if since else None
    with reporting(output) as report:
        done = with_etcd(settings, lambda etcd: _compare(etcd, settings, shard, moment, report))
    if output == "json":
        click.echo(json.dumps(done))
    else:
        _say(done)
    if not done["ok"]:
        if output == "text":
            fail(WRONG, f"more is known outside than {shard} has", as_json=False)
        raise SystemExit(WRONG)


async def _compare(etcd: Etcd, settings: Settings, shard: str, since: dt.datetime | None, report: Report) -> dict[str, Any]:
    from oncepay.shardmap import read_map
    from shard.store.restored import origin

    report(f"looking at {shard}")
    connection = await reader_session(etcd, settings, shard)
    try:
        was = await origin(connection)
        if was is None:
            raise WrongState(f"{shard} was not made from a backup: there is nothing to compare it with")
        owned = await connection.fetch("select first, last from oncepay.ranges")
        known = await read_map(etcd)
        owners = {item.shard for item in known.ranges if _meets(item.first, item.last, was)} if known else set()
        done: dict[str, Any] = {
            "shard": shard,
            "of": was.of_shard,
            "up_to": was.up_to.isoformat() if was.up_to else None,
            "ranges": was.ranges,
            "owns": [list(row) for row in owned],
            "owners": sorted(owners),
            "payments": await connection.fetchval("select count(*) from oncepay.payments"),
        }
        done["beside_owners"] = [
            await _beside(etcd, settings, connection, was, owner, report) for owner in sorted(owners - {shard})
        ]
        done |= await beside_providers(connection, settings, was, since, report)
    finally:
        connection.terminate()
    return done


async def beside_providers(
    connection: asyncpg.Connection,
    settings: Settings,
    was: Origin,
    since: dt.datetime | None,
    report: Report,
    until_s: float = math.inf,
) -> dict[str, Any]:
    """What Stripe and Tipalti know and the shard doesn't, and whether that is nothing (`ok`). Raises Unavailable.

    What was made after `until_s` (seconds since 1970) isn't named: of a shard that works, that may be on its way.
    """
    from oncepay.stripe_client import StripeGateway

    since_s = int(since.timestamp()) if since else 0
    async with StripeGateway(settings.stripe) as stripe:
        beside = await _beside_stripe(connection, stripe, was, since_s, report, until_s)
        beside |= await after_stripe(connection, stripe, was, since_s, report, until_s)
    paid = await _beside_tipalti(connection, settings, was, report)
    lacks = [beside, beside["refunds"], beside["disputes"]]
    ok = not any(each["missing"] or each["behind"] for each in lacks) and not (paid["missing"] or paid["left_out"])
    return {"stripe": beside, "tipalti": paid, "ok": ok}


def _meets(first: int, last: int, was: Origin) -> bool:
    return any(first <= end and begin <= last for begin, end in was.ranges)


async def reader_session(etcd: Etcd, settings: Settings, shard: str) -> asyncpg.Connection:
    """In the reader's role, with the shard's leader. Raises ShardUnavailable, NotFound."""
    import asyncpg

    from deploy.members import read

    members = await read(etcd, shard)
    if not members.members:
        raise NotFound(f"there is no shard {shard}, or none of its nodes is in touch with etcd")
    host, port = members.leading().address
    postgres = settings.postgres
    try:
        return await asyncpg.connect(
            host=host, port=port, user="oncepay_reader", password=postgres.reader_password, database=postgres.database, timeout=10
        )
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ShardUnavailable(f"the leader of {shard} can't be asked: {error!r}") from error


async def _beside(
    etcd: Etcd, settings: Settings, connection: asyncpg.Connection, was: Origin, owner: str, report: Report
) -> dict[str, Any]:
    """What differs from the rows of a shard that owns some of the slots now."""
    from shard.store.compare import difference, paired, rows

    report(f"comparing with {owner}")
    try:
        other = await reader_session(etcd, settings, owner)
    except (ShardUnavailable, NotFound) as error:
        return {"owner": owner, "reached": False, "why": str(error)}
    try:
        ranges = [
            (row["first"], row["last"]) for row in await other.fetch("select first, last from oncepay.ranges order by first")
        ]
        common = [
            (max(first, begin), min(last, end))
            for first, last in ranges
            for begin, end in was.ranges
            if max(first, begin) <= min(last, end)
        ]
        counts: Counter[str] = Counter()
        keys: list[dict[str, Any]] = []
        async for here, there in paired(rows(connection, common), rows(other, common)):
            what = difference(here, there)
            counts[what or "same"] += 1
            row = here or there
            if what is not None and row is not None and len(keys) < KEPT_MAX:
                states = {"here": here.status if here else None, "there": there.status if there else None}
                keys.append({"what": what, "key": row.key, **states})
        return {"owner": owner, "reached": True, "slots": common, "counts": dict(counts), "differences": keys}
    finally:
        other.terminate()


async def _beside_stripe(
    connection: asyncpg.Connection, stripe: StripeGateway, was: Origin, since: int, report: Report, until_s: float = math.inf
) -> dict[str, Any]:
    from shard.store.compare import unknown_intents

    seen, counts, money = 0, Counter[str](), 0
    kept: list[dict[str, Any]] = []
    async for count, found in unknown_intents(connection, stripe, was.ranges, since=since):
        seen += count
        report(f"comparing with Stripe: {seen:,} intents")
        for each in (each for each in found if each.created <= until_s):
            counts[each.what] += 1
            money += each.amount if each.money and each.what == "missing" else 0
            if len(kept) < KEPT_MAX:
                kept.append(each._asdict())
    return {
        "intents": seen,
        "missing": counts["missing"],
        "behind": counts["behind"],
        "missing_minor": money,
        "differences": kept,
    }


async def after_stripe(
    connection: asyncpg.Connection, stripe: StripeGateway, was: Origin, since: int, report: Report, until_s: float = math.inf
) -> dict[str, Any]:
    """Refunds and disputes; the payments that are missing are named by themselves."""
    from shard.store.compare_after import unknown_disputes, unknown_refunds

    found: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []
    for name, unknown in (("refunds", unknown_refunds), ("disputes", unknown_disputes)):
        seen, counts = 0, Counter[str]()
        async for count, found_here in unknown(connection, stripe, was.ranges, since=since):
            differences = [each for each in found_here if each.created <= until_s]
            seen += count
            report(f"comparing with Stripe: {seen:,} {name}")
            counts.update(each.what for each in differences)
            kept += [each._asdict() for each in differences[: KEPT_MAX - len(kept)]]
        found[name] = {"seen": seen, "missing": counts["missing"], "behind": counts["behind"]}
    return found | {"after": kept}


async def _beside_tipalti(connection: asyncpg.Connection, settings: Settings, was: Origin, report: Report) -> dict[str, Any]:
    """Payouts, by their reference codes."""
    from oncepay.tipalti_client import TipaltiClient
    from shard.store.compare_payouts import unknown_payouts

    async with TipaltiClient(settings.tipalti) as tipalti:
        if not tipalti.on:
            return {"asked": False, "sellers": 0, "looked_up": 0, "left_out": 0, "missing": 0, "payouts": []}
        report("comparing with Tipalti")
        found = await unknown_payouts(connection, tipalti, was.ranges)
    kept = [each._asdict() for each in found.missing[:KEPT_MAX]]
    return {"asked": True, **found._asdict(), "missing": len(found.missing), "payouts": kept}


def _say(done: dict[str, Any]) -> None:
    owns = done["owns"] or "nothing"
    click.echo(f"{done['shard']} is {done['of']} up to {done['up_to']}, with {done['payments']:,} payments; it owns {owns}")
    for each in done["beside_owners"]:
        if each["reached"]:
            counts = ", ".join(f"{count:,} {what}" for what, count in sorted(each["counts"].items()))
            click.echo(f"beside {each['owner']}, which owns its slots: {counts or 'no payments'}")
        else:
            click.echo(f"{each['owner']} owns its slots, and can't be asked: {each['why']}")
    stripe = done["stripe"]
    lacks = f"{stripe['missing']:,} missing here, {stripe['behind']:,} with an outcome not known here"
    click.echo(f"beside Stripe: {stripe['intents']:,} intents, {lacks}")
    for each in stripe["differences"][:SHOWN_MAX]:
        click.echo(f"  {each['what']}  {each['key']}  {each['intent']}  {each['status']}  {each['amount']:,}")
    _more(stripe["differences"])
    for name in ("refunds", "disputes"):
        of = stripe[name]
        click.echo(f"  {of['seen']:,} {name} of payments that are here, {of['missing']:,} missing here, {of['behind']:,} behind")
    for each in stripe["after"][:SHOWN_MAX]:
        click.echo(f"  {each['what']}  {each['key']}  {each['id']}  {each['status']}  {each['amount']:,}")
    _more(stripe["after"])
    if stripe["after"]:
        click.echo(f"once {done['shard']} has its slots: oncepay shards adopt {done['shard']}")
    _say_payouts(done["tipalti"])


def _say_payouts(paid: dict[str, Any]) -> None:
    if not paid["asked"]:
        click.echo("there is no Tipalti: payouts were not compared")
        return
    click.echo(f"beside Tipalti: {paid['sellers']:,} sellers' payouts, {paid['missing']:,} missing here")
    for each in paid["payouts"][:SHOWN_MAX]:
        click.echo(f"  missing  {each['key']}  {each['payment']}  {each['status']}  {each['amount']:,}")
    _more(paid["payouts"])
    if paid["left_out"]:
        click.echo(f"  {paid['left_out']:,} sellers' payouts were not all asked for: there are too many")


def _more(differences: list[dict[str, Any]]) -> None:
    if len(differences) > SHOWN_MAX:
        click.echo(f"  … {len(differences) - SHOWN_MAX:,} more: --output json names them")
