"""`oncepay apikeys`: who may call the services."""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli.common import handle_errors, home, output_option
from oncepay.apikeys import PREFIX, SCOPES, ApiKey, digest, new_key
from oncepay.cart import SELLER_LENGTH_MAX
from oncepay.errors import OncepayError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from oncepay.etcd import Etcd

NAME_LENGTH_MAX = 64
ID_LENGTH_MIN = 8
"""Digits of an id that name a key."""

config_option = click.option(
    "--config", type=click.Path(dir_okay=False), help="The deployment's settings. By default the local cluster's."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


class NoSuchKey(OncepayError):
    """There is no such API key."""

    slug = "no-such-api-key"


class NameTaken(OncepayError):
    """An API key has this name already."""

    slug = "name-taken"


@click.group(short_help="Make and revoke API keys: who may call what, and how often.")
def apikeys() -> None:
    """Make and revoke API keys: who may call what, and how often. Only their hashes are stored.

    \b
    Example:
      oncepay apikeys create shop --scope pay --scope read > shop.key
      oncepay apikeys list
      oncepay apikeys revoke shop
    """


@apikeys.command()
@click.argument("name")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="What it may do; all when not given.")
@click.option(
    "--rate-limit", type=click.FloatRange(0), default=0.0, show_default=True, help="Calls a second to a process; 0: any."
)
@click.option(
    "--slot-rate-limit",
    type=click.FloatRange(0),
    help="Payments a second of one slot to a router; 0: any; else the setting.",
)
@click.option("--seller", default="", help="A seller's own key: it reads what is derived of that one seller, nothing else.")
@config_option
@dry_run_option
@output_option
@handle_errors
def create(
    name: str,
    scopes: tuple[str, ...],
    rate_limit: float,
    slot_rate_limit: float | None,
    seller: str,
    config: str | None,
    dry_run: bool,
    output: str,
) -> None:
    """Make an API key. It is printed this once, alone on standard output, and stored nowhere.

    \b
    Example:
      oncepay apikeys create shop --scope pay --scope read --rate-limit 100 > shop.key
      oncepay apikeys create seller-42 --seller 42 > seller-42.key
    """
    if seller and set(scopes) - {"read"}:
        raise click.UsageError("a seller's own key has the scope read alone")
    if len(seller) > SELLER_LENGTH_MAX or not seller.isprintable():
        raise click.UsageError(f"a seller's id has 1 to {SELLER_LENGTH_MAX} printable characters")
    if not 1 <= len(name) <= NAME_LENGTH_MAX or not name.isprintable():
        raise click.UsageError(f"a name has 1 to {NAME_LENGTH_MAX} printable characters")
    wanted = ("read",) if seller else scopes
    granted = tuple(scope for scope in SCOPES if scope in wanted or not wanted)
    record = ApiKey(name, granted, rate_limit, slot_rate_limit, time.time_ns() // 1_000_000, seller)
    key = new_key()
    _with_etcd(config, lambda etcd: _store(etcd, digest(key), record, dry_run=dry_run))
    if output == "json":
        made = {} if dry_run else {"key": key, "id": digest(key)}
        click.echo(json.dumps({**made, **_shown(record), "dry_run": dry_run}))
        return
    click.echo(f"{name} {'may then' if dry_run else 'may'} {', '.join(granted)}{_limits(record)}", err=True)
    if not dry_run:
        click.echo(key)


@apikeys.command(name="list")
@config_option
@output_option
@handle_errors
def list_(config: str | None, output: str) -> None:
    """List the API keys: their ids (hashes), scopes and limits.

    \b
    Example:
      oncepay apikeys list --output json
    """
    found = _with_etcd(config, _read)
    if output == "json":
        click.echo(json.dumps({"apikeys": [{"id": name, **_shown(record)} for name, record in found]}))
        return
    for name, record in found:
        click.echo(f"{name[:12]}  {record.name}: {', '.join(record.scopes)}{_limits(record)}")


@apikeys.command()
@click.argument("name")
@config_option
@dry_run_option
@output_option
@handle_errors
def revoke(name: str, config: str | None, dry_run: bool, output: str) -> None:
    """Revoke an API key, by its name or the beginning of its id. Its calls are refused from then on.

    \b
    Example:
      oncepay apikeys revoke shop
      oncepay apikeys revoke 5e884898da28
    """
    revoked, record = _with_etcd(config, lambda etcd: _revoke(etcd, name, dry_run=dry_run))
    if output == "json":
        click.echo(json.dumps({"revoked": {"id": revoked, **_shown(record)}, "dry_run": dry_run}))
    else:
        click.echo(f"{record.name} ({revoked[:12]}) {'would be ' if dry_run else ''}revoked")


async def _read(etcd: Etcd) -> list[tuple[str, ApiKey]]:
    """The records with their ids, by name. One that can't be read is left out, and said."""
    kvs, _ = await etcd.get_prefix(PREFIX)
    found = []
    for kv in kvs:
        try:
            found.append((kv.key.removeprefix(PREFIX), msgspec.json.decode(kv.value, type=ApiKey)))
        except msgspec.DecodeError:
            click.echo(f"oncepay: the record {kv.key} can't be read", err=True)
    return sorted(found, key=lambda item: item[1].name)


async def _store(etcd: Etcd, name: str, record: ApiKey, *, dry_run: bool) -> None:
    """NameTaken when a key has the name: logs and limits tell keys apart by it."""
    if any(known.name == record.name for _, known in await _read(etcd)):
        raise NameTaken(f"there is an API key {record.name} already; revoke it first, or take another name")
    if not dry_run:
        await etcd.put(PREFIX + name, msgspec.json.encode(record))


async def _revoke(etcd: Etcd, name: str, *, dry_run: bool) -> tuple[str, ApiKey]:
    known = await _read(etcd)
    found = [item for item in known if item[1].name == name]
    if not found and len(name) >= ID_LENGTH_MIN:
        found = [item for item in known if item[0].startswith(name)]
    if len(found) != 1:
        raise NoSuchKey(f"{'several API keys fit' if found else 'there is no API key'} {name}")
    if not dry_run:
        await etcd.delete(PREFIX + found[0][0])
    return found[0]


def _shown(record: ApiKey) -> dict[str, Any]:
    made = datetime.datetime.fromtimestamp(record.created_at_ms / 1000, datetime.UTC)
    return {
        "name": record.name,
        "scopes": list(record.scopes),
        "rate_limit_per_s": record.rate_limit_per_s,
        "slot_rate_limit_per_s": record.slot_rate_limit_per_s,
        "seller": record.seller or None,
        "created_at": made.isoformat(timespec="seconds").replace("+00:00", "Z") if record.created_at_ms else None,
    }


def _limits(record: ApiKey) -> str:
    text = f", {record.rate_limit_per_s:g} calls a second" if record.rate_limit_per_s else ""
    slots = record.slot_rate_limit_per_s
    text += f", {slots:g} payments a second of a slot" if slots else ""
    return text + (f", of the seller {record.seller} alone" if record.seller else "")


def _with_etcd(config: str | None, work: Callable[[Etcd], Coroutine[Any, Any, Any]]) -> Any:
    from oncepay.etcd import Etcd
    from oncepay.settings import load

    if config is None:
        from deploy.local import Cluster

        settings = Cluster(home()).settings
    else:
        settings = load(config)

    async def run() -> Any:
        async with Etcd(settings.etcd) as etcd:
            return await work(etcd)

    return asyncio.run(run())
