"""What stands before aiohttp's server: busy routes' usual requests are answered here, all else is handed on to it.

A usual request is HTTP/1.1 on a connection that stays open, for a route that was named here, with a head of moderate size,
each header once, and a body of known length. It is parsed by httptools (llhttp, strict), served by one task and answered by
one `write`. At anything else the connection, with every byte that was not answered yet, becomes aiohttp's for good: so there
is one place for what is rare or malformed, and it is aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httptools
from aiohttp import web
from multidict import CIMultiDict, istr

from oncepay.logs import get_logger
from oncepay.web import WholeResponse

HEAD_BYTES_MAX = 8 << 10
"""A longer head is aiohttp's to take or to refuse."""
HEADERS_MAX = 100
"""Of more headers too it is aiohttp's to say how many are too many."""
PART_S = 60.0
"""How long a request may take to come whole."""
IDLE_S = 3630.0
"""How long a connection is kept without a request: longer than load balancers keep theirs (aiohttp's own bound)."""
SWEEP_S = 15.0
"""How often these bounds are looked at."""

_MEMBER = re.compile(r"\{(\w+)\}")
_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9_~.-]*)+").fullmatch
"""A path that says the same before and after decoding, and whose segments stand for themselves."""
_UNUSUAL = frozenset({"transfer-encoding", "content-encoding", "expect", "upgrade"})

_log = get_logger("front")


class WholeRequest(dict[Any, Any]):
    """A request that has come in one piece, to handlers what aiohttp's is; as a mapping it keeps what they put there."""

    __slots__ = ("_body", "headers", "match_info", "method", "path", "transport")

    def __init__(
        self,
        method: str,
        path: str,
        match_info: dict[str, str],
        headers: CIMultiDict[str],
        body: bytes,
        transport: asyncio.Transport,
    ) -> None:
        self.method = method
        self.path = path
        self.match_info = match_info
        self.headers = headers
        self.transport = transport
        self._body = body

    async def read(self) -> bytes:
        """The body."""
        return self._body


WholeHandler = Callable[[WholeRequest], Awaitable[web.StreamResponse]]


class _Connection(asyncio.Protocol):
    """One connection, until something unusual comes on it. One request at a time: what comes meanwhile waits unread."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._serving: asyncio.Task[None] | None = None
        self._next: asyncio.Protocol | None = None
        self._early: list[bytes] = []
        """What came before the answer to the request that is served."""
        self.since_s = front.now_s()
        """Of the loop's clock: when what is waited for began to be waited for."""
        self._begin()

    def _begin(self) -> None:
        """The next request may come."""
        self._raw: list[bytes] = []
        self._raw_bytes = 0
        self._url = b""
        self._headers: dict[istr, str] = {}
        self._headed = False
        self._body: list[bytes] = []
        self._found: tuple[WholeHandler, dict[str, str]] | None = None
        self._whole = False
        self._unusual = False

    @property
    def idle(self) -> bool:
        """Whether nothing of a request is here."""
        return self._serving is None and not self._raw

    @property
    def served_by(self) -> asyncio.Task[None] | None:
        """The task that serves the request which is here."""
        return self._serving

    def close(self) -> None:
        """Close the connection, after what was written has gone out."""
        if self._transport is not None:
            self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._front.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._front.connections.discard(self)

    def pause_writing(self) -> None:
        """The client doesn't read its answers: it gets no more of them."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._early:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._next is not None:
            self._next.data_received(data)
            return
        if self._serving is not None:
            self._early.append(data)
            if self._transport is not None:
                self._transport.pause_reading()
            return
        if not self._raw:
            self.since_s = self._front.now_s()
        self._raw.append(data)
        self._raw_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._unusual = True
        if self._unusual or self._raw_bytes > self._front.bytes_max or (self._raw_bytes > HEAD_BYTES_MAX and not self._headed):
            self._hand_on()
        elif self._whole:
            self._serve()

    def _is_long(self) -> bool:
        """Whether the head, which has just come whole, is longer than it may be here. Asked once: what came is put together."""
        if self._raw_bytes <= HEAD_BYTES_MAX:
            return False
        head, _, _ = b"".join(self._raw).lstrip(b"\r\n").partition(b"\r\n\r\n")
        return len(head) > HEAD_BYTES_MAX

    def _hand_on(self) -> None:
        """The connection is aiohttp's from now on, from the first byte that was not answered."""
        transport, front = self._transport, self._front
        front.connections.discard(self)
        self._transport = None
        if transport is None or transport.is_closing():
            return
        protocol = self._next = front.others()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for part in self._raw:
            protocol.data_received(part)

    def _serve(self) -> None:
        found, transport = self._found, self._transport
        assert found is not None
        assert transport is not None
        handler, members = found
        method = self._parser.get_method().decode()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request = WholeRequest(method, self._url.decode(), members, CIMultiDict(self._headers), body, transport)
        self._serving = self._front.loop.create_task(self._answer(handler, request))

    async def _answer(self, handler: WholeHandler, request: WholeRequest) -> None:
        piece = b""
        try:
            response = await handler(request)
            assert isinstance(response, WholeResponse), "a route that is named here answers whole"
            piece = response.piece()
        except Exception:
            _log.exception("not answered", path=request.path)
        finally:
            self._serving = None
            if not piece and self._transport is not None:
                self._transport.abort()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(piece)
        self._begin()
        self.since_s = self._front.now_s()
        if self._front.closing:
            transport.close()
        elif self._early:
            early, self._early = self._early, []
            transport.resume_reading()
            for part in early:
                self.data_received(part)

    # httptools' side

    def on_message_begin(self) -> None:
        if self._whole:
            self._unusual = True  # one request right behind the other

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        known = _known(name)
        if known in self._headers or known in _UNUSUAL:
            self._unusual = True
        # llhttp leaves the spaces after a value
        self._headers[known] = value.rstrip(b" \t").decode("utf-8", "surrogateescape")

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._headed = True
        self._found = self._front.find(parser.get_method(), self._url)
        usual = parser.should_keep_alive() and parser.get_http_version() == "1.1" and "host" in self._headers
        if self._found is None or not usual or len(self._headers) > HEADERS_MAX or self._is_long():
            self._unusual = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._whole = True


