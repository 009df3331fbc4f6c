"""etcd restored from a snapshot: its watermarks lie behind what was issued, and only `oncepay keys retire` makes that good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.keys import keys as keys_command
from keygen.blocks import LEASE_TTL_S
from keygen.pool import AHEAD_LEAST, STEP_PART
from oncepay.settings import EtcdSettings
from tests.etcd_fixture import ETCD, EtcdCluster
from tests.keygen.harness import Keygen

pytestmark = pytest.mark.cluster

ETCDCTL = str(Path(ETCD).with_name("etcdctl"))
ETCDUTL = str(Path(ETCD).with_name("etcdutl"))
ISSUED_AFTER = 50_000
BLOCK_KEYS = ("--block-keys", "200000")


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster(3) as made:
        yield made


def take(keygen: Keygen, count: int) -> list[str]:
    return [key for _ in range(count // 10_000) for key in keygen.issue(10_000)]


def save(cluster: EtcdCluster, snapshot: Path) -> None:
    command = [ETCDCTL, "--endpoints", cluster.members[0].client_url, "snapshot", "save", str(snapshot)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"ETCDCTL_API": "3"})


def restore(cluster: EtcdCluster, snapshot: Path) -> None:
    """As after a disaster: all members are gone with their data, and made anew from the snapshot."""
    cluster.kill()
    initial = ",".join(f"{member.name}={member.peer_url}" for member in cluster.members)
    for member in cluster.members:
        data_dir = cluster.folder / member.name
        shutil.rmtree(data_dir)
        command = [ETCDUTL, "snapshot", "restore", str(snapshot), "--data-dir", str(data_dir), "--name", member.name]
        command += ["--initial-cluster", initial, "--initial-advertise-peer-urls", member.peer_url]
        subprocess.run(command, check=True, capture_output=True)
    cluster.start()


def issued_around_a_snapshot(folder: Path, cluster: EtcdCluster, settings: EtcdSettings) -> list[str]:
    """Keys from before and after a snapshot that etcd was then restored from; no key service runs."""
    snapshot = folder / "snapshot.db"
    with Keygen(folder, settings, "keygen-1", *BLOCK_KEYS) as keygen:
        keygen.wait()
        keys = take(keygen, 20_000)
        save(cluster, snapshot)
        # More than was persisted ahead when the snapshot was taken.
        keys += take(keygen, AHEAD_LEAST + AHEAD_LEAST // STEP_PART + ISSUED_AFTER)
        assert keygen.stop() == 0
    restore(cluster, snapshot)
    return keys


def take_what_is_free(keygen: Keygen) -> list[str]:
    """More keys than a block has, so that they come from the block too whose owner is gone, if there is one."""
    keygen.wait()
    deadline = time.monotonic() + LEASE_TTL_S + 5
    while len(keygen.pool()["replicas"]) > 1:  # the snapshot brought the lease back too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return take(keygen, 400_000)


@pytest.mark.faults
def test_without_retiring_keys_would_come_twice(tmp_path: Path, cluster: EtcdCluster) -> None:
    """Why the next test's command is needed; when this fails, it isn't any more."""
    settings = cluster.settings()
    before = issued_around_a_snapshot(tmp_path, cluster, settings)
    with Keygen(tmp_path, settings, "keygen-2", *BLOCK_KEYS) as keygen:
        assert not set(before).isdisjoint(take_what_is_free(keygen))


def test_after_retiring_none_does(tmp_path: Path, cluster: EtcdCluster) -> None:
    settings = cluster.settings()
    keys = issued_around_a_snapshot(tmp_path, cluster, settings)
    with Keygen(tmp_path, settings, "keygen-2", *BLOCK_KEYS) as keygen:
        # Only for its settings file: it is gone before it can issue.
        keygen.kill()
        result = CliRunner().invoke(keys_command, ["retire", "--config", str(keygen.config), "--yes", "--output", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["retired"] >= 1
    with Keygen(tmp_path, settings, "keygen-3", *BLOCK_KEYS) as keygen:
        keys += take_what_is_free(keygen)
    assert len(set(keys)) == len(keys) > 550_000
