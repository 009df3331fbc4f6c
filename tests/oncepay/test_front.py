"""Usual requests are answered before aiohttp, and nobody can tell: every stream of bytes gets the answers that aiohttp gives."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import msgspec
import pytest
from aiohttp import web

from oncepay import front
from oncepay.errors import WrongState
from oncepay.service import Request, Service, decode, json_response, listen
from oncepay.settings import EtcdSettings, Settings
from oncepay.web import WholeResponse

LIMIT_BYTES = 3_000


class Body(msgspec.Struct):
    amount: int


async def echo(request: Request) -> web.Response:
    body = await decode(request, Body)
    if body.amount < 0:
        raise WrongState(f"amount {body.amount}")
    if body.amount == 0:
        raise ValueError("a secret")
    await asyncio.sleep(0.002 * (body.amount % 3))
    said = request.headers.get("X-Said", "")
    return json_response({"amount": body.amount, "said": said.encode("utf-8", "backslashreplace").decode(), "path": request.path})


async def named(request: Request) -> web.Response:
    if request.headers.get("If-None-Match"):
        return WholeResponse(status=304, headers={"ETag": '"1"'})
    return json_response({"path": request.path, **request.match_info})


class Running:
    """A service with one route, and how many requests its front has answered itself."""

    def __init__(self, port: int, service: Service) -> None:
        self.port = port
        self.service = service

    async def talk(self, *parts: bytes, in_turn: bool = False) -> bytes:
        """All that comes back to `parts`, sent one after the other, until the server closes. With `in_turn` each is a request
        that is sent when the one before is answered."""
        loop, answers = asyncio.get_running_loop(), bytearray()
        # A socket of its own, not a stream of asyncio: that one forgets what it has read once the server resets the connection,
        # as it does when it closes over bytes that it has not read.
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            sock.setblocking(False)
            async with asyncio.timeout(10):
                with suppress(ConnectionError):
                    for part in parts:
                        await loop.sock_sendall(sock, part)
                        if in_turn:
                            answers += await loop.sock_recv(sock, 65_536)
                        else:
                            await asyncio.sleep(0.001)
                with suppress(ConnectionError):
                    while got := await loop.sock_recv(sock, 65_536):
                        answers += got
        return bytes(answers)


@asynccontextmanager
async def running(*, busy: bool) -> AsyncIterator[Running]:
    settings = Settings(etcd=EtcdSettings(endpoints=("127.0.0.1:1",)), auth=False)
    service = Service(settings, kind="test", name="test-1", body_limit_bytes=LIMIT_BYTES)
    sock = listen("127.0.0.1", 0, shared=True)

    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        add = service.busy_route if busy else service.route
        add("POST", "/echo", echo)
        add("GET", "/k/{key}/{more}", named)
        yield

    port = int(sock.getsockname()[1])
    ended = asyncio.create_task(service.serve(start, [sock], drain_s=0))
    async with asyncio.timeout(10):
        while True:
            try:
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            except ConnectionError:
                await asyncio.sleep(0.01)
    yield Running(port, service)
    service.stopping.set()
    await ended


def get(target: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: x", *lines]) + b"\r\n\r\n"


def post(body: bytes, *lines: bytes, target: bytes = b"/echo", version: bytes = b"1.1") -> bytes:
    head = [b"POST " + target + b" HTTP/" + version, b"Host: x", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


USUAL = [post(b'{"amount": %d}' % amount) for amount in (1, 2, 3, -4, 0)] + [
    post(b'{"amount": 5}', b"X-Said: hello", b"X-Request-Id: r-1"),
    post(b'{"amount": 6}', b"x-SAID: \xc3\xa9\xff", b"Connection: keep-alive"),
    post(b"{", b"Content-Type: application/json"),
    post(b""),
    post(b'{"amount": 7}' + b" " * 2_000),
    post(b'{"amount": 8}', b"X-Said: \t a b \t ", b"X-Request-Id: r-2 "),
    post(b'{"amount": 8}', b"X-Said: \t"),
    get(b"/k/a/b.c"),
    get(b"/k/ok1_-~/b", b'If-None-Match: "1"'),
    get(b"/k/a/b", b"If-None-Match:  "),
]
UNUSUAL = [
    b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    get(b"/echo"),
    get(b"/k/a"),
    get(b"/k/a/b/c"),
    get(b"/k/a%2Fb/c"),
    get(b"/k/./b"),
    get(b"/k/../b/c"),
    get(b"/k/a/b;c=d"),
    get(b"//k/a/b"),
    get(b"/k/a/b", b"Content-Length: 3") + b"abc",
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: x\r\n\r\n",
    b'POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{"amount": 8}\r\n0\r\n\r\n',
    post(b'{"amount": 9}', target=b"/echo?x=1"),
    post(b'{"amount": 9}', target=b"http://x/echo"),
    post(b'{"amount": 9}', target=b"/ech%6f"),
    post(b'{"amount": 10}' + b" " * LIMIT_BYTES),
    post(b'{"amount": 11}', b"X-Said: one", b"X-Said: two"),
    post(b'{"amount": 12}', b"X-Long: " + b"y" * 7_000),
    post(b"\x1f\x8b", b"Content-Encoding: gzip"),
    get(b"/k/a/b", *[b"X-%d: y" % n for n in range(127)]),
]
ENDS = [
    post(b'{"amount": 1}', b"Connection: close"),
    post(b'{"amount": 1}', version=b"1.0"),
    b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
]
"""What the server closes the connection after."""
MALFORMED = [
    post(b'{"amount": 1}', b"Content-Length: 14"),
    post(b'{"amount": 1}', b"Transfer-Encoding: chunked"),
    post(b'{"amount": 1}', b"X Said: space"),
    post(b'{"amount": 1}', b"X-Said: a\x00b"),
    post(b'{"amount": 1}', b"X-Long: " + b"y" * 9_000),
    get(b"/k/a/b", *[b"X-%d: y" % n for n in range(128)]),
    b"nonsense\r\n\r\n",
]


def comparable(answers: bytes, *, in_pieces: bool) -> list[tuple[bytes, ...]]:
    """Status, headers and body of each answer, without what is another one each time.

    To a malformed request that was sent `in_pieces` the reason only: what the answer quotes is as much of the line as came in one
    packet.
    """
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        match = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        length = int(match[1]) if match else 0
        lines = [line for line in head.split(b"\r\n") if not re.match(rb"date:|x-request-id: (?!r-)", line, re.IGNORECASE)]
        body, answers = rest[:length], rest[length:]
        if in_pieces and lines[0].startswith(b"HTTP/1.0 400"):
            lines = [line for line in lines if not re.match(rb"content-length:", line, re.IGNORECASE)]
            body = body.partition(b"\n")[0]
        found.append((lines[0], *sorted(lines[1:]), body))
    return found


def pieces(stream: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.randrange(len(stream)) for _ in range(rng.choice((0, 0, 1, 3, 12))))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]


@pytest.mark.parametrize("seed", range(4))
async def test_every_stream_gets_the_answers_that_aiohttp_gives(seed: int) -> None:
    rng = random.Random(seed)
    async with running(busy=True) as one, running(busy=False) as other:

        async def same() -> None:
            requests = [rng.choice(USUAL if rng.random() < 0.8 else UNUSUAL) for _ in range(rng.randrange(6))]
            requests = [*requests, rng.choice(ENDS)] if rng.random() < 0.9 else [rng.choice(MALFORMED)]
            in_pieces = rng.random() < 0.5
            parts = pieces(b"".join(requests), rng) if in_pieces else requests
            in_turn = not in_pieces and rng.random() < 0.8
            mine, its = await asyncio.gather(one.talk(*parts, in_turn=in_turn), other.talk(*parts, in_turn=in_turn))
            assert comparable(mine, in_pieces=in_pieces) == comparable(its, in_pieces=in_pieces), parts

        for _ in range(10):
            await asyncio.gather(*(same() for _ in range(8)))


async def test_usual_requests_never_reach_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on = 0
    hand_on = front._Connection._hand_on

    def counted(connection: front._Connection) -> None:
        nonlocal handed_on
        handed_on += 1
        hand_on(connection)

    monkeypatch.setattr(front._Connection, "_hand_on", counted)
    async with running(busy=True) as it, aiohttp.ClientSession(f"http://127.0.0.1:{it.port}") as client:
        for amount in (1, 2, -3):
            async with client.post("/echo", json={"amount": amount}) as answer:
                assert answer.status == (409 if amount < 0 else 200)
        assert handed_on == 0
        async with client.get("/livez") as answer:
            assert answer.status == 200
        assert handed_on == 1


async def test_what_is_served_is_answered_before_the_end_and_idle_connections_end_at_once() -> None:
    release, asked = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> web.Response:
        asked.set()
        await release.wait()
        return json_response({})

    made = front.Front(asyncio.Protocol, body_bytes_max=LIMIT_BYTES)
    made.route("POST", "/slow", slow)
    sock = listen("127.0.0.1", 0, shared=False)
    port = sock.getsockname()[1]
    await made.listen(sock, 10)
    idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
    busy, busy_writer = await asyncio.open_connection("127.0.0.1", port)
    busy_writer.write(post(b"", target=b"/slow"))
    async with asyncio.timeout(5):
        await asked.wait()
        closing = asyncio.create_task(made.close(5))
        assert await idle.read() == b""
        assert not closing.done()
        release.set()
        assert (await busy.read()).startswith(b"HTTP/1.1 200 OK")
        await closing
    for writer in (idle_writer, busy_writer):
        writer.close()


async def test_a_request_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "SWEEP_S", 0.02)
    monkeypatch.setattr(front, "PART_S", 0.1)
    async with running(busy=True) as it:
        assert await it.talk(post(b'{"amount": 1}')[:-3]) == b""


class Wire(asyncio.Transport):
    """A connection that goes nowhere."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


