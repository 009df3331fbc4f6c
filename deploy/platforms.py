"""A node's Patroni configuration under systemd, in Compose and in Helm: what `deploy/patroni.py` says, on other paths.

    python -m deploy.platforms systemd --shard s0 --node s0-1 --host 10.0.0.21 --etcd 10.0.0.11:2379 > s0-1.yml
    python -m deploy.platforms helm --shard s0 --node s0-1 --host s0-1.s0 --etcd etcd-0.etcd:2379 > s0-1.yml

Passwords don't stand in it: Patroni takes them from PATRONI_SUPERUSER_PASSWORD, PATRONI_REPLICATION_PASSWORD and
PATRONI_RESTAPI_PASSWORD (with PATRONI_RESTAPI_USERNAME). Under systemd the machine's watchdog device is used, and Patroni doesn't
lead without one; in containers, which have none, the wrapper `deploy/node.py` reads a named pipe as it does in the local cluster,
and kills Postgres in time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.patroni import Credential, Node, Tuning, render
from oncepay.settings import Settings

POSTGRES_PORT, REST_PORT = 5432, 8008
EVERYWHERE = "0.0.0.0"  # noqa: S104  (of the node's own network; pg_hba and passwords decide who gets in)
PRODUCTION = Tuning("4GB", "16GB", min_wal_size="1GB", max_slot_wal_keep_size="64GB", io_method="worker")
"""For a machine of 16 GiB; `--shared-buffers` for others: a quarter of its memory."""


@dataclass(frozen=True)
class Platform:
    """Where things are. `clients` are the addresses that pg_hba lets in, with a password; `{node}` is the node's name."""

    data_dir: str
    pgpass: str
    watchdog: str
    watchdog_driver: str
    bin_dir: str
    listen: str
    clients: str


PLATFORMS = {
    "systemd": Platform(
        "/var/lib/oncepay/{node}/data", "/run/oncepay-{node}/pgpass", "/dev/watchdog", "default", "/usr/lib/postgresql/18/bin",
        EVERYWHERE, "samenet",
    ),
    "compose": Platform(
        "/var/lib/postgresql/data", "/run/oncepay/pgpass", "/var/lib/postgresql/watchdog", "testing",
        "/usr/lib/postgresql/18/bin", EVERYWHERE, "samenet",
    ),
    "helm": Platform(
        "/var/lib/postgresql/data", "/run/oncepay/pgpass", "/var/lib/postgresql/watchdog", "testing",
        "/usr/lib/postgresql/18/bin", EVERYWHERE, "all",
    ),
}  # fmt: skip


def node_for(platform: str, *, shard: str, node: str, host: str, etcd: Sequence[str], shared_buffers: str = "") -> Node:
    """A node on a platform. `host` is what the others and the services reach it by, `etcd` members as `host:port`."""
    at, defaults = PLATFORMS[platform], Settings()
    tuning = Tuning(**{**vars(PRODUCTION), "shared_buffers": shared_buffers}) if shared_buffers else PRODUCTION
    return Node(
        name=node,
        scope=shard,
        host=host,
        postgres_port=POSTGRES_PORT,
        rest_port=REST_PORT,
        data_dir=Path(at.data_dir.format(node=node)),
        pgpass=Path(at.pgpass.format(node=node)),
        watchdog=Path(at.watchdog),
        bin_dir=Path(at.bin_dir),
        superuser=Credential(defaults.postgres.superuser),
        replication=Credential("oncepay_replication"),
        rest=Credential("oncepay"),
        etcd_hosts=tuple(etcd),
        namespace=f"{defaults.etcd.prefix}/patroni/",
        database=defaults.postgres.database,
        watchdog_driver=at.watchdog_driver,
        client_network=at.clients,
        tuning=tuning,
        listen=at.listen,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the configuration that is asked for."""
    epilog = "example: python -m deploy.platforms helm --shard s0 --node s0-1 --host s0-1.s0 --etcd etcd-0.etcd:2379"
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m deploy.platforms", description=about, epilog=epilog)
    parser.add_argument("platform", choices=sorted(PLATFORMS))
    parser.add_argument("--shard", required=True, help="the shard's name, Patroni's scope")
    parser.add_argument("--node", required=True, help="the node's name, unlike any other")
    parser.add_argument("--host", required=True, help="the name or address that others reach it by")
    parser.add_argument("--etcd", required=True, action="append", help="a member of etcd as host:port; once for each")
    parser.add_argument("--shared-buffers", default="", help=f"Postgres' own cache (default: {PRODUCTION.shared_buffers})")
    given = parser.parse_args(arguments)
    asked = {name: getattr(given, name) for name in ("shard", "node", "host", "etcd", "shared_buffers")}
    sys.stdout.write(render(node_for(given.platform, **asked)))


if __name__ == "__main__":
    main()
