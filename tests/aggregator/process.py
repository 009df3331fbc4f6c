"""The aggregator as a process of its own, and a line to its database that can be held at the commit's answer."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from oncepay.settings import EtcdSettings, Settings, dump
from tests.etcd_fixture import dying_with_parent, free_ports

TOKEN = "between-services"
START_S = 20.0


class Aggregator:
    """One process; `url` is its origin."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def kill(self) -> None:
        """kill -9, and wait."""
        self.process.kill()
        self.process.wait(timeout=10)

    async def until_ready(self) -> None:
        """For who relays its traffic meanwhile."""
        async with asyncio.timeout(START_S):
            while not await asyncio.to_thread(self.ready):
                await asyncio.sleep(0.05)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def aggregator(dsn: str, *, etcd: EtcdSettings | None = None, wait: bool = True) -> Iterator[Aggregator]:
    """Runs one on a free port; with `etcd` it asks for API keys."""
    port = free_ports(1)[0]
    settings = Settings(
        etcd=etcd or EtcdSettings(endpoints=(f"127.0.0.1:{free_ports(1)[0]}",)),
        auth=etcd is not None,
        aggregator_dsn=dsn,
        internal_token=TOKEN,
    )
    with tempfile.TemporaryDirectory(prefix="aggregator-test-") as folder:
        config, log = Path(folder) / "oncepay.toml", Path(folder) / "log"
        config.write_bytes(dump(settings))
        command = [sys.executable, "-m", "aggregator", "--config", str(config), "--name", "aggregator", "--port", str(port)]
        with log.open("wb") as out:
            process = subprocess.Popen(dying_with_parent(*command), stdout=out, stderr=out)
        running = Aggregator(process, f"http://127.0.0.1:{port}")
        try:
            deadline = time.monotonic() + START_S
            while wait and not running.ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the aggregator didn't start: {log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield running
        finally:
            running.kill()


class Line:
    """A TCP relay to a Postgres. While `hold` is set, the answer to a COMMIT doesn't come back; `held` is set then."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self.hold = False
        self.held = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer, answers=True))
        except OSError:
            pass
        finally:
            server_writer.close()
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False) -> None:
        while chunk := await reader.read(65536):
            if answers and self.hold and b"COMMIT\0" in chunk:
                self.held.set()
                await asyncio.Event().wait()
            writer.write(chunk)
            await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Line]:
        """Listen on a free port until the end."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
