"""The wrapper's watchdog, and how processes of a node are told from others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import processes
from deploy.local.parts import project_root
from deploy.node import SMALL_DISK_FILE, Beat, Wrapper
from tests.needs import needs

TIMEOUT_S = 15.0


def test_no_deadline_before_patroni_leads() -> None:
    assert Beat(TIMEOUT_S).deadline_s is None


def test_activation_and_beats_move_the_deadline() -> None:
    beat = Beat(TIMEOUT_S)
    beat.feed(b"Ctimeout=15\n", 100.0)
    assert beat.deadline_s == 115.0
    beat.feed(b"1", 103.0)
    assert beat.deadline_s == 118.0


def test_a_proper_close_ends_the_watch_and_a_new_term_starts_it_again() -> None:
    beat = Beat(TIMEOUT_S)
    beat.feed(b"Ctimeout=15\n1V", 100.0)
    assert beat.deadline_s is None
    beat.feed(b"Ctimeout=15\n", 200.0)
    assert beat.deadline_s == 215.0


def test_a_shorter_timeout_is_taken_and_a_longer_one_is_not() -> None:
    beat = Beat(TIMEOUT_S)
    beat.feed(b"Ctimeout=60\n", 0.0)
    assert beat.deadline_s == 15.0
    beat.feed(b"Ctimeout=5\n", 0.0)
    assert beat.deadline_s == 5.0


@given(st.lists(st.sampled_from([b"Ctimeout=7\n", b"1", b"V"]), min_size=1), st.data())
def test_reads_may_be_cut_anywhere(writes: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(writes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    cut, uncut = Beat(TIMEOUT_S), Beat(TIMEOUT_S)
    uncut.feed(whole, 1.0)
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        cut.feed(whole[start:end], 1.0)
    assert (cut.deadline_s, cut.timeout_s) == (uncut.deadline_s, uncut.timeout_s)


def test_data_that_lie_elsewhere_are_known_by_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process' working directory, by which a node's Postgres is found, has no links in it."""
    monkeypatch.setenv(processes.CLUSTER_ENV, str(tmp_path))
    monkeypatch.setenv(processes.PROCESS_ENV, "node-test-1")
    (tmp_path / "disk").mkdir()
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "data").symlink_to(tmp_path / "disk")
    assert Wrapper(str(tmp_path / "node"), TIMEOUT_S, ["patroni", "patroni.yml"]).data_dir == str(tmp_path / "disk")


HOME_IN_TEST = f"/nowhere/oncepay-test-{os.getpid()}"
NAME = "node-test-1"
SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


@pytest.fixture
def marked() -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, processes.CLUSTER_ENV: HOME_IN_TEST, processes.PROCESS_ENV: NAME}
    child = subprocess.Popen(SLEEPER, env=environment)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_marked_process_is_found_and_ended(marked: subprocess.Popen[bytes]) -> None:
    def match(pid: int) -> bool:
        return processes.is_marked(pid, HOME_IN_TEST, NAME)

    assert processes.find(match) == [marked.pid]
    assert not processes.is_marked(marked.pid, HOME_IN_TEST, "node-test-2")
    assert not processes.is_marked(marked.pid, HOME_IN_TEST + "/below")
    assert processes.end(match)
    assert marked.wait(5) == -signal.SIGKILL
    assert processes.find(match) == []


def freeze(process: subprocess.Popen[bytes]) -> None:
    """Return when it has stopped: a SIGTERM that comes before is taken first."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_a_frozen_process_is_ended_too(marked: subprocess.Popen[bytes]) -> None:
    freeze(marked)
    assert processes.end(lambda pid: processes.is_marked(pid, HOME_IN_TEST), wait_s=5)
    assert not processes.is_alive(marked.pid)


def test_a_process_that_stays_is_reported(marked: subprocess.Popen[bytes]) -> None:
    freeze(marked)
    started_s = time.monotonic()
    assert not processes.end(lambda pid: pid == marked.pid, number=signal.SIGTERM, wait_s=0.3)
    assert time.monotonic() - started_s < 3


class Wrapped:
    """The wrapper around a program that takes Patroni's place, to see what it does when that one ends."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            "PYTHONPATH": str(project_root()),
            processes.CLUSTER_ENV: str(folder),
            processes.PROCESS_ENV: NAME,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-m", "deploy.node", str(folder), "1", sys.executable, "-c", script],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def line(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def left(self) -> list[int]:
        found = processes.find(lambda pid: processes.is_marked(pid, str(self.folder), NAME))
        return [pid for pid in found if pid != self.process.pid]