class Front:
    """The connections of one process. `others` makes what serves a connection that is handed on: aiohttp's server.

    A request of more than `body_bytes_max`, its head included, is handed on.
    """

    def __init__(self, others: Callable[[], asyncio.Protocol], *, body_bytes_max: int) -> None:
        self.others = others
        self.bytes_max = body_bytes_max
        self._routes: dict[tuple[bytes, bytes], WholeHandler] = {}
        self._patterns: list[tuple[bytes, re.Pattern[str], WholeHandler]] = []
        self.connections: set[_Connection] = set()
        self.closing = False
        self.loop = asyncio.get_running_loop()
        self.now_s = self.loop.time
        self._servers: list[asyncio.Server] = []
        self._sweeping: asyncio.TimerHandle | None = None

    def route(self, method: str, path: str, handler: WholeHandler) -> None:
        """Answer usual requests for `path` here, which may have members (`/things/{id}`).

        `handler` raises nothing and returns a WholeResponse.
        """
        if "{" in path:
            self._patterns.append((method.encode(), re.compile(_MEMBER.sub(r"(?P<\1>[^/]+)", path)), handler))
        else:
            self._routes[method.encode(), path.encode()] = handler

    def find(self, method: bytes, target: bytes) -> tuple[WholeHandler, dict[str, str]] | None:
        """What serves a request, with the members of its path; None where that is for aiohttp to find."""
        handler = self._routes.get((method, target))
        if handler is not None:
            return handler, {}
        path = target.decode("latin-1")
        if self._patterns and _PLAIN(path):
            for its, pattern, handler in self._patterns:
                if its == method and (match := pattern.fullmatch(path)):
                    return handler, match.groupdict()
        return None

    async def listen(self, sock: socket.socket, backlog: int) -> None:
        """Take connections from a bound socket."""
        self._servers.append(await self.loop.create_server(lambda: _Connection(self), sock=sock, backlog=backlog))
        if self._sweeping is None:
            self._sweep()

    async def close(self, timeout_s: float) -> None:
        """Take no more connections, end those without a request at once and the others with their answer, in `timeout_s`."""
        self.closing = True
        for server in self._servers:
            server.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.sleep(0)  # what has come in already is begun
        for connection in list(self.connections):
            if connection.served_by is None:
                connection.close()
        served = [task for connection in self.connections if (task := connection.served_by) is not None]
        if served:
            _, late = await asyncio.wait(served, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*served, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()

    def _sweep(self) -> None:
        now_s = self.now_s()
        for connection in list(self.connections):
            if connection.served_by is None and now_s - connection.since_s > (IDLE_S if connection.idle else PART_S):
                connection.close()
        self._sweeping = self.loop.call_later(SWEEP_S, self._sweep)


@functools.lru_cache(256)
def _known(name: bytes) -> istr:
    """A header's name in lower case, ready to be compared."""
    return istr(name.decode("utf-8", "surrogateescape").lower())