def joins(work: Callable[[], None]) -> int:
    """How often bytes are put together while `work` is done."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        if event == "c_call" and getattr(argument, "__name__", "") == "join" and getattr(argument, "__self__", None) == b"":
            count += 1

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("segment_bytes", [1_400, 50])
@pytest.mark.parametrize("head_bytes", [100, front.HEAD_BYTES_MAX - 200, front.HEAD_BYTES_MAX + 200])
async def test_a_request_in_many_segments_is_put_together_once(segment_bytes: int, head_bytes: int) -> None:
    asked = asyncio.Event()

    async def ask(request: Request) -> web.Response:
        asked.set()
        return json_response({})

    taken_over: list[bytes] = []

    class Other(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            taken_over.append(data)

    made = front.Front(Other, body_bytes_max=1 << 20)
    made.route("POST", "/echo", ask)
    stream = post(b"x" * 1_000_000, b"X-Long: " + b"y" * (head_bytes - 70))
    assert abs(stream.index(b"\r\n\r\n") - head_bytes) < 50
    connection = front._Connection(made)
    connection.connection_made(Wire())
    segments = [stream[at : at + segment_bytes] for at in range(0, len(stream), segment_bytes)]

    def receive() -> None:
        for segment in segments:
            connection.data_received(segment)

    assert joins(receive) <= 3
    if head_bytes > front.HEAD_BYTES_MAX:
        assert b"".join(taken_over) == stream
    else:
        async with asyncio.timeout(5):
            await asked.wait()
