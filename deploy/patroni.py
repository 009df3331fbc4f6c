"""Patroni's configuration of a shard's node: the one place where its rules for high availability are written down.

What holds a promise, and must not be loosened:
- `synchronous_mode: quorum` with `strict`: a commit waits for one of the two standbys, also when none is there.
- `primary_start_timeout: 0`: a crashed leader gives way at once.
- the watchdog is `required`: no node leads unless its Postgres dies when Patroni stops beating, before `ttl` ends.
- data checksums, and a logical slot that follows the leader.
- `archive_mode: always`: what a leader didn't get to archive, its standbys do (`deploy/archive.py`).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FEED_SLOT = "oncepay_feed"

LOOP_WAIT_S = 3
RETRY_TIMEOUT_S = 5
ANY_LAG_BYTES = 1 << 50
"""Who is elected is the quorum's to say. Log that waited for nobody, such as that of an index that was built, may be far more
than the standbys have: with a bound nobody would ever follow a leader that died with it."""
TTL_S = 20
WATCHDOG_MARGIN_S = 5
"""Postgres is dead this long before the leader's lease can end. It covers the time that one renewal may take."""
WATCHDOG_TIMEOUT_S = TTL_S - WATCHDOG_MARGIN_S
IDLE_IN_TRANSACTION_MS = 10_000

SIZES = frozenset(
    {"max_connections", "max_slot_wal_keep_size", "max_wal_size", "min_wal_size", "shared_buffers", "io_method"},
)
"""Parameters that depend on the machine."""
PROMISED = frozenset(
    {
        *("ttl", "loop_wait", "retry_timeout", "primary_start_timeout", "maximum_lag_on_failover"),
        *("synchronous_mode", "synchronous_mode_strict", "synchronous_node_count", "failsafe_mode"),
        *("synchronous_commit", "fsync", "full_page_writes", "wal_level", "wal_log_hints", "sync_replication_slots"),
    }
)
"""Rules without which an acknowledged payment can be lost, or a shard isn't taken over."""

assert TTL_S >= LOOP_WAIT_S + 2 * RETRY_TIMEOUT_S
assert WATCHDOG_TIMEOUT_S > LOOP_WAIT_S + 2 * RETRY_TIMEOUT_S, "a slow etcd would trip the watchdog of a live leader"


@dataclass(frozen=True)
class Credential:
    """A Postgres role, or a user of Patroni's REST API, with its password. Without one Patroni takes it from its environment."""

    username: str
    password: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"username": self.username} | ({"password": self.password} if self.password else {})


@dataclass(frozen=True)
class Tuning:
    """Sizes that depend on the machine. The defaults fit a laptop that runs six nodes."""

    shared_buffers: str = "128MB"
    """The pages of the indexes that payments touch at random (some 130 bytes for each payment that is there) should fit in."""
    max_wal_size: str = "1GB"
    """How much log lies between two checkpoints at most: after each, a page goes into the log whole when it is first touched."""
    min_wal_size: str = "64MB"
    max_connections: int = 200
    max_slot_wal_keep_size: str = "2GB"
    io_method: str = "sync"
    archive_timeout_s: int = 0
    """A segment of the log that isn't full is archived after this long; 0: only when it is full, or a backup asks for it."""


@dataclass(frozen=True)
class Node:
    """One node of a shard. `watchdog` is the named pipe that its wrapper reads, or a watchdog device.

    `host` is what others reach it by, `listen` the address that it listens on where that is another.

    `archive` is the folder of the shard's log, the same for all of its nodes; None: it is not archived. `restore` names the plan
    (`deploy/restore.py`) of a shard that is made from a backup; once made it is a shard like others.
    """

    name: str
    scope: str
    host: str
    postgres_port: int
    rest_port: int
    data_dir: Path
    pgpass: Path
    watchdog: Path
    bin_dir: Path
    superuser: Credential
    replication: Credential
    rest: Credential
    etcd_hosts: tuple[str, ...]
    namespace: str
    database: str
    watchdog_driver: str = "testing"
    client_network: str = "127.0.0.1/32"
    tuning: Tuning = field(default_factory=Tuning)
    archive: Path | None = None
    restore: Path | None = None
    listen: str = ""


ARCHIVE_SCRIPT = Path(__file__).resolve().with_name("archive.py")
RESTORE_SCRIPT = Path(__file__).resolve().with_name("restore.py")


def _archive_parameters(node: Node) -> dict[str, object]:
    if node.archive is None:
        return {}
    command = shlex.join([sys.executable, "-S", str(ARCHIVE_SCRIPT), "put", str(node.archive)]).replace("%", "%%")
    return {
        "archive_mode": "always",
        "archive_command": f'{command} "%p" "%f"',
        "archive_timeout": f"{node.tuning.archive_timeout_s}s",
    }


