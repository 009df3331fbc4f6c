"""`oncepay config`: the settings of a deployment, shown without their secrets, and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import WRONG, fail, handle_errors, home, output_option
from cli.deployment import config_option
from cli.findings import Finding, Level, say

if TYPE_CHECKING:
    from oncepay.settings import Settings

SECRETS = ("password", "api_key", "token", "secret")
"""Members whose names end so are never shown."""
HIDDEN = "(set)"
UNSET = "(not set)"


@click.group(short_help="Show and check the settings.")
def config() -> None:
    """Show and check a deployment's settings.

    \b
    Example:
      oncepay config show
      oncepay config check --config /etc/oncepay/oncepay.toml
    """


@config.command()
@config_option
@output_option
@handle_errors
def show(config: str | None, output: str) -> None:
    """Show every setting, also those that have their defaults; of secrets only whether they are set.

    \b
    Example:
      oncepay config show
    """
    from cli.deployment import settings_of

    shown = without_secrets(settings_of(config))
    if output == "json":
        click.echo(json.dumps(shown))
        return
    import tomli_w

    click.echo(tomli_w.dumps(shown), nl=False)


@config.command()
@config_option
@output_option
@handle_errors
def check(config: str | None, output: str) -> None:
    """Check the settings file: that it can be read, by nobody else, and that its members make sense together.

    \b
    Example:
      oncepay config check --config /etc/oncepay/oncepay.toml
    """
    from oncepay.settings import load

    path = Path(config) if config is not None else local_file()
    found = findings(load(path), path)
    wrong = [each for each in found if each.level == "problem"]
    if output == "json":
        click.echo(json.dumps({"ok": not wrong, "file": str(path), "findings": [each._asdict() for each in found]}))
    else:
        say(found, nothing=f"{path} is fine")
    if wrong:
        if output == "text":
            fail(WRONG, f"{len(wrong)} of the settings can't stay so", as_json=False)
        raise SystemExit(WRONG)


def local_file() -> Path:
    """The settings file of the local cluster. Raises NotRunning when there never was one."""
    from deploy.local import Cluster

    cluster = Cluster(home())
    _ = cluster.ports
    return cluster.layout.settings


def without_secrets(settings: Settings) -> dict[str, Any]:
    """All members as TOML and JSON can hold them."""
    import msgspec

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(key, item) for key, item in value.items()}
        if name.endswith(SECRETS):
            return HIDDEN if value else UNSET
        if name.endswith("_dsn") and value:
            return _without_password(value)
        return value

    shown: dict[str, Any] = clean("", msgspec.to_builtins(settings))
    return shown


def _without_password(dsn: str) -> str:
    from urllib.parse import urlsplit, urlunsplit

    url = urlsplit(dsn)
    if url.password is None:
        return dsn
    return urlunsplit(url._replace(netloc=url.netloc.replace(f":{url.password}@", ":…@")))


def findings(settings: Settings, path: Path) -> list[Finding]:
    """What is wrong with the settings in that file, or will be."""
    return [*_file(path), *_secrets(settings), *_addresses(settings), *_rules(settings)]


def _file(path: Path) -> list[Finding]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return [Finding("problem", "file", f"{path} holds secrets and has mode {mode:04o}", f"chmod 600 {path}")]
    return []


def _secrets(settings: Settings) -> list[Finding]:
    import msgspec

    found = []
    passwords = {name: value for name, value in msgspec.structs.asdict(settings.postgres).items() if name.endswith("_password")}
    for name, value in passwords.items():
        if not value:
            level: Level = "warning" if name in ("mover_password", "backup_password", "superuser_password") else "problem"
            found.append(
                Finding(level, f"postgres.{name}", "is not set", "set it, then `oncepay shards migrate` gives it to the role")
            )
    given = [value for value in passwords.values() if value]
    if len(set(given)) < len(given):
        found.append(Finding("warning", "postgres", "two roles have the same password", "give each role its own"))
    if not settings.internal_token:
        found.append(
            Finding(
                "problem", "internal_token", "is not set: services can't tell each other from strangers", "set a long random text"
            )
        )
    if not settings.patroni.password:
        found.append(
            Finding("warning", "patroni.password", "is not set: no planned switchover by command", "set it as in Patroni's file")
        )
    if not settings.stripe.api_key:
        found.append(Finding("problem", "stripe.api_key", "is not set", "set the account's secret key (sk_… or rk_…)"))
    elif not settings.stripe.api_key.startswith(("sk_", "rk_")):
        found.append(
            Finding("problem", "stripe.api_key", "is no secret key of Stripe's", "set the one that begins with sk_ or rk_")
        )
    for name in settings.stripe.webhook_secret_files:
        if not Path(name).is_file():
            found.append(
                Finding("problem", "stripe.webhook_secret_files", f"{name} isn't there", "write the signing secret into it")
            )
    if not settings.stripe.webhook_secret_files:
        found.append(
            Finding(
                "warning", "stripe.webhook_secret_files", "names no file: outcomes come by polling alone", "register a webhook"
            )
        )
    return found


def _addresses(settings: Settings) -> list[Finding]:
    from urllib.parse import urlsplit

    found = []
    for endpoint in settings.etcd.endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            found.append(Finding("problem", "etcd.endpoints", f"{endpoint!r} is not host:port", "write it as 10.0.0.1:2379"))
    members = len(settings.etcd.endpoints)
    if members < 3 or members % 2 == 0:
        found.append(Finding("warning", "etcd.endpoints", f"names {members} members", "run 3 or 5, and name them all"))
    files = {name: getattr(settings.etcd, name) for name in ("ca_file", "cert_file", "key_file")}
    for name, value in files.items():
        if value and not Path(value).is_file():
            found.append(Finding("problem", f"etcd.{name}", f"{value} isn't there", "name a file that this user can read"))
    if bool(files["cert_file"]) != bool(files["key_file"]):
        found.append(Finding("problem", "etcd", "a client certificate needs both cert_file and key_file", "set both or none"))
    for name, url in (("stripe.base_url", settings.stripe.base_url), ("aggregator_url", settings.aggregator_url)):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            found.append(Finding("problem", name, f"{url!r} is no address", "write it as https://host[:port]"))
    stripe = urlsplit(settings.stripe.base_url)
    if stripe.scheme == "http" and stripe.hostname not in ("127.0.0.1", "localhost", "::1"):
        found.append(Finding("problem", "stripe.base_url", "sends the secret key without TLS", "use https"))
    return found


def _rules(settings: Settings) -> list[Finding]:
    found = []
    local = settings.host in ("127.0.0.1", "::1", "localhost")
    if not settings.auth:
        level: Level = "warning" if local else "problem"
        found.append(
            Finding(level, "auth", f"is off, and services listen on {settings.host}: anybody may pay", "set auth = true")
        )
    if not 0 <= settings.fee.basis_points <= 10_000:
        found.append(
            Finding("problem", "fee.basis_points", f"{settings.fee.basis_points} is not within 0 and 10,000", "10 % is 1000")
        )
    if settings.fee.fixed_minor < 0:
        found.append(Finding("problem", "fee.fixed_minor", "is negative", "give the fee in minor units, 0 or more"))
    if not 0 < settings.poll.first_s <= settings.poll.max_s:
        found.append(Finding("problem", "poll", "first_s has to be over 0 and not over max_s", "the defaults are 5 and 300"))
    rates = {"default_rate_limit_per_s": settings.stripe.default_rate_limit_per_s, **settings.stripe.rate_limits_per_s}
    for name, rate in rates.items():
        if rate < 1:
            found.append(Finding("problem", f"stripe.{name}", f"{rate} a second is no rate", "Stripe's own default is 25"))
        elif rate > 100 and settings.stripe.base_url.startswith("https://api.stripe.com"):
            found.append(
                Finding("warning", f"stripe.{name}", f"{rate} a second is beyond Stripe's usual limit", "ask Stripe first")
            )
    if unknown := sorted(set(settings.stripe.rate_limits_per_s) - {"create", "confirm", "retrieve", "list", "other"}):
        found.append(
            Finding("problem", "stripe.rate_limits_per_s", f"there is no {', '.join(unknown)}", "see the settings' docstring")
        )
    if settings.client_keys and settings.slot_rate_limit_per_s == 0 and not local:
        advice = "set a limit, or client_keys = false"
        found.append(Finding("warning", "slot_rate_limit_per_s", "a client that chooses keys could aim at one slot", advice))
    return found
