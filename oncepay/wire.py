"""HTTP/1.1 to one host over kept connections, for whoever sends it hundreds of requests a second.

A request is one write of bytes that were made ready before, an answer is its status, its body in one piece, and those headers
that were asked for. Connections and TLS are asyncio's, parsing is httptools' (llhttp). No redirects, cookies, proxies,
compression or pipelining. How many requests are under way at once is the caller's to bound: each takes a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Collection
from typing import NamedTuple, cast

import httptools

KEEP_S = 30.0
"""How long a connection that nobody uses is kept."""
TICK_S = 0.25
"""How finely the bound on an answer's time is kept."""
ANSWER_BYTES_MAX = 64 << 20
"""A longer answer is broken off."""


class Answer(NamedTuple):
    """What came back, whatever it says. Names of headers in lower case."""

    status: int
    body: bytes
    headers: dict[str, str]


class _Connection(asyncio.Protocol):
    """One connection: at most one request is under way on it, and whatever comes otherwise ends it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._parts: list[bytes] = []
        self._bytes = 0
        self._headers: dict[str, str] = {}
        self.until_s = 0.0
        """Of the loop's clock: when a request under way is given up, or one that is kept is closed."""

    def send(self, request: bytes, answer: asyncio.Future[Answer], until_s: float) -> None:
        """Send a request; `answer` is told what comes of it. On a connection that has just been lost that is an error."""
        self._answer, self.until_s = answer, until_s
        if self._transport is None:
            self.fail(ConnectionResetError("the connection was closed before the request"))
        else:
            self._transport.write(request)

    def fail(self, error: Exception) -> None:
        """End the connection, and the request on it with `error`."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)
        self._wire.gone(self)
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self._unasked()
            return
        self._bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(ConnectionError(f"an answer that is not HTTP: {error!r}"))
            return
        if self._bytes > ANSWER_BYTES_MAX:
            self.fail(ConnectionError(f"an answer of more than {ANSWER_BYTES_MAX} bytes"))

    def eof_received(self) -> None:
        self._wire.gone(self)  # asyncio closes it now; nothing is sent on it any more

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.fail(error if isinstance(error, OSError) else ConnectionResetError("the connection was closed before the answer"))

    def _unasked(self) -> None:
        """Whatever comes while no request is under way would be taken for the next one's answer."""
        self.fail(ConnectionError("an answer that nobody waits for"))

    # httptools' side

    def on_message_begin(self) -> None:
        if self._answer is None:
            self._unasked()

    def on_header(self, name: bytes, value: bytes) -> None:
        wanted = self._wire.wanted.get(name.lower())
        if wanted is not None:
            self._headers[wanted] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if 100 <= status < 200:
            return  # more is to come
        body, self._parts, self._bytes = b"".join(self._parts), [], 0
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            self._unasked()
            return
        answer.set_result(Answer(status, body, headers))
        if self._parser.should_keep_alive():
            self._wire.keep(self)
        else:
            self.fail(ConnectionError("closed"))


class Wire:
    """Requests to one host. `timeout_s` bounds each, with its connecting, to TICK_S; `headers` are those that answers bring."""

    def __init__(
        self, host: str, port: int, *, secure: ssl.SSLContext | None, timeout_s: float, headers: Collection[str] = ()
    ) -> None:
        self.wanted = {name.lower().encode(): name.lower() for name in headers}
        self._host = host
        self._port = port
        self._secure = secure
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._kept: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, request: bytes) -> Answer:
        """Send `request` (a whole one, with its Content-Length) and return the answer.

        Raises OSError without a whole answer in time: whether the request had its effect is not known then.
        """
        until_s = self._loop.time() + self._timeout_s
        connection = self._pop() or await self._connected()
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._busy.add(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)
        connection.send(request, answer, until_s)
        try:
            return await answer
        except BaseException:
            if answer.cancelled():  # else the connection has ended, or is another one's already
                connection.fail(ConnectionAbortedError("given up"))
            raise

    async def close(self) -> None:
        """End all connections."""
        for connection in [*self._kept, *self._busy]:
            connection.fail(ConnectionAbortedError("closed"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def keep(self, connection: _Connection) -> None:
        """The connection's request is over, and another may follow on it."""
        now_s = self._loop.time()
        self._busy.discard(connection)
        connection.until_s = now_s + KEEP_S
        self._kept.append(connection)
        if self._kept[0].until_s <= now_s:
            self._kept[0].fail(ConnectionAbortedError("idle"))

    def gone(self, connection: _Connection) -> None:
        """The connection is over."""
        self._busy.discard(connection)
        with contextlib.suppress(ValueError):
            self._kept.remove(connection)

    def _pop(self) -> _Connection | None:
        """The connection that was used last, if that is not too long ago: then the others are older still."""
        while self._kept:
            connection = self._kept.pop()
            if connection.until_s > self._loop.time():
                return connection
            connection.fail(ConnectionAbortedError("idle"))
        return None

    async def _connected(self) -> _Connection:
        name = self._host if self._secure is not None else None
        async with asyncio.timeout(self._timeout_s):
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self), self._host, self._port, ssl=self._secure, server_hostname=name
            )
        return connection

    def _tick(self) -> None:
        now_s = self._loop.time()
        for connection in [connection for connection in self._busy if connection.until_s <= now_s]:
            connection.fail(TimeoutError(f"no answer in {self._timeout_s:g} s"))
        self._timer = self._loop.call_later(TICK_S, self._tick) if self._busy else None