def _bootstrap_method(node: Node) -> dict[str, object]:
    """How the shard's first node gets its data: an empty database, or a backup."""
    if node.restore is not None:
        command = shlex.join([sys.executable, "-S", str(RESTORE_SCRIPT), str(node.restore)])
        return {"method": "oncepay_restore", "oncepay_restore": {"command": command}}
    create_database = [str(node.bin_dir / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
    create_database += ["-c", f'CREATE DATABASE "{node.database}"']
    options = [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"auth": "scram-sha-256"}, "data-checksums"]
    return {"initdb": options, "post_bootstrap": shlex.join(create_database)}


def _shared_parameters(tuning: Tuning) -> dict[str, object]:
    """Postgres' parameters that all nodes of the shard share; Patroni keeps them in etcd."""
    return {
        "wal_level": "logical",
        "wal_log_hints": True,
        "max_connections": tuning.max_connections,
        "max_worker_processes": 16,
        "max_wal_senders": 20,
        "max_replication_slots": 20,
        "max_active_replication_origins": 20,
        "max_logical_replication_workers": 8,
        # The slots of moves follow the leader by Postgres' own means: Patroni would start standbys anew for a slot that is new.
        "sync_replication_slots": True,
        "max_slot_wal_keep_size": tuning.max_slot_wal_keep_size,
        "synchronous_commit": "on",
        "full_page_writes": True,
        "fsync": True,
        "wal_init_zero": False,
        "hot_standby_feedback": True,
        "wal_sender_timeout": "15s",
        "wal_receiver_timeout": "15s",
        "wal_receiver_status_interval": "2s",
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_MS}ms",
        "checkpoint_timeout": "30min",
        "autovacuum_naptime": "15s",
        # A fifth of Postgres' default speed: payments wait for the log that a vacuum writes (decision 0103).
        "autovacuum_vacuum_cost_delay": "10ms",
        "max_wal_size": tuning.max_wal_size,
        "min_wal_size": tuning.min_wal_size,
        "shared_buffers": tuning.shared_buffers,
        "io_method": tuning.io_method,
        "jit": False,
        "password_encryption": "scram-sha-256",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": False,
        "log_line_prefix": "%m [%p] %q%u@%d ",
        "unix_socket_directories": "",
    }


def dynamic(node: Node) -> dict[str, object]:
    """What all nodes of the shard share, which Patroni keeps in etcd: it reads `bootstrap.dcs` once, when the shard is made."""
    return {
        **_RULES,
        "slots": {FEED_SLOT: {"type": "logical", "database": node.database, "plugin": "pgoutput"}},
        "postgresql": {
            "use_pg_rewind": True,
            "use_slots": True,
            "parameters": _shared_parameters(node.tuning) | _archive_parameters(node),
        },
    }


def merged(kept: Mapping[str, object], wanted: Mapping[str, object]) -> dict[str, object]:
    """What is kept in etcd, with what is wanted in it; other members (`pause`, for example) stay."""
    result = dict(kept)
    for name, value in wanted.items():
        before = kept.get(name)
        result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def broken_rules(kept: Mapping[str, object]) -> list[tuple[str, object, object, bool]]:
    """Rules that what is kept in etcd breaks: `(its name, as it is, as it should be, whether a promise rests on it)`.

    Sizes, and where the log is archived, differ from deployment to deployment, and are no rules.
    """
    found = []
    postgresql = kept.get("postgresql")
    parameters = postgresql.get("parameters") if isinstance(postgresql, dict) else None
    for rules, values in ((_RULES, kept), (_PARAMETER_RULES, parameters if isinstance(parameters, dict) else {})):
        for name, wanted in rules.items():
            if _plain(values.get(name)) != _plain(wanted):
                found.append((name, values.get(name), wanted, name in PROMISED))
    return found


def _plain(value: object) -> str:
    """A value as it is written: `on` is true, and 15000ms are 15s."""
    text = {"on": "true", "off": "false"}.get(str(value).lower(), str(value).lower())
    number = text.removesuffix("ms")
    return f"{int(number) // 1000}s" if number != text and number.isdigit() and int(number) % 1000 == 0 else text


def configuration(node: Node) -> dict[str, object]:
    """What `node`'s Patroni reads."""
    hba = [f"host {database} all {node.client_network} scram-sha-256" for database in ("all", "replication")]
    return {
        "scope": node.scope,
        "namespace": node.namespace,
        "name": node.name,
        "log": {"level": "INFO", "deduplicate_heartbeat_logs": True},
        "restapi": {
            "listen": f"{node.listen or node.host}:{node.rest_port}",
            "connect_address": f"{node.host}:{node.rest_port}",
        }
        | ({"authentication": node.rest.as_dict()} if node.rest.password else {}),
        "etcd3": {"hosts": list(node.etcd_hosts)},
        "bootstrap": {
            "dcs": dynamic(node),
            **_bootstrap_method(node),
        },
        "postgresql": {
            "listen": f"{node.listen or node.host}:{node.postgres_port}",
            "connect_address": f"{node.host}:{node.postgres_port}",
            "data_dir": str(node.data_dir),
            "bin_dir": str(node.bin_dir),
            "pgpass": str(node.pgpass),
            "authentication": {"superuser": node.superuser.as_dict(), "replication": node.replication.as_dict()},
            "pg_hba": hba,
            "basebackup": [{"checkpoint": "fast"}],
        },
        "watchdog": {
            "mode": "required",
            "driver": node.watchdog_driver,
            "device": str(node.watchdog),
            "safety_margin": WATCHDOG_MARGIN_S,
        },
    }


_RULES: dict[str, object] = {
    "ttl": TTL_S,
    "loop_wait": LOOP_WAIT_S,
    "retry_timeout": RETRY_TIMEOUT_S,
    "maximum_lag_on_failover": ANY_LAG_BYTES,
    "primary_start_timeout": 0,
    "synchronous_mode": "quorum",
    "synchronous_mode_strict": True,
    "synchronous_node_count": 1,
    "failsafe_mode": True,
}
_PARAMETER_RULES = {name: value for name, value in _shared_parameters(Tuning()).items() if name not in SIZES}


def render(node: Node) -> str:
    """The configuration file's text. JSON is YAML, so Patroni reads it."""
    return json.dumps(configuration(node), indent=2) + "\n"
