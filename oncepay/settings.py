"""Settings of a deployment: one TOML file that every service reads.

The file holds secrets (database passwords, provider keys), so it is kept with mode 0600. Every member has a
default that fits the local cluster; `load` names the file and the member when something is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from oncepay.errors import SettingsError

CONFIG_ENV = "ONCEPAY_CONFIG"


class EtcdSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach etcd. `endpoints` are `host:port`; `prefix` starts every key of this deployment."""

    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    prefix: str = "/oncepay"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class PostgresSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Database name and the password of each role, on every shard and on the aggregator's Postgres."""

    database: str = "oncepay"
    superuser: str = "postgres"
    superuser_password: str = ""
    router_password: str = ""
    worker_password: str = ""
    aggregator_password: str = ""
    operator_password: str = ""
    reader_password: str = ""
    mover_password: str = ""
    backup_password: str = ""


class PatroniSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The user that the REST API of each node's Patroni takes changes from: planned switchovers and restarts."""

    username: str = "oncepay"
    password: str = ""


class StripeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stripe's address and credentials.

    `rate_limits_per_s` holds the account's limit for each endpoint class (`create`, `confirm`, `retrieve`, `list`,
    `other`); Stripe's own default is 25 a second each.
    """

    base_url: str = "https://api.stripe.com"
    api_key: str = ""
    api_version: str = "2026-10-28.endive"
    webhook_secret_files: tuple[str, ...] = ()
    rate_limits_per_s: dict[str, int] = msgspec.field(default_factory=dict)
    default_rate_limit_per_s: int = 25
    timeout_s: float = 30.0


class TipaltiSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tipalti's address and credentials. Without a `base_url` payouts are exported and booked by hand.

    `notification_secret_files` hold the secrets that notifications are signed with; without one each notification is sent back
    to be verified. `token_url` and `verify_url` are of `base_url` where they are empty.
    """

    base_url: str = ""
    token_url: str = ""
    verify_url: str = ""
    client_id: str = ""
    client_secret: str = ""
    refresh_token: str = ""
    notification_secret_files: tuple[str, ...] = ()
    timeout_s: float = 30.0


class PayoutSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When sellers are paid, and what is held.

    `schedule` is `daily HH:MM` or `monday HH:MM` (any day of the week; UTC); empty: runs are started by hand. `hold_s` keeps
    the money of new charges back. `minimum_minor` is the smallest payout by currency (1 where none is named),
    `approval_above_minor` the amount above which a second operator has to agree (never where none is named). A pending payout
    is looked at after `poll_first_s`, then with growing gaps to `poll_max_s`.
    """

    schedule: str = ""
    hold_s: int = 0
    minimum_minor: dict[str, int] = msgspec.field(default_factory=dict)
    approval_above_minor: dict[str, int] = msgspec.field(default_factory=dict)
    poll_first_s: float = 2.0
    poll_max_s: float = 600.0


class FeeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The platform's fee for a seller that has none of its own: basis points of the item total plus a fixed part.

    `refunded` gives the platform's fee back with a refund, in proportion, also with one made at Stripe. `unknown_sellers`
    says what becomes of a cart that names a seller that was never put: it gets this fee, or is refused.
    """

    basis_points: int = 1000
    fixed_minor: int = 0
    refunded: bool = True
    unknown_sellers: Literal["default", "refuse"] = "default"


class EventSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Events out. `allow_private_networks` lets endpoints be in private networks, and be plain http: for development."""

    allow_private_networks: bool = False


class ReconcileSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reconciliation with Stripe and Tipalti: daily from the hour `daily_at_utc_h` on (-1: not by itself), the last `days` whole
    UTC days, and those since the last daily run that was done.

    What is younger than `grace_s` may still be on its way, and is no difference yet.
    """

    daily_at_utc_h: int = 4
    days: int = 3
    grace_s: int = 3600


class PollSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the worker asks Stripe about an open payment: first after `first_s`, then with growing gaps to `max_s`."""

    first_s: float = 5.0
    max_s: float = 300.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One deployment. `internal_token` is the secret by which services know one another.

    `slot_rate_limit_per_s` is how often one API key may submit payments of one slot, in each router; 0 is no limit. It is for
    deployments with `client_keys`: who chooses keys could aim at one slot. `audit_s` is how often, about, the aggregator compares
    a sample of what it derives with the shards; 0: never.
    """

    etcd: EtcdSettings = EtcdSettings()
    postgres: PostgresSettings = PostgresSettings()
    patroni: PatroniSettings = PatroniSettings()
    stripe: StripeSettings = StripeSettings()
    tipalti: TipaltiSettings = TipaltiSettings()
    payouts: PayoutSettings = PayoutSettings()
    fee: FeeSettings = FeeSettings()
    poll: PollSettings = PollSettings()
    reconcile: ReconcileSettings = ReconcileSettings()
    events: EventSettings = EventSettings()
    aggregator_url: str = "http://127.0.0.1:8082"
    aggregator_dsn: str = ""
    internal_token: str = ""
    host: str = "127.0.0.1"
    auth: bool = True
    client_keys: bool = True
    slot_rate_limit_per_s: float = 0.0
    audit_s: float = 300.0
    log_level: str = "info"


def load(path: str | os.PathLike[str] | None = None) -> Settings:
    """Read the settings file at `path`, or the one that the environment variable ONCEPAY_CONFIG names.

    Raises SettingsError when no file is named, it can't be read, or a member is unknown or of the wrong type.
    """
    name = path or os.environ.get(CONFIG_ENV)
    if not name:
        raise SettingsError(f"no settings file: pass --config FILE or set {CONFIG_ENV}")
    try:
        text = Path(name).read_bytes()
    except OSError as error:
        raise SettingsError(f"can't read the settings file {name}: {error.strerror}") from error
    try:
        return msgspec.toml.decode(text, type=Settings)
    except msgspec.DecodeError as error:
        raise SettingsError(f"settings file {name}: {error}") from error


def dump(settings: Settings) -> bytes:
    """The settings as TOML, as `load` reads them."""
    return msgspec.toml.encode(settings)
