"""A closed-loop HTTP/1.1 client that costs little: fixed requests over kept connections, answers counted and not decoded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import NamedTuple, cast

SLOW_S = 30.0
"""An answer that takes longer than this ends the measurement with TimeoutError."""


class Load(NamedTuple):
    """What was measured: answers with the wanted status, others, seconds, and latencies in seconds, ascending."""

    done: int
    failed: int
    seconds: float
    latencies_s: list[float]

    @property
    def per_s(self) -> float:
        return self.done / self.seconds

    def percentile_ms(self, percent: float) -> float:
        if not self.latencies_s:
            return 0.0
        return 1000 * self.latencies_s[min(int(len(self.latencies_s) * percent / 100), len(self.latencies_s) - 1)]


class _Connection(asyncio.Protocol):
    """Sends the request again as soon as its answer is complete, until `until` (monotonic)."""

    def __init__(self, request: bytes, status: bytes, until: float) -> None:
        self.done = 0
        self.failed = 0
        self.latencies_s: list[float] = []
        self.closed = asyncio.get_running_loop().create_future()
        self._request = request
        self._status = b"HTTP/1.1 " + status
        self._until = until
        self._got = bytearray()
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_at = time.monotonic()
        if self._sent_at >= self._until:
            self._transport.close()
        else:
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._got[:end]).lower()
        at = head.index(b"content-length:") + 15
        length = int(head[at : head.find(b"\r", at) if head.find(b"\r", at) > 0 else end])
        if len(self._got) < end + 4 + length:
            return
        if self._got.startswith(self._status):
            self.done += 1
        else:
            self.failed += 1
        self.latencies_s.append(time.monotonic() - self._sent_at)
        self._got.clear()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def load(
    port: int,
    path: str,
    body: object,
    *,
    seconds: float,
    connections: int = 32,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """POST `body` to `path` over `connections` connections at once for `seconds`."""
    data = json.dumps(body).encode()
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: _Connection(head.encode() + data, str(status).encode(), began + seconds), "127.0.0.1", port
        )
        clients.append(client)
    async with asyncio.timeout(seconds + SLOW_S):
        await asyncio.gather(*(client.closed for client in clients))
    latencies_s = sorted(latency for client in clients for latency in client.latencies_s)
    return Load(sum(c.done for c in clients), sum(c.failed for c in clients), time.monotonic() - began, latencies_s)
