"""Key service processes for tests, over a real etcd."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from oncepay.settings import EtcdSettings, Settings, dump
from tests.etcd_fixture import dying_with_parent, free_ports

READY_S = 20.0


@dataclass
class Answer:
    """Status, headers and decoded body of an answer; status 0 when there was none."""

    status: int
    headers: dict[str, str]
    body: Any


def http(method: str, url: str, body: object = None, headers: dict[str, str] | None = None, timeout_s: float = 10) -> Answer:
    """One request; errors of HTTP are answers, errors of the connection are status 0."""
    data = None if body is None else msgspec.json.encode(body)
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return Answer(answer.status, dict(answer.headers), json.loads(answer.read() or b"null"))
    except urllib.error.HTTPError as error:
        return Answer(error.code, dict(error.headers), json.loads(error.read() or b"null"))
    except (urllib.error.URLError, OSError):
        return Answer(0, {}, None)


class Keygen:
    """One process. `with Keygen(folder, etcd, "keygen-1") as keygen: keygen.wait_ready()`."""

    def __init__(
        self, folder: Path, etcd: EtcdSettings, name: str, *more: str, port: int = 0, auth: bool = False, log_level: str = "info"
    ) -> None:
        shared, own = free_ports(2)
        self.port, self.own_port = port or shared, own
        self.url = f"http://127.0.0.1:{own}"
        self.shared_url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}-{own}.log"
        self.etcd = etcd
        self.config = config = folder / f"{name}-{own}.toml"
        config.write_bytes(dump(Settings(etcd=etcd, auth=auth, log_level=log_level)))
        ports = ("--port", str(self.port), "--own-port", str(own))
        command = [sys.executable, "-m", "keygen", "--config", str(config), "--name", name, *ports, *more]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(dying_with_parent(*command), stdout=log, stderr=log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(20)

    def ready(self) -> bool:
        return http("GET", self.url + "/readyz", timeout_s=3).status == 200

    def wait(self, ready: bool = True, timeout_s: float = READY_S) -> Self:
        """Until /readyz says `ready`."""
        deadline = time.monotonic() + timeout_s
        while self.ready() is not ready:
            assert time.monotonic() < deadline, f"not {'ready' if ready else 'unready'} in {timeout_s} s: {self.log.read_text()}"
            time.sleep(0.05)
        return self

    def issue(self, count: int, timeout_s: float = 10) -> list[str]:
        """`count` keys."""
        answer = http("POST", self.url + "/v1/keys", {"count": count}, timeout_s=timeout_s)
        assert answer.status == 201, answer
        keys: list[str] = answer.body["keys"]
        assert len(keys) == count
        return keys

    def metrics(self) -> dict[str, float]:
        """The metrics that have no labels, by name."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.split(" ") for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}

    def pool(self) -> dict[str, Any]:
        answer = http("GET", self.url + "/v1/keys/pool")
        assert answer.status == 200, answer
        state: dict[str, Any] = answer.body
        return state
