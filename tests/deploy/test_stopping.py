"""What is asked of a cluster whose supervisor is ending everything, and of one that somebody else is starting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from deploy import processes
from deploy.local import AlreadyRunning, Cluster, cluster
from deploy.local.layout import Layout, Memory
from deploy.local.ports import free_base
from deploy.local.supervisor import Supervisor, SupervisorStops

SUPERVISOR = """
import os, signal, socketserver, subprocess, sys, threading, time, xmlrpc.client
from http.server import BaseHTTPRequestHandler

socket, data = sys.argv[1:]
asked = threading.Event()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return ""
    def log_message(self, *_): pass
    def do_POST(self):
        if b"supervisor.shutdown" in self.rfile.read(int(self.headers["Content-Length"])):
            asked.set()
        body = xmlrpc.client.dumps(xmlrpc.client.Fault(6, "SHUTDOWN_STATE"), methodresponse=True).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

program = ["sh", "-c", "trap 'sleep 0.5; echo > clean; exit' TERM; echo > started; while :; do sleep 0.1; done"]
node = subprocess.Popen(program, cwd=data, env=dict(os.environ, ONCEPAY_PROCESS="node-s0-1"))
while not os.path.exists(os.path.join(data, "started")):
    time.sleep(0.02)
server = Server(socket, Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
asked.wait()
time.sleep(1)
node.terminate()
node.wait()
"""
"""A supervisor that was told to stop: every call gets a fault, and a second after another `down` all of it has ended."""
HOLDER = (
    "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def home(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "home")
    layout.make()
    layout.remember(Memory(free_base(), ("s0",), ("etcd",)))
    return layout


@pytest.fixture
def stopping(home: Layout) -> Iterator[Layout]:
    """A cluster that is being stopped."""
    variables = {**os.environ, processes.CLUSTER_ENV: str(home.home)}
    variables.pop(processes.PROCESS_ENV, None)
    home.make_socket_folder()
    command = [sys.executable, "-c", SUPERVISOR, str(home.supervisor_socket), str(home.state)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        home.supervisor_pid.write_text(str(process.pid))
        yield home
        process.kill()
    Cluster(home.home).down()


@contextmanager
def held(home: Layout) -> Iterator[int]:
    """Another process has the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(home.lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.kill()


def test_a_supervisor_that_stops_is_told_from_one_that_is_away(stopping: Layout) -> None:
    with pytest.raises(SupervisorStops, match="being stopped"):
        Supervisor(stopping).states()


def test_status_says_that_the_cluster_stops(stopping: Layout) -> None:
    environment = {"ONCEPAY_HOME": str(stopping.home)}
    result = CliRunner().invoke(main, ["status", "--output", "json"], env=environment)
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["stopping"] is True
    assert {each["pid"] for each in said["processes"]} == {None}
    assert "being stopped" in CliRunner().invoke(main, ["status"], env=environment).stdout


def test_a_second_down_waits_for_the_first(stopping: Layout) -> None:
    assert Cluster(stopping.home).down() is True
    assert (stopping.state / "clean").exists(), "a process was killed while it ended"
    assert not stopping.supervisor_pid.exists()


@pytest.mark.parametrize("command", [["up"], ["chaos", "heal"], ["chaos", "heal", "--dry-run"]], ids=" ".join)
def test_other_commands_say_what_is_wrong(stopping: Layout, command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--output", "json"], env={"ONCEPAY_HOME": str(stopping.home)})
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] in ("local-cluster-running", "local-cluster-stopping")


@pytest.mark.parametrize("purge", [False, True], ids=["down", "purge"])
def test_down_leaves_what_a_starting_up_has_made(home: Layout, monkeypatch: pytest.MonkeyPatch, purge: bool) -> None:
    monkeypatch.setattr(cluster, "LOCK_WAIT_S", 0.3)
    made = [home.supervisor_pid, home.supervisor_socket]
    home.make_socket_folder()
    for path in made:
        path.write_text("4194303")
    with held(home) as pid:
        with pytest.raises(AlreadyRunning, match=f"pid {pid}: .*python"):
            Cluster(home.home).down(purge=purge)
        assert all(path.exists() for path in made)
    assert Cluster(home.home).down(purge=purge) is False
    assert not any(path.exists() for path in made)


def test_down_waits_for_an_up_that_gives_up(home: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    home.supervisor_pid.write_text("4194303")
    with held(home) as pid:
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            os.kill(pid, 9)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        monkeypatch.setattr("deploy.local.cluster.time.sleep", sleep)
        assert Cluster(home.home).down() is False
    assert len(slept) == 1
    assert not home.supervisor_pid.exists()


def test_an_up_is_told_who_is_at_work(home: Layout) -> None:
    with held(home) as pid, pytest.raises(AlreadyRunning, match=f"pid {pid}: "):
        Cluster(home.home).up()


def test_down_makes_no_lock_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "letters").touch()
    assert Cluster(tmp_path).down() is False
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_the_holders_of_a_lock_are_those_of_that_file(tmp_path: Path, home: Layout) -> None:
    another = tmp_path / "another.lock"
    another.touch()
    with held(home) as pid:
        assert processes.lock_holders(home.lock) == [pid]
        assert processes.lock_holders(another) == []
    assert processes.lock_holders(tmp_path / "none") == []
