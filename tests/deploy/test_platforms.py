"""Nodes under systemd, Compose and Helm have the rules of the local cluster's, and Patroni takes their configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import patroni, platforms, processes, programs
from deploy.node import Wrapper
from tests.deploy.test_config import make_plan

PLATFORMS = sorted(platforms.PLATFORMS)
ASKED = ("--shard", "s0", "--node", "s0-1", "--host", "127.0.0.1", "--etcd", "127.0.0.1:2379", "--etcd", "127.0.0.1:2479")


def printed(platform: str, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.platforms", platform, *ASKED, *more], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_rules_are_those_of_the_local_cluster(platform: str, tmp_path: Path) -> None:
    local = json.loads(patroni.render(make_plan(tmp_path).node_config("s0", "s0-1")))
    found = printed(platform)
    sizes = {"shared_buffers", "max_wal_size", "min_wal_size", "max_slot_wal_keep_size", "io_method"}
    archive = {"archive_mode", "archive_command", "archive_timeout"}
    ours, theirs = found["bootstrap"]["dcs"], local["bootstrap"]["dcs"]
    for dcs in (ours, theirs):
        for name in sizes | archive:
            dcs["postgresql"]["parameters"].pop(name, None)
    assert ours == theirs
    assert found["bootstrap"]["initdb"] == local["bootstrap"]["initdb"]
    for name in ("mode", "safety_margin"):
        assert found["watchdog"][name] == local["watchdog"][name]
    assert found["namespace"] == local["namespace"]
    assert {user["username"] for user in found["postgresql"]["authentication"].values()} == {
        user["username"] for user in local["postgresql"]["authentication"].values()
    }


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_password_stands_in_it_and_everybody_needs_one(platform: str) -> None:
    found = printed(platform)
    assert '"password"' not in json.dumps(found)
    assert all(line.endswith("scram-sha-256") for line in found["postgresql"]["pg_hba"])


def test_a_machine_has_a_device_and_a_container_the_wrappers_pipe() -> None:
    assert printed("systemd")["watchdog"]["device"] == "/dev/watchdog"
    assert {printed(platform)["watchdog"]["driver"] for platform in ("compose", "helm")} == {"testing"}


@pytest.mark.parametrize("platform", [name for name, at in platforms.PLATFORMS.items() if at.watchdog_driver == "testing"])
def test_the_wrapper_makes_the_pipe_that_patroni_opens(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one folder that it is given; where no watchdog is made no node ever leads."""
    monkeypatch.setenv(processes.CLUSTER_ENV, str(tmp_path))
    monkeypatch.setenv(processes.PROCESS_ENV, "node-s0-1")
    found = printed(platform)
    pipe, data = (tmp_path / path.lstrip("/") for path in (found["watchdog"]["device"], found["postgresql"]["data_dir"]))
    data.mkdir(parents=True)
    wrapper = Wrapper(str(data.parent), 15.0, ["patroni", "patroni.yml"])
    os.close(wrapper.open_pipe())
    assert pipe.is_fifo()
    assert wrapper.data_dir == str(data)


def test_sizes_are_settable() -> None:
    parameters = printed("helm", "--shared-buffers", "8GB")["bootstrap"]["dcs"]["postgresql"]["parameters"]
    assert (parameters["shared_buffers"], parameters["max_wal_size"]) == ("8GB", "16GB")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_patroni_takes_it(platform: str, tmp_path: Path) -> None:
    """Its own validation; folders and programs of other machines are replaced by those of this one."""
    found = printed(platform)
    found["postgresql"] |= {"data_dir": str(tmp_path / "data"), "bin_dir": str(programs.postgres_bin())}
    found["postgresql"]["pgpass"] = str(tmp_path / "pgpass")
    for part, port in (("restapi", 8008), ("postgresql", 5432)):
        found[part]["connect_address"] = f"192.0.2.1:{port}"  # Patroni refuses addresses that others can't reach
    file = tmp_path / "patroni.yml"
    file.write_text(json.dumps(found))
    command = [str(Path(sys.executable).with_name("patroni")), "--validate-config", "--ignore-listen-port", str(file)]
    secrets = {f"PATRONI_{user}_PASSWORD": "x" for user in ("SUPERUSER", "REPLICATION", "RESTAPI")}
    environment = {**os.environ, **secrets, "PATRONI_RESTAPI_USERNAME": "oncepay"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "etcd" not in line.lower()]
    assert not complaints, done.stdout + done.stderr
