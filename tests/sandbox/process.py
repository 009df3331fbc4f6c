"""A stand-in as a process of its own, on a free port, and a receiver for its webhooks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import stripe
from aiohttp import web
from stripe import AIOHTTPClient, StripeClient

KEY = "sk_test_tests"
WAIT_S = 8.0


class StandIn:
    """`python -m sandbox.<name>`; `kill` and `start` again keep port and state."""

    def __init__(self, name: str, state: Path | None = None, *arguments: str) -> None:
        self.name = name
        self.state = state
        self.arguments = arguments
        self.port = 0
        self.url = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> StandIn:
        command = [sys.executable, "-m", f"sandbox.{self.name}", "--port", str(self.port), *self.arguments]
        if self.state is not None:
            command += ["--state", str(self.state)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), f"{command} didn't start: {line!r}"
        self.url = line.split()[-1]
        self.port = int(self.url.rsplit(":", 1)[1])
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self._close()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(10)
            self._close()

    def _close(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()

    def control(self, method: str, name: str, body: object = None) -> Any:
        """A call of the control API; its JSON."""
        request = urllib.request.Request(
            f"{self.url}/_control/{name}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def faults(self, **settings: object) -> Any:
        return self.control("PUT", "faults", settings)

    def forget_endpoints(self) -> None:
        """Delete all webhook endpoints of a Stripe stand-in."""
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{self.url}/v1/webhook_endpoints"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            found = json.load(answer)["data"]
        for endpoint in found:
            request = urllib.request.Request(f"{url}/{endpoint['id']}", method="DELETE", headers=headers)
            urllib.request.urlopen(request, timeout=10).close()

    def advance(self, seconds: float) -> None:
        self.control("POST", "clock", {"advance_s": seconds})


@asynccontextmanager
async def stripe_client(url: str, key: str = KEY, retries: int = 0) -> AsyncIterator[StripeClient]:
    """The real Stripe library, talking to `url`."""
    session = aiohttp.ClientSession()
    try:
        yield StripeClient(
            key, base_addresses={"api": url}, http_client=AIOHTTPClient(session=session), max_network_retries=retries
        )
    finally:
        await session.close()


class Receiver:
    """Takes webhooks; `answer` gives the status of the answer to each."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.raw: list[tuple[bytes, str]] = []
        self.times: list[float] = []
        self.answer: Callable[[dict[str, Any]], int] = lambda event: 200
        self.url = ""
        self._changed = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        event = json.loads(body)
        self.events.append(event)
        signature = request.headers.get("Stripe-Signature") or request.headers["tipalti-signature"]
        self.raw.append((body, signature))
        self.times.append(time.monotonic())
        self._changed.set()
        return web.Response(status=self.answer(event))

    async def until(self, condition: Callable[[list[dict[str, Any]]], bool], timeout_s: float = WAIT_S) -> None:
        """Wait until `condition` holds for the events received."""

        async def wait() -> None:
            while not condition(self.events):
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), timeout_s)

    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that listens on a free port."""
    box = Receiver()
    runner = web.ServerRunner(web.Server(box.handle, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    box.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield box
    finally:
        await runner.cleanup()


async def event_of(client: StripeClient, type_: str, object_id: str, timeout_s: float = WAIT_S) -> stripe.Event:
    """The event of `type_` about `object_id`, as soon as the events list has it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        page = await client.v1.events.list_async({"type": type_, "limit": 100})
        for event in page.data:
            if event.data.object["id"] == object_id:
                return event
        await asyncio.sleep(0.05)  # the list can only be polled
    raise AssertionError(f"no {type_} of {object_id}")
