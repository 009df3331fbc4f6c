"""Snapshots of etcd: saved and checked, and made into members' data again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from deploy.programs import etcd_binary
from oncepay.errors import OncepayError
from oncepay.settings import EtcdSettings

FORGOTTEN = ("leader", "sync", "status", "failsafe", "failover", "history", "members/")
"""Of Patroni's keys of a shard, what must not be believed of an old snapshot: who led, and above all who was in the quorum. What
stays are the shard's configuration and the id of its data."""


class SnapshotFailed(OncepayError):
    """The snapshot can't be made or used."""

    slug = "etcd-snapshot-failed"


class Snapshot(msgspec.Struct, frozen=True):
    """What a snapshot holds, after its checksum was compared."""

    revision: int
    keys: int
    size_bytes: int


def _program(name: str) -> str:
    return str(etcd_binary().with_name(name))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise SnapshotFailed(f"{Path(command[0]).name}: {words[0]}")
    return done.stdout


def save(settings: EtcdSettings, path: Path) -> Snapshot:
    """Save a snapshot of the first member that gives one, whole or not at all, readable by its owner alone.

    It holds all secrets that etcd holds: the seeds of keys too. Raises SnapshotFailed.
    """
    if path.exists():
        raise SnapshotFailed(f"{path} is there already")
    unfinished = path.with_name(path.name + ".new")
    secure = bool(settings.ca_file)
    tls = ["--cacert", settings.ca_file] if secure else []
    tls += ["--cert", settings.cert_file, "--key", settings.key_file] if settings.cert_file else []
    reasons = []
    for endpoint in settings.endpoints:
        url = f"{'https' if secure else 'http'}://{endpoint}"
        unfinished.unlink(missing_ok=True)
        try:
            _run([_program("etcdctl"), "--endpoints", url, *tls, "snapshot", "save", str(unfinished)])
            unfinished.chmod(0o600)
            found = look(unfinished)
            unfinished.rename(path)
            return found
        except SnapshotFailed as error:
            reasons.append(f"{endpoint}: {error}")
    raise SnapshotFailed("; ".join(reasons))


def look(path: Path) -> Snapshot:
    """Check the snapshot, and say what it holds. Raises SnapshotFailed."""
    if not path.is_file():
        raise SnapshotFailed(f"{path} isn't there")
    told = json.loads(_run([_program("etcdutl"), "snapshot", "status", str(path), "--write-out=json"]))
    return Snapshot(revision=told["revision"], keys=told["totalKey"], size_bytes=told["totalSize"])


def make_member(path: Path, data_dir: Path, *, name: str, peer_url: str, initial_cluster: str, token: str) -> None:
    """A member's data out of a snapshot; all members of a cluster are made from the same one. Raises SnapshotFailed."""
    command = [_program("etcdutl"), "snapshot", "restore", str(path), "--data-dir", str(data_dir), "--name", name]
    command += ["--initial-cluster", initial_cluster, "--initial-advertise-peer-urls", peer_url, "--initial-cluster-token", token]
    _run(command)
