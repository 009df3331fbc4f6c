"""The secrets of a local cluster, made once and kept with mode 0600, and the settings file that carries them."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import msgspec

from deploy.local.errors import WrongHome
from deploy.local.layout import Layout, Memory, write_secret
from deploy.local.ports import ETCD_MEMBERS, Ports
from oncepay.settings import (
    EtcdSettings,
    EventSettings,
    PatroniSettings,
    PostgresSettings,
    Settings,
    StripeSettings,
    TipaltiSettings,
    dump,
)

STAND_IN_RATE_PER_S = 1000
REAL_STRIPE_RATE_PER_S = 25
API_KEY_SCOPES = ("pay", "read", "refund", "operate")


def _token() -> str:
    return secrets.token_hex(24)


class Passwords(msgspec.Struct, frozen=True):
    """One password a role. Members added later are made when the file is next read."""

    superuser: str = msgspec.field(default_factory=_token)
    replication: str = msgspec.field(default_factory=_token)
    patroni_rest: str = msgspec.field(default_factory=_token)
    router: str = msgspec.field(default_factory=_token)
    worker: str = msgspec.field(default_factory=_token)
    aggregator: str = msgspec.field(default_factory=_token)
    operator: str = msgspec.field(default_factory=_token)
    reader: str = msgspec.field(default_factory=_token)
    mover: str = msgspec.field(default_factory=_token)
    backup: str = msgspec.field(default_factory=_token)
    internal: str = msgspec.field(default_factory=_token)
    stripe_key: str = msgspec.field(default_factory=lambda: "sk_test_local" + _token())
    api_key: str = msgspec.field(default_factory=lambda: "oncepay_local_" + _token())
    tipalti_notifications: str = msgspec.field(default_factory=_token)


def load_or_make(layout: Layout, *, keep: bool = True) -> Passwords:
    """The home's secrets, which are written when they are new and `keep`. Raises WrongHome when their file can't be read."""
    kept = b""
    try:
        kept = layout.passwords.read_bytes()
        passwords = msgspec.json.decode(kept, type=Passwords)
    except FileNotFoundError:
        passwords = Passwords()
    except (OSError, msgspec.DecodeError) as error:
        raise WrongHome(f"can't read {layout.passwords}: {error}") from error
    if keep and kept != (encoded := msgspec.json.encode(passwords)):
        write_secret(layout.passwords, encoded)
        write_secret(layout.api_key, passwords.api_key.encode() + b"\n")
        write_secret(layout.tipalti_notifications, passwords.tipalti_notifications.encode() + b"\n")
    return passwords


def api_key_record(api_key: str) -> tuple[str, dict[str, object]]:
    """The hash under which an API key is kept in etcd, and what is kept."""
    return hashlib.sha256(api_key.encode()).hexdigest(), {
        "name": "local",
        "scopes": list(API_KEY_SCOPES),
        "rate_limit_per_s": 0,
    }


def read_key(path: str) -> str:
    """The secret key in the file. Raises WrongHome when it can't be read, or isn't one of a test account."""
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise WrongHome(f"can't read the Stripe key file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        key = ""
    if key.startswith(("sk_live_", "rk_live_")):
        raise WrongHome(
            f"{path} holds a live key, and a local cluster would move real money with it: "
            "take one of a Stripe test account (sk_test_… or rk_test_…)"
        )
    if not key.startswith(("sk_test_", "rk_test_")):
        raise WrongHome(f"{path} doesn't hold a secret key of a Stripe test account (sk_test_… or rk_test_…)")
    return key


def stripe_settings(layout: Layout, ports: Ports, passwords: Passwords, memory: Memory) -> StripeSettings:
    """The stand-in's address and key, or those of the account whose key file was given."""
    if not memory.stripe_key_file:
        return StripeSettings(
            base_url=f"http://127.0.0.1:{ports.stripe}",
            api_key=passwords.stripe_key,
            webhook_secret_files=(str(layout.stripe_webhook_secret),),
            default_rate_limit_per_s=STAND_IN_RATE_PER_S,
        )
    webhook_secret = memory.stripe_webhook_secret_file
    return StripeSettings(
        api_key=read_key(memory.stripe_key_file),
        webhook_secret_files=(webhook_secret,) if webhook_secret else (),
        default_rate_limit_per_s=REAL_STRIPE_RATE_PER_S,
    )


def postgres_dsn(user: str, password: str, port: int, database: str, host: str = "127.0.0.1") -> str:
    return f"postgresql://{user}:{password}@{host}:{port}/{database}"


def make_settings(layout: Layout, ports: Ports, passwords: Passwords, memory: Memory) -> Settings:
    """The settings that all services of this cluster share. Raises WrongHome for an unusable Stripe key."""
    postgres = PostgresSettings(
        superuser_password=passwords.superuser,
        router_password=passwords.router,
        worker_password=passwords.worker,
        aggregator_password=passwords.aggregator,
        operator_password=passwords.operator,
        reader_password=passwords.reader,
        mover_password=passwords.mover,
        backup_password=passwords.backup,
    )
    return Settings(
        etcd=EtcdSettings(endpoints=tuple(f"127.0.0.1:{ports.etcd_client(member)}" for member in range(ETCD_MEMBERS))),
        postgres=postgres,
        patroni=PatroniSettings(password=passwords.patroni_rest),
        stripe=stripe_settings(layout, ports, passwords, memory),
        tipalti=TipaltiSettings(
            base_url=f"http://127.0.0.1:{ports.tipalti}",
            client_id="local",
            refresh_token="rt_test_local",  # noqa: S106 (the stand-in takes any that begins so)
            notification_secret_files=(str(layout.tipalti_notifications),),
        ),
        aggregator_url=f"http://127.0.0.1:{ports.aggregator}",
        aggregator_dsn=postgres_dsn("oncepay_aggregator", passwords.aggregator, ports.aggregator_postgres, postgres.database),
        internal_token=passwords.internal,
        events=EventSettings(allow_private_networks=True),
    )


def write_settings(layout: Layout, settings: Settings) -> None:
    write_secret(layout.settings, dump(settings))
