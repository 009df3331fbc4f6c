"""`oncepay keys`: take keys, look at the pool, keep it up."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import handle_errors, home, output_option
from oncepay.errors import OncepayError, Unavailable
from oncepay.keys import SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from oncepay.etcd import Etcd

TIMEOUT_S = 10.0
KEYS_A_REQUEST = 10_000

url_option = click.option("--url", help="The key service's origin. By default the local cluster's.")
key_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with the API key. By default the local cluster's.",
)
config_option = click.option(
    "--config", type=click.Path(dir_okay=False), help="The deployment's settings. By default the local cluster's."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


class Refused(OncepayError):
    """The key service refused."""

    slug = "refused"


def _slots(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`FIRST-LAST` as two numbers."""
    if value is None:
        return None
    first, dash, last = value.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < SLOTS):
        raise click.BadParameter(f"it is FIRST-LAST, two slots from 0 to {SLOTS - 1}, the smaller one first")
    return int(first), int(last)


@click.group(short_help="Take keys, and look after their pool.")
def keys() -> None:
    """Take idempotency keys, and look after the pool that they come from.

    \b
    Example:
      oncepay keys issue --count 3
      oncepay keys pool --output json
    """


@keys.command()
@click.option("--count", type=click.IntRange(1, KEYS_A_REQUEST), default=1, show_default=True, help="How many.")
@click.option("--slots", metavar="FIRST-LAST", callback=_slots, help="Only keys of these slots, 0 to 65535. By default all.")
@url_option
@key_option
@output_option
@handle_errors
def issue(count: int, slots: tuple[int, int] | None, url: str | None, api_key_file: Path | None, output: str) -> None:
    """Take keys, one a line.

    \b
    Example:
      oncepay keys issue --count 3
      oncepay keys issue --count 3 --slots 0-16383
    """
    answer = _call("POST", "/v1/keys", url, api_key_file, {"count": count} | ({"slots": slots} if slots else {}))
    click.echo(json.dumps(answer) if output == "json" else "\n".join(answer["keys"]))


@keys.command()
@url_option
@key_option
@output_option
@handle_errors
def pool(url: str | None, api_key_file: Path | None, output: str) -> None:
    """Show the pool of keys, as one replica of the key service sees it.

    \b
    Example:
      oncepay keys pool
    """
    state = _call("GET", "/v1/keys/pool", url, api_key_file)
    if output == "json":
        click.echo(json.dumps(state))
        return
    lasts = f"{state['available_s']:,} s at the recent rate" if state["available_s"] is not None else "there is no demand"
    away = f", out of touch for {state['etcd_away_s']} s" if state["etcd_away_s"] else ""
    click.echo(f"blocks    {state['blocks_held']} held, {state['blocks_free']} free, {state['blocks_used_up']} used up")
    click.echo(f"keys left {state['keys_left']:,} in open blocks")
    click.echo(f"replicas  {', '.join(state['replicas']) or 'none'}")
    click.echo(
        f"this one  {state['replica']}: {state['available']:,} keys without etcd ({lasts}), {state['ready']:,} ready{away}"
    )


@keys.command()
@config_option
@dry_run_option
@output_option
@handle_errors
def rotate(config: str | None, dry_run: bool, output: str) -> None:
    """Take the next of the two steps to a new MAC secret: add it, and a minute later use it.

    \b
    Example:
      oncepay keys rotate        # adds a secret
      oncepay keys rotate        # after a minute: new keys are made with it
    """
    import msgspec

    from keygen import upkeep

    done = _with_etcd(config, lambda etcd: upkeep.rotate(etcd, dry_run=dry_run))
    if output == "json":
        click.echo(json.dumps(msgspec.to_builtins(done)))
        return
    would = "would be " if dry_run else ""
    if done.step == "added":
        click.echo(f"secret {done.number} {would}added; use it with a second call in {upkeep.KNOWN_AFTER_S:.0f} s")
    else:
        click.echo(f"secret {done.number} {would}used for new keys")
    if done.dropped:
        click.echo(f"{would}dropped: {', '.join(map(str, done.dropped))}")


@keys.command()
@config_option
@dry_run_option
@click.option("--yes", is_flag=True, help="Don't ask.")
@output_option
@handle_errors
def retire(config: str | None, dry_run: bool, yes: bool, output: str) -> None:
    """Give up all blocks of keys, after etcd was restored from a backup and before key services start again.

    The backup's blocks don't know how far they were used since: their keys would be issued a second time.

    \b
    Example:
      oncepay keys retire --config /etc/oncepay/oncepay.toml
    """
    from keygen import upkeep

    if not (dry_run or yes):
        click.confirm("Are all key services stopped? Give up all blocks?", abort=True, err=True)
    count = _with_etcd(config, lambda etcd: upkeep.retire_all(etcd, dry_run=dry_run))
    if output == "json":
        click.echo(json.dumps({"retired": count, "dry_run": dry_run}))
    else:
        click.echo(f"{count} blocks {'would be ' if dry_run else ''}given up")


def _call(method: str, path: str, url: str | None, api_key_file: Path | None, body: object = None) -> dict[str, Any]:
    """The answer's object. Refused with the problem's words; Unavailable when there is no answer."""
    origin, api_key = _target(url, api_key_file)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    data = json.dumps(body).encode() if body is not None else None
    try:
        request = urllib.request.Request(origin.rstrip("/") + path, data=data, method=method, headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        message = _problem(error)
        raise (Unavailable if error.code == 503 else Refused)(message) from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"the key service at {origin} doesn't answer: {getattr(error, 'reason', error)}") from None


def _problem(error: urllib.error.HTTPError) -> str:
    try:
        problem = json.load(error)
        return f"{problem.get('detail') or problem['title']} ({error.code})"
    except (ValueError, KeyError, AttributeError):
        return f"the key service answered {error.code}"


def _target(url: str | None, api_key_file: Path | None) -> tuple[str, str]:
    """Origin and API key: as given, else the local cluster's."""
    if url is None:
        from deploy.local import Cluster

        cluster = Cluster(home())
        url = f"http://127.0.0.1:{cluster.ports.keygen}"
        api_key_file = api_key_file or cluster.layout.api_key
    try:
        return url, api_key_file.read_text(encoding="utf-8").strip() if api_key_file else ""
    except OSError as error:
        raise click.UsageError(f"can't read {api_key_file}: {error.strerror}") from None


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
