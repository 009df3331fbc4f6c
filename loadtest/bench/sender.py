"""A client that sends prepared requests, each once, over kept connections: as fast as they are answered, or at a set pace.

Python, but little of it: a request is one `write`, an answer is cut out by its Content-Length and only its status is read.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

TICK_S = 0.002
"""How finely a paced run deals out its requests."""


class Sent(NamedTuple):
    """What came of the requests: answers by status, seconds from the first to the last, latencies in seconds, ascending.

    In a paced run a latency begins when the request was due, so that waiting for a connection counts.
    """

    statuses: dict[int, int]
    seconds: float
    latencies_s: list[float]

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        return 1000 * self.latencies_s[min(int(len(self.latencies_s) * percent / 100), len(self.latencies_s) - 1)]


class _Run:
    """What the connections of one run share."""

    def __init__(self, requests: Iterable[bytes]) -> None:
        self.next = iter(requests).__next__
        self.due: deque[tuple[float, bytes]] = deque()
        self.free: deque[_Connection] = deque()
        self.paced = False
        self.left = 0
        self.statuses: dict[int, int] = {}
        self.latencies_s: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, connection: _Connection, status: int, latency_s: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.latencies_s.append(latency_s)
        self.left -= 1
        if not self.left:
            self.over.set_result(None)
        elif not self.paced:
            try:
                connection.send(time.monotonic(), self.next())
            except StopIteration:
                pass
        elif self.due:
            connection.send(*self.due.popleft())
        else:
            self.free.append(connection)

    def failed(self, error: Exception) -> None:
        if not self.over.done():
            self.over.set_exception(error)


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._got = b""
        self._since_s = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, since_s: float, request: bytes) -> None:
        assert self._transport is not None
        self._since_s = since_s
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        got = self._got + data if self._got else data
        end = got.find(b"\r\n\r\n")
        if end > 0:
            head = got[:end].lower()
            at = head.index(b"content-length:") + 15
            length = int(head[at:].split(b"\r", 1)[0])
            if len(got) >= end + 4 + length:
                self._got = b""
                self._run.answered(self, int(got[9:12]), time.monotonic() - self._since_s)
                return
        self._got = got

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.failed(exc or ConnectionError("the server closed a connection"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def send(
    requests: Sequence[bytes], ports: Sequence[int], *, connections: int, rate_per_s: float | None = None, timeout_s: float = 120
) -> Sent:
    """Send each request once over `connections`, spread over `ports` of this machine.

    With `rate_per_s` they come at that pace whether or not earlier ones were answered (an open model); without it each
    connection sends its next when it has its answer. Raises TimeoutError, or ConnectionError when a connection breaks.
    """
    run = _Run(requests)
    run.left = len(requests)
    run.paced = rate_per_s is not None
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(min(connections, len(requests))):
        port = ports[number % len(ports)]
        clients.append((await loop.create_connection(lambda: _Connection(run), "127.0.0.1", port))[1])
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            if rate_per_s is None:
                for client in clients:
                    client.send(time.monotonic(), run.next())
            else:
                run.free.extend(clients)
                await _deal_out(run, len(requests), rate_per_s)
            await run.over
        seconds = time.monotonic() - began_s
    finally:
        run.over.cancel()
        for client in clients:
            client.close()
    return Sent(run.statuses, seconds, sorted(run.latencies_s))


async def _deal_out(run: _Run, count: int, rate_per_s: float) -> None:
    """Requests become due at a constant pace; those that find no free connection wait in their order."""
    began_s = time.monotonic()
    dealt = 0
    while dealt < count:
        due = min(count, int((time.monotonic() - began_s) * rate_per_s) + 1)
        for number in range(dealt, due):
            moment_s = began_s + number / rate_per_s
            if run.free:
                run.free.popleft().send(moment_s, run.next())
            else:
                run.due.append((moment_s, run.next()))
        dealt = due
        await asyncio.sleep(TICK_S)