@pytest.fixture
def wrap(tmp_path: Path) -> Iterator[list[Wrapped]]:
    made: list[Wrapped] = []
    try:
        yield made
    finally:
        for each in made:
            each.process.kill()
            each.process.communicate()
            processes.end(lambda pid, each=each: processes.is_marked(pid, str(each.folder), NAME))  # type: ignore[misc]


ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"


def test_what_the_program_left_dies_with_it(tmp_path: Path, wrap: list[Wrapped]) -> None:
    wrapped = Wrapped(tmp_path, ORPHAN + "print('ready', flush=True); import signal; signal.pause()")
    wrap.append(wrapped)
    assert wrapped.line() == b"ready"
    program = int((tmp_path / "patroni.pid").read_text())
    assert len(wrapped.left()) == 2
    os.kill(program, signal.SIGKILL)
    assert wrapped.process.wait(5) == 1
    assert wrapped.left() == []


def test_a_program_that_stops_beating_is_killed(tmp_path: Path, wrap: list[Wrapped]) -> None:
    beat_once = (
        f"import os; os.write(os.open({str(tmp_path / 'watchdog')!r}, os.O_WRONLY), b'Ctimeout=1\\n');"
        "print('ready', flush=True); import signal; signal.pause()"
    )
    wrapped = Wrapped(tmp_path, beat_once)
    wrap.append(wrapped)
    assert wrapped.line() == b"ready"
    assert wrapped.process.wait(5) == 1
    assert wrapped.left() == []
    assert b"has not beaten for 1 s" in wrapped.process.communicate()[1]


def test_a_program_that_never_led_is_left_alone(tmp_path: Path, wrap: list[Wrapped]) -> None:
    wrapped = Wrapped(tmp_path, "print('ready', flush=True); import signal; signal.pause()")
    wrap.append(wrapped)
    assert wrapped.line() == b"ready"
    with pytest.raises(subprocess.TimeoutExpired):
        wrapped.process.wait(2)
    wrapped.process.terminate()
    assert wrapped.process.wait(5) == 0
    wrapped.process.terminate()
    assert wrapped.process.wait(5) == 0


def test_a_new_wrapper_ends_what_a_killed_one_left(tmp_path: Path, wrap: list[Wrapped]) -> None:
    script = "print('ready', flush=True); import signal; signal.pause()"
    first = Wrapped(tmp_path, script)
    wrap.append(first)
    assert first.line() == b"ready"
    left = int((tmp_path / "patroni.pid").read_text())
    first.process.kill()
    first.process.wait()
    assert processes.is_alive(left)
    second = Wrapped(tmp_path, script)
    wrap.append(second)
    assert second.line() == b"ready"
    assert not processes.is_alive(left)


BEATS = (
    "import os, time; pipe = os.open({pipe!r}, os.O_WRONLY); os.write(pipe, b'Ctimeout=1\\n'); print('ready', flush=True)\n"
    "while True:\n    os.write(pipe, b'1'); time.sleep(0.1)"
)


@needs(os.geteuid() == 0, "root, for a disk in a mount namespace")
def test_a_leader_on_a_disk_that_is_nearly_full_gives_way_but_not_again_at_once(tmp_path: Path, wrap: list[Wrapped]) -> None:
    (tmp_path / SMALL_DISK_FILE).write_text("1", encoding="ascii")
    script = BEATS.format(pipe=str(tmp_path / "watchdog"))
    first = Wrapped(tmp_path, script)
    wrap.append(first)
    assert first.process.wait(10) == 0
    assert b"this leader gives way" in first.process.communicate()[1]
    second = Wrapped(tmp_path, script)
    wrap.append(second)
    assert second.line() == b"ready"
    with pytest.raises(subprocess.TimeoutExpired):
        second.process.wait(2.5)
    second.process.terminate()
    assert second.process.wait(5) == 0


@needs(os.geteuid() == 0, "root, for a disk in a mount namespace")
def test_a_standby_on_a_full_disk_stays(tmp_path: Path, wrap: list[Wrapped]) -> None:
    (tmp_path / SMALL_DISK_FILE).write_text("1", encoding="ascii")
    wrapped = Wrapped(tmp_path, "print('ready', flush=True); import signal; signal.pause()")
    wrap.append(wrapped)
    assert wrapped.line() == b"ready"
    with pytest.raises(subprocess.TimeoutExpired):
        wrapped.process.wait(2)
    wrapped.process.terminate()
    assert wrapped.process.wait(5) == 0
