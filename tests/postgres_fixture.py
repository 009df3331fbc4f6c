"""A real Postgres in a temporary folder, for tests: `with PostgresServer() as server: …`.

It stands alone, listens on a free port of the loopback address with trust, and dies with the process that made it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psycopg2
import pytest

from deploy.os_user import for_postgres
from deploy.programs import postgres_bin
from tests.etcd_fixture import dying_with_parent, free_ports

START_S = 30.0
PARAMETERS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_connections": "50",
    "wal_level": "logical",
    "wal_init_zero": "off",
    "min_wal_size": "32MB",
    "io_method": "sync",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class PostgresServer:
    """One postmaster. `fsync` off by default: a test that crashes Postgres itself turns it on."""

    def __init__(self, *, fsync: bool = False, parameters: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-test-"))
        self.port = free_ports(1)[0]
        self._parameters = PARAMETERS | {"fsync": "on" if fsync else "off"} | (parameters or {})
        self._user = for_postgres()
        self._databases = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def dsn(self, database: str = "postgres", user: str = "postgres", password: str = "") -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}"

    def new_database(self, name: str = "") -> str:
        """The superuser's dsn of an empty database of its own for each call."""
        self._databases += 1
        name = name or f"test_{self._databases}"
        connection = psycopg2.connect(self.dsn())
        try:
            connection.autocommit = True
            connection.cursor().execute(f'create database "{name}"')
        finally:
            connection.close()
        return self.dsn(name)

    def _make(self) -> None:
        self._user.own(self.folder)
        initdb = [postgres_bin() / "initdb", "-D", self.data_dir, "-U", "postgres", "--auth=trust", "--no-sync"]
        initdb += ["--encoding=UTF8", "--locale=C.UTF-8"]
        subprocess.run([*self._user.prefix, *map(str, initdb)], check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        settings = [part for name, value in self._parameters.items() for part in ("-c", f"{name}={value}")]
        postgres = dying_with_parent(str(postgres_bin() / "postgres"), "-D", str(self.data_dir), "-p", str(self.port), *settings)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([*self._user.prefix, *postgres], stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + START_S
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Postgres didn't start: {(self.folder / 'log').read_text()[-1000:]}")
            time.sleep(0.05)

    def _accepts(self) -> bool:
        try:
            psycopg2.connect(self.dsn(), connect_timeout=1).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """End the postmaster (SIGQUIT: at once, as after a crash) and wait for it."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, number)
            self.process.wait(timeout=30)
        self.process = None

    def close(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """One Postgres for a module's tests; each test takes a database of its own."""
    with PostgresServer() as server:
        yield server
