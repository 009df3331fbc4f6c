"""The load balancers' configuration: what it says, and what HAProxy and nginx do with it before real key services."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from deploy import balancer
from deploy.balancer import ANSWER_S, CHECK_FAST_MS, CHECK_MS, EXAMPLES, Balancer
from oncepay.service import BODY_LIMIT_BYTES
from router.prefer import WAIT_MAX_S
from shard.store.store import HOLD_S
from tests.etcd_fixture import EtcdCluster, dying_with_parent, etcd_cluster, free_ports
from tests.keygen.harness import Keygen
from tests.needs import needs

__all__ = ["etcd_cluster"]

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
START_S = 20.0
CLIENTS = 8
DRAIN_S = 3.0
PROBLEM_JSON = "application/problem+json"

BOTH = pytest.mark.parametrize(
    "program",
    [
        pytest.param("haproxy", marks=needs(shutil.which("haproxy", path=PATH) is not None, "the command haproxy")),
        pytest.param("nginx", marks=needs(shutil.which("nginx", path=PATH) is not None, "the command nginx")),
    ],
)


def test_the_examples_are_what_is_generated() -> None:
    for path, render in EXAMPLES.items():
        assert path.read_text(encoding="ascii") == render(balancer.example()), f"run python -m deploy.balancer --write: {path}"


def test_no_answer_is_cut_off_and_a_draining_replica_is_out_in_time() -> None:
    assert ANSWER_S > HOLD_S + WAIT_MAX_S
    assert (CHECK_MS + CHECK_FAST_MS) / 1000 < DRAIN_S


@pytest.mark.parametrize("render", [balancer.haproxy, balancer.nginx])
def test_a_pool_without_replicas_is_left_out(render: Callable[[Balancer], str]) -> None:
    text = render(Balancer(routers=(), keygens=("10.0.0.1:8081", "10.0.0.2:8081")))
    assert "10.0.0.2:8081" in text
    assert "routers" not in text


class Running:
    """One balancer before three key services."""

    def __init__(self, program: str, url: str, metrics_url: str, replicas: list[Keygen]) -> None:
        self.program = program
        self.url = url
        self.metrics_url = metrics_url
        self.replicas = replicas


@contextmanager
def balanced(program: str, folder: Path, addresses: list[str]) -> Iterator[tuple[str, str]]:
    """The balancer's url, and that of its own metrics."""
    front, metrics = free_ports(2)
    made = Balancer(
        (), tuple(addresses), listen_keygen=f"127.0.0.1:{front}", metrics=f"127.0.0.1:{metrics}", run_dir=str(folder / "run")
    )
    (folder / "run").mkdir()
    config = folder / f"{program}.conf"
    config.write_text(getattr(balancer, program)(made), encoding="ascii")
    binary = shutil.which(program, path=PATH)
    assert binary is not None, f"{program} is not installed"
    options = ["-db", "-f", str(config)] if program == "haproxy" else ["-g", "daemon off;", "-c", str(config), "-p", str(folder)]
    with open(folder / f"{program}.log", "wb") as log:
        process = subprocess.Popen(dying_with_parent(binary, *options), stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{front}", f"http://127.0.0.1:{metrics}/metrics"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def running(program: str, tmp_path: Path, etcd_cluster: EtcdCluster) -> Iterator[Running]:
    settings = etcd_cluster.settings()
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(Keygen(tmp_path, settings, f"keygen-{n}", "--drain-s", f"{DRAIN_S:g}")) for n in range(1, 4)
        ]
        for replica in replicas:
            replica.wait()
        addresses = [f"127.0.0.1:{replica.own_port}" for replica in replicas]
        url, metrics_url = stack.enter_context(balanced(program, tmp_path, addresses))
        yield Running(program, url, metrics_url, replicas)


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.post(url + "/v1/keys", json={"count": 1}) as answer:
            return answer.status == 201
    except aiohttp.ClientError:
        return False


