"""Requests over kept connections: each request gets its own answer, or an error, and never another one's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from oncepay.wire import Answer, Wire, _Connection

Reply = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Host:
    """Reads requests without bodies; `reply` answers them. Knows how many connections were made to it."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                await self.reply(await reader.readuntil(b"\r\n\r\n"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def answer(body: bytes, *, status: str = "200 OK", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status.encode(), headers, len(body), body)


async def echo(request: bytes, writer: asyncio.StreamWriter) -> None:
    """The path of the request, after as many milliseconds as it ends with."""
    path = request.split(b" ")[1]
    await asyncio.sleep(int(path.rpartition(b"-")[2]) / 1000)
    writer.write(answer(path))


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Awaitable[tuple[Host, Wire]]]]:
    servers: list[asyncio.Server] = []
    wires: list[Wire] = []

    async def open_(reply: Reply, timeout_s: float = 5.0) -> tuple[Host, Wire]:
        host = Host(reply)
        servers.append(await asyncio.start_server(host.serve, "127.0.0.1", 0))
        port = servers[-1].sockets[0].getsockname()[1]
        wires.append(Wire("127.0.0.1", port, secure=None, timeout_s=timeout_s, headers=["X-Seen"]))
        return host, wires[-1]

    yield open_
    for wire in wires:
        await wire.close()
    for server in servers:
        server.close()


Opened = Callable[..., Awaitable[tuple[Host, Wire]]]


async def test_connections_are_kept_and_each_request_gets_its_own_answer(opened: Opened) -> None:
    host, wire = await opened(echo)
    for round_ in range(3):
        paths = [f"/{round_}-{number}" for number in range(20, 0, -1)]
        answers = await asyncio.gather(*(wire.ask(get(path)) for path in paths))
        assert [each.body.decode() for each in answers] == paths
    assert host.connections == 20


async def test_headers_that_were_asked_for_come_along_by_lower_case_names(opened: Opened) -> None:
    async def reply(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", status="402 Payment Required", headers=b"x-SEEN: Yes\r\nX-Other: no\r\n"))

    _, wire = await opened(reply)
    assert await wire.ask(get("/")) == (402, b"", {"x-seen": "Yes"})


async def test_an_answer_in_chunks_and_in_pieces(opened: Opened) -> None:
    async def reply(_: bytes, writer: asyncio.StreamWriter) -> None:
        head = (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200", b" OK\r\nTransfer-Encoding: chu", b"nked\r\n\r\n")
        for piece in (*head, b"3\r\nab", b"c\r\n2\r\n", b"de\r\n0\r\n", b"\r\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)

    host, wire = await opened(reply)
    assert (await wire.ask(get("/1"))).body == b"abcde"
    assert (await wire.ask(get("/2"))).body == b"abcde"
    assert host.connections == 1


async def test_who_gives_up_leaves_no_answer_to_the_next(opened: Opened) -> None:
    host, wire = await opened(echo)
    given_up = asyncio.create_task(wire.ask(get("/late-50")))
    await asyncio.sleep(0.02)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    for number in range(5):
        assert (await wire.ask(get(f"/next-{20 + number}"))).body == f"/next-{20 + number}".encode()
    assert host.connections == 2


async def test_a_cancel_that_comes_after_the_answer_leaves_the_connection_to_its_next_request(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, wire = await opened(echo)
    second: list[asyncio.Task[Answer]] = []
    keep = wire.keep

    def kept_and_canceled(connection: _Connection) -> None:
        keep(connection)
        if not second:
            second.append(asyncio.create_task(wire.ask(get("/second-10"))))
            first.cancel()

    monkeypatch.setattr(wire, "keep", kept_and_canceled)
    first = asyncio.create_task(wire.ask(get("/first-10")))
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second[0]).body == b"/second-10"
    assert host.connections == 1


async def test_an_answer_that_does_not_come_in_time(opened: Opened) -> None:
    host, wire = await opened(echo, timeout_s=0.3)
    with pytest.raises(TimeoutError):
        await wire.ask(get("/late-2000"))
    assert (await wire.ask(get("/next-0"))).body == b"/next-0"
    assert host.connections == 2


BROKEN = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    "half of the chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\nabc",
    "something else": b"SSH-2.0-OpenSSH_9.6\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("what", BROKEN)
async def test_an_answer_that_breaks_off_is_an_error(opened: Opened, what: str) -> None:
    async def reply(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(BROKEN[what])
        writer.close()

    _, wire = await opened(reply)
    with pytest.raises(OSError, match=r".+"):
        await wire.ask(get("/"))


async def test_a_connection_that_the_host_ends_is_not_used_again(opened: Opened) -> None:
    async def reply(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"bye", headers=b"Connection: close\r\n"))
        writer.close()

    host, wire = await opened(reply)
    for _ in range(3):
        assert (await wire.ask(get("/"))).body == b"bye"
    assert host.connections == 3


@pytest.mark.parametrize("extra", [answer(b"nobody's"), answer(b"nobody's")[:30], b"H", b"?"])
@pytest.mark.parametrize("later_s", [0, 0.02])
async def test_what_nobody_asked_for_ends_the_connection(opened: Opened, extra: bytes, later_s: float) -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        yours = answer(request.split(b" ")[1])
        if not later_s:
            writer.write(yours + extra)
            return
        writer.write(yours)
        await asyncio.sleep(later_s)
        writer.write(extra)

    host, wire = await opened(reply)
    for number in range(3):
        assert (await wire.ask(get(f"/{number}"))).body == f"/{number}".encode()
        await asyncio.sleep(0.1)
    assert host.connections == 3


async def test_nobody_listens() -> None:
    wire = Wire("127.0.0.1", 1, secure=None, timeout_s=1.0)
    with pytest.raises(OSError, match=r".+"):
        await wire.ask(get("/"))
