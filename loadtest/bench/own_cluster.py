"""A cluster for a benchmark alone, or the one that is up already; and the requests that a benchmark sends to it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from oncepay.settings import Settings, load

DEFAULT_BASE, SPAN, BASES = 8080, 70, 10
BUFFERS_ENV, NODE_BUFFERS_ENV = "ONCEPAY_AGGREGATOR_SHARED_BUFFERS", "ONCEPAY_NODE_SHARED_BUFFERS"
NODE_LOG_ENV = "ONCEPAY_NODE_MAX_WAL_SIZE"
"""As deploy/postgres.py and deploy/local/parts.py read them."""
KEYS_AT_ONCE = 10_000
BUYERS = 1000


class Failed(SystemExit):
    """The cluster can't be started, or does something else than it should."""


class Running(NamedTuple):
    """A cluster that is up: its home, and what `oncepay status` says."""

    home: Path
    environment: dict[str, str]

    @property
    def status(self) -> dict[str, Any]:
        return oncepay(self.environment, "status")[1]

    @property
    def settings(self) -> Settings:
        return load(self.home / "oncepay.toml")

    def port(self, service: str) -> int:
        """The port that the service's processes share."""
        return int(self.status["urls"][service].rsplit(":", 1)[1])

    def keys(self, count: int) -> list[str]:
        """New keys of the key service."""
        status = self.status
        url, found = f"{status['urls']['keygen']}/v1/keys", list[str]()
        headers = {"Authorization": f"Bearer {status['api_key']}", "Content-Type": "application/json"}
        while len(found) < count:
            body = json.dumps({"count": min(KEYS_AT_ONCE, count - len(found))}).encode()
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
                found += msgspec.json.decode(answer.read())["keys"]
        return found


def oncepay(environment: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run an `oncepay` command: its exit code and its object. Raises Failed."""
    command = [sys.executable, "-m", "cli", *arguments, "--output", "json"]
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"oncepay {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}") from None
    return done.returncode, answer


@contextlib.contextmanager
def cluster(
    name: str,
    *options: str,
    attached: Path | None = None,
    aggregator_buffers: str = "",
    node_buffers: str = "",
    node_log: str = "",
) -> Iterator[Running]:
    """A fresh cluster in the sub-folder `name` of ONCEPAY_HOME, started with `options` and deleted afterwards.

    With `attached` the one that runs in that home already, left as it is. `aggregator_buffers` is the cache of the aggregator's
    Postgres, `node_buffers` that of each of a shard's nodes, `node_log` how much log lies between two checkpoints of theirs at
    most. Raises Failed.
    """
    if attached is not None:
        yield Running(attached, {**os.environ, "ONCEPAY_HOME": str(attached)})
        return
    home = Path(os.environ.get("ONCEPAY_HOME") or ".oncepay").resolve() / name
    environment = {**os.environ, "ONCEPAY_HOME": str(home)}
    if aggregator_buffers:
        environment[BUFFERS_ENV] = aggregator_buffers
    if node_buffers:
        environment[NODE_BUFFERS_ENV] = node_buffers
    if node_log:
        environment[NODE_LOG_ENV] = node_log
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or a benchmark that is ended leaves its cluster
    oncepay(environment, "down", "--purge")
    first = int(os.environ.get("ONCEPAY_PORT_BASE") or DEFAULT_BASE)
    try:
        for base in range(first, first + BASES * SPAN, SPAN):
            environment["ONCEPAY_PORT_BASE"] = str(base)
            code, status = oncepay(environment, "up", *options)
            if status.get("error", {}).get("type") != "local-cluster-port-taken":
                break
        if code:
            raise Failed(f"the cluster didn't come up: {status}")
        yield Running(home, environment)
    finally:
        oncepay(environment, "down", "--purge")


def payment_requests(keys: Sequence[str], api_key: str, *, wait_s: float, first: int = 0) -> list[bytes]:
    """POST /v1/payments for each key: two items of two sellers, paid with a good card. Buyers take turns."""
    requests = []
    for number, key in enumerate(keys, first):
        items = [
            {"seller": f"seller-{number % 40 + 1:02d}", "amount": 1499, "quantity": 1, "description": "A record"},
            {"seller": f"seller-{(number + 7) % 40 + 1:02d}", "amount": 501 + number % 1000, "quantity": 2},
        ]
        buyer = f"buyer-{number % BUYERS}"
        body = json.dumps({"buyer": buyer, "currency": "usd", "items": items, "payment_method": "pm_card_visa"}).encode()
        head = (
            f"POST /v1/payments HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {api_key}\r\n"
            f'Content-Type: application/json\r\nIdempotency-Key: "{key}"\r\nPrefer: wait={wait_s:g}\r\n'
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "python": platform.python_version(),
        "system": platform.release(),
    }