class Clients:
    """Take keys over kept connections until they are told to stop."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.keys: list[str] = []
        self.errors: list[str] = []
        self._session = session
        self._url = url
        self._stop = False

    async def __aenter__(self) -> Clients:
        self._tasks = [asyncio.create_task(self._take()) for _ in range(CLIENTS)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def more(self, count: int) -> None:
        """Until `count` keys more were taken."""
        wanted = len(self.keys) + count

        async def there() -> bool:
            return len(self.keys) >= wanted or bool(self.errors)

        await until(there)

    async def _take(self) -> None:
        while not self._stop:
            try:
                async with self._session.post(self._url + "/v1/keys", json={"count": 10}) as answer:
                    body = await answer.json(content_type=None)
                    if answer.status == 201:
                        self.keys += body["keys"]
                    else:
                        self.errors.append(f"{answer.status} {body}")
            except aiohttp.ClientError as error:
                self.errors.append(repr(error))


async def is_down(session: aiohttp.ClientSession, running: Running, name: str) -> bool:
    """Whether HAProxy has taken the replica out."""
    async with session.get(running.metrics_url) as answer:
        wanted = f'haproxy_server_status{{proxy="keygens",server="{name}",state="UP"}} 0'
        return wanted in await answer.text()


@pytest.mark.cluster
@BOTH
async def test_a_killed_and_a_draining_replica_are_not_seen_by_clients(running: Running) -> None:
    killed, drained, left = running.replicas
    async with aiohttp.ClientSession() as session:
        await until(lambda: answers(session, running.url))
        before = left.metrics()["oncepay_keys_issued_total"]
        async with Clients(session, running.url) as clients:
            await clients.more(2_000)
            assert left.metrics()["oncepay_keys_issued_total"] > before, "all replicas get requests"
            killed.kill()
            await clients.more(2_000)
            drained.process.terminate()
            if running.program == "haproxy":
                await until(lambda: is_down(session, running, "keygen-2"))
                assert drained.process.poll() is None, "it was taken out before it stopped"
                issued = drained.metrics()["oncepay_keys_issued_total"]
                await clients.more(1_000)
                assert drained.metrics()["oncepay_keys_issued_total"] == issued
            assert await asyncio.to_thread(drained.process.wait, 20) == 0
            await clients.more(2_000)
        assert clients.errors == []
        assert len(set(clients.keys)) == len(clients.keys) > 6_000


def send_large(url: str, body_bytes: int) -> tuple[int, str, Any]:
    """What is answered to a large request, also when the connection is cut off while its body is being sent."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.putrequest("POST", parts.path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(body_bytes))
        connection.endheaders()
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(b"x" * body_bytes)
        answer = connection.getresponse()
        return answer.status, answer.headers.get_content_type(), json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.cluster
@BOTH
async def test_what_the_balancer_answers_itself(running: Running) -> None:
    async with aiohttp.ClientSession() as session:
        await until(lambda: answers(session, running.url))
        url = running.url + "/v1/keys"
        async with session.post(url, json={"count": 1}, headers={"X-Request-Id": "mine"}) as answer:
            assert (answer.status, answer.headers["X-Request-Id"]) == (201, "mine")
        async with session.post(url, json={"count": 1}) as answer:
            assert len(answer.headers["X-Request-Id"]) >= 32
        status, content_type, problem = await asyncio.to_thread(send_large, url, BODY_LIMIT_BYTES + 1)
        assert (status, content_type) == (413, PROBLEM_JSON)
        assert problem["type"].endswith("/body-too-large")
        for replica in running.replicas:
            replica.kill()
        async with session.post(url, json={"count": 1}) as answer:
            assert (answer.status, answer.content_type) == (503, PROBLEM_JSON)
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.headers["X-Request-Id"]
            assert (await answer.json(content_type=None))["type"].endswith("/unavailable")
