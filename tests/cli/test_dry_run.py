"""What changes a cluster can say what it would do, and then does nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cli.main import main
from deploy import processes
from deploy.local import Cluster
from deploy.local.faults import mend
from deploy.local.layout import Layout, Memory
from deploy.local.ports import free_base
from deploy.local.supervisor import ProcessState, Supervisor, SupervisorAway
from deploy.node import SMALL_DISK_FILE

READERS = {
    "status", "doctor", "verify", "config check", "config show", "aggregator status", "chaos list", "keys pool", "payouts list",
    "payouts show", "payments list", "payments show", "apikeys list", "reshard status", "shards backups", "shards check-cache",
    "shards compare", "shards list", "shards show",
}  # fmt: skip
BUYERS = {"payments pay", "payments cancel", "payments refund", "keys issue"}
"""What anybody may call over HTTP: it changes no cluster."""
OWN_CLUSTER = {"demo", "chaos campaign"}
"""They make one, in a sub-folder that is theirs."""


def commands(command: click.Command, name: str, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for each in command.list_commands(context):
        found = command.get_command(context, each)
        assert found is not None
        yield from commands(found, f"{name} {each}".strip(), context)


def test_what_changes_a_cluster_has_a_dry_run() -> None:
    found = dict(commands(main, "", click.Context(main)))
    without = {name for name, command in found.items() if "--dry-run" not in [o for p in command.params for o in p.opts]}
    assert without == READERS | BUYERS | OWN_CLUSTER


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "home")


def call(layout: Layout, *arguments: str, base: int | None = None) -> Result:
    variables = {"ONCEPAY_HOME": str(layout.home), "ONCEPAY_PORT_BASE": str(base) if base is not None else None}
    return CliRunner().invoke(main, list(arguments), env=variables)


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    said: dict[str, Any] = json.loads(result.stdout)
    assert said["dry_run"] is True
    return said


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_up_says_what_it_would_start(layout: Layout) -> None:
    base = free_base()
    said = answer(call(layout, "up", "--dry-run", "--output", "json", base=base))
    assert (said["home"], said["new"], said["port_base"], said["ends"]) == (str(layout.home), True, base, [])
    assert said["shards"] == ["s0", "s1"]
    assert {"etcd", "nodes", "router"} <= set(said["parts"])
    assert {"port": base + 22, "purpose": "etcd-1, clients"} in said["ports"]
    text = call(layout, "up", "--dry-run", base=base).stdout
    assert f"would be started in {layout.home}" in text
    assert "etcd-1, clients" in text
    assert not layout.home.exists()


def test_up_makes_its_checks(layout: Layout, tmp_path: Path) -> None:
    with socket.socket() as listener:
        base = free_base()
        listener.bind(("127.0.0.1", base + 22))
        listener.listen()
        result = call(layout, "up", "--dry-run", "--only", "etcd", "--output", "json", base=base)
    assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (1, "local-cluster-port-taken")
    key = tmp_path / "key"
    key.write_text("sk_live_x")
    assert "live key" in call(layout, "up", "--dry-run", "--stripe-key-file", str(key)).stderr
    assert not layout.home.exists()
    (tmp_path / "logs").mkdir()
    assert "other things" in call(Layout(tmp_path), "up", "--dry-run").stderr


def test_up_writes_nothing_into_a_home_either(layout: Layout) -> None:
    base = free_base()
    layout.make()
    layout.remember(Memory(base, ("s0",), ("etcd",)))
    before = files(layout.home)
    assert answer(call(layout, "up", "--dry-run", "--output", "json"))["new"] is False
    result = call(layout, "up", "--dry-run", base=base + 70)
    assert (result.exit_code, "ONCEPAY_HOME" in result.stderr) == (1, True)
    assert files(layout.home) == before


@pytest.mark.parametrize("purge", [False, True], ids=["down", "purge"])
def test_down_says_what_it_would_stop_and_delete(layout: Layout, purge: bool) -> None:
    layout.make()
    layout.remember(Memory(9000, ("s0",)))
    (layout.home / "letters").touch()
    demo = Layout(layout.home / "demo")
    demo.make()
    demo.remember(Memory(9070, ("s0",)))
    before = files(layout.home)
    started = []
    for each in (layout, demo):
        marks = {processes.CLUSTER_ENV: str(each.home), processes.PROCESS_ENV: "router-1"}
        started.append(subprocess.Popen(["sleep", "60"], env={**os.environ, **marks}))
    try:
        command = ["down", *(["--purge"] if purge else []), "--dry-run"]
        said = answer(call(layout, *command, "--output", "json"))
        stops = [{"pid": started[0].pid, "name": "router-1", "home": str(layout.home)}]
        if purge:
            stops.append({"pid": started[1].pid, "name": "router-1", "home": str(demo.home)})
        assert sorted(said["stops"], key=lambda each: each["home"]) == stops
        assert said["running"] is True
        assert set(said["deletes"]) == ({str(path) for path in layout.data()} if purge else set())
        assert said["left"] == ([str(layout.home / "letters")] if purge else [])
        assert (str(demo.memory_file) in said["deletes"]) is purge
        text = call(layout, *command).stdout
        assert f"router-1 in {layout.home}" in text
        assert ("letters" in text) is purge
        assert [each.poll() for each in started] == [None, None]
        assert files(layout.home) == before
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_down_refuses_as_it_would(tmp_path: Path) -> None:
    (tmp_path / "letters").touch()
    result = call(Layout(tmp_path), "down", "--purge", "--dry-run", "--output", "json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (1, "local-cluster-home")


def test_heal_says_what_it_would_mend(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.make()
    layout.remember(Memory(9000, ("s0",)))
    marker = layout.node("s0-2") / SMALL_DISK_FILE
    marker.parent.mkdir()
    marker.touch()
    monkeypatch.setattr("deploy.local.cluster.Cluster.is_running", lambda _: True)
    states = {
        "router-1": ProcessState("router-1", "services", 0, "STOPPED"),
        "etcd-1": ProcessState("etcd-1", "etcd", 7, "RUNNING"),
    }
    monkeypatch.setattr(Supervisor, "states", lambda _: states)
    frozen = subprocess.Popen(["sleep", "60"], env={**os.environ, processes.CLUSTER_ENV: str(layout.home)})
    try:
        frozen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, frozen.pid, os.WSTOPPED)
        said = answer(call(layout, "chaos", "heal", "--dry-run", "--output", "json"))
        assert said == {"ok": True, "dry_run": True, "thawed": 1, "started": ["router-1"], "joins": [], "disks": ["s0-2"]}
        assert "router-1" in call(layout, "chaos", "heal", "--dry-run").stdout
        assert marker.exists()
        assert stands_still(frozen.pid)
        monkeypatch.setattr(Supervisor, "states", away)
        assert answer(call(layout, "chaos", "heal", "--dry-run", "--output", "json"))["started"] == []
        monkeypatch.setattr(Supervisor, "states", lambda _: {})
        assert mend(Cluster(layout.home)) == {"thawed": 1, "started": []}
        assert not marker.exists()
        deadline_s = time.monotonic() + 5
        while stands_still(frozen.pid) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert not stands_still(frozen.pid)
    finally:
        frozen.kill()
        frozen.wait()


def away(_: Supervisor) -> dict[str, ProcessState]:
    raise SupervisorAway


def stands_still(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
