"""The shell of the services, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web
from yarl import URL

from oncepay.apikeys import ApiKey, digest, new_key
from oncepay.errors import ShardUnavailable, Unavailable, WrongState
from oncepay.etcd import KeyValue
from oncepay.service import Service, Start, api_key, decode, json_response, listen, request_id
from oncepay.settings import EtcdSettings, Settings

NOWHERE = EtcdSettings(endpoints=("127.0.0.1:1",))


class Body(msgspec.Struct, forbid_unknown_fields=True):
    amount: int


class Running:
    """A service under test and a client of it."""

    def __init__(self, service: Service, port: int, client: aiohttp.ClientSession, ended: asyncio.Task[int]) -> None:
        self.service = service
        self.port = port
        self.client = client
        self.ended = ended

    async def call(self, method: str, path: str, **kwargs: object) -> tuple[int, dict[str, object], Mapping[str, str]]:
        async with self.client.request(method, path, **kwargs) as answer:  # type: ignore[arg-type]
            return answer.status, await answer.json(content_type=None), answer.headers


@asynccontextmanager
async def running(start: Start, *, auth: bool = False, drain_s: float = 0.0) -> AsyncIterator[Running]:
    service = Service(Settings(etcd=NOWHERE, auth=auth), kind="test", name="test-1", body_limit_bytes=1000)
    sock = listen("127.0.0.1", 0, shared=True)
    began = asyncio.Event()

    @asynccontextmanager
    async def start_then_say(service: Service) -> AsyncIterator[None]:
        async with start(service):
            yield

    ended = asyncio.create_task(service.serve(start_then_say, [sock], drain_s=drain_s))
    port = int(sock.getsockname()[1])
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        async with asyncio.timeout(10):
            while not began.is_set():
                try:
                    async with client.get("/livez"):
                        began.set()
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.01)
        yield Running(service, port, client, ended)
        service.stopping.set()
        await ended


def serving(*routes: tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]) -> Start:
    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        for method, path, handler in routes:
            service.route(method, path, handler, scope="pay")
        yield

    return start


async def echo(request: web.Request) -> web.Response:
    body = await decode(request, Body)
    return json_response({"amount": body.amount, "by": api_key(request).name, "id": request_id(request)}, 201)


async def boom(request: web.Request) -> web.Response:
    raise ValueError("a secret")


async def busy(request: web.Request) -> web.Response:
    raise ShardUnavailable("s0", retry_after_s=3)


async def wrong(request: web.Request) -> web.Response:
    raise WrongState


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_what_its_headers_say(encoding: str) -> None:
    async with running(ROUTES) as it:
        status, body, _ = await it.call("POST", "/echo", data=b'{"amount": 3}', headers={"Content-Encoding": encoding})
        assert (status, str(body["type"]).rsplit("/")[-1]) == (400, "malformed-body")


async def test_a_member_of_a_path_may_hold_anything_but_a_slash() -> None:
    async with running(ROUTES) as it:
        for sent, key in (("a", "a"), ("%7Bx%7D", "{x}"), ("a%2Fb", "a/b"), ("a%20b", "a b"), ("a%25b", "a%b")):
            assert (await it.call("GET", f"/k/{sent}"))[1] == {"key": key}
        assert ("GET", "/k/{key}", "pay") in it.service.routes
        assert (await it.call("GET", "/k/a/b"))[0] == 404


async def named(request: web.Request) -> web.Response:
    return json_response({"key": request.match_info["key"]})


ROUTES = serving(
    ("POST", "/echo", echo), ("GET", "/boom", boom), ("GET", "/busy", busy), ("GET", "/wrong", wrong), ("GET", "/k/{key}", named)
)


async def test_answers_and_problems() -> None:
    async with running(ROUTES) as it:
        status, body, headers = await it.call("POST", "/echo", json={"amount": 3}, headers={"X-Request-Id": "r-1"})
        assert (status, body, headers["X-Request-Id"]) == (201, {"amount": 3, "by": "anonymous", "id": "r-1"}, "r-1")
        for method, path, expected, slug in [
            ("GET", "/boom", 500, "internal"),
            ("GET", "/busy", 503, "shard-unavailable"),
            ("GET", "/wrong", 409, "wrong-state"),
            ("GET", "/nothing", 404, "not-found"),
            ("GET", "/echo", 405, "method-not-allowed"),
            ("DELETE", "/k/a", 405, "method-not-allowed"),
        ]:
            status, body, headers = await it.call(method, path)
            assert (status, body["status"]) == (expected, expected)
            assert str(body["type"]).endswith("/" + slug)
            assert headers["Content-Type"].startswith("application/problem+json")
            assert "secret" not in str(body)
            assert headers["X-Request-Id"]
            if slug == "shard-unavailable":
                assert headers["Retry-After"] == "3"
            if expected == 405:
                assert headers["Allow"] == ("POST" if path == "/echo" else "GET, HEAD")
        status, body, _ = await it.call("POST", "/echo", data=b"x" * 2000)
        assert (status, str(body["type"]).rsplit("/", 1)[1]) == (413, "body-too-large")
        status, body, _ = await it.call("POST", "/echo", json={"amount": "3"})
        assert (status, body["field"]) == (400, "amount")


@pytest.mark.parametrize("given", ["x" * 65, "a\tb", "ä"])
async def test_a_request_id_that_can_t_be_is_replaced(given: str) -> None:
    async with running(ROUTES) as it:
        _, _, headers = await it.call("GET", "/livez", headers={"X-Request-Id": given})
        assert headers["X-Request-Id"] != given


async def test_a_key_in_a_path() -> None:
    async with running(ROUTES) as it:
        for quoted, key in [("a%2Fb", "a/b"), ("a%20b%25%22", 'a b%"'), ("ok1_-_", "ok1_-_"), ("%252F", "%2F")]:
            async with it.client.get(URL(f"/k/{quoted}", encoded=True)) as answer:
                assert (await answer.json())["key"] == key


async def test_checks_and_metrics() -> None:
    failing = True

    async def part() -> None:
        if failing:
            raise Unavailable("the part is away")

    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        service.check("part", part)
        service.openapi({"openapi": "3.1.0"})
        yield

    async with running(start) as it:
        status, body, headers = await it.call("GET", "/readyz")
        assert (status, body["checks"], headers["Retry-After"]) == (503, {"part": "the part is away"}, "2")
        failing = False
        assert (await it.call("GET", "/readyz"))[:2] == (200, {"ok": True, "checks": {"part": "ok"}})
        assert (await it.call("GET", "/livez"))[0] == 200
        assert (await it.call("GET", "/openapi.json"))[1] == {"openapi": "3.1.0"}
        async with it.client.get("/metrics") as answer:
            text = await answer.text()
        assert 'oncepay_http_requests_total{method="GET",route="/readyz",status="503"}' in text
        assert 'oncepay_errors_total{type="not-ready"}' not in text


def give(service: Service, key: str, record: bytes) -> None:
    """As if the mirror had read this record."""
    service._keys._replace([KeyValue(f"apikeys/{digest(key)}", record, service._keys.revision + 1)], service._keys.revision + 1)


async def test_authorization() -> None:
    key, reader, slow = new_key(), new_key(), new_key()

    async with running(ROUTES, auth=True) as it:

        async def call(token: str | None) -> tuple[int, Mapping[str, str]]:
            headers = {"Authorization": token} if token else {}
            status, _, got = await it.call("POST", "/echo", json={"amount": 1}, headers=headers)
            return status, got

        assert (await call(None))[0] == 401
        assert (await call(f"Bearer {key}"))[0] == 503  # the records aren't there yet: nobody can say no
        assert (await it.call("GET", "/readyz"))[0] == 503
        records = [(key, ApiKey("shop")), (reader, ApiKey("reader", ("read",))), (slow, ApiKey("slow", ("pay",), 2))]
        kvs = [KeyValue(f"apikeys/{digest(token)}", msgspec.json.encode(record), 1) for token, record in records]
        it.service._keys._replace(kvs, 1)
        assert (await it.call("GET", "/readyz"))[0] == 200
        status, body, _ = await it.call("POST", "/echo", json={"amount": 1}, headers={"Authorization": f"Bearer {key}"})
        assert (status, body["by"]) == (201, "shop")
        assert (await call(f"Bearer {new_key()}"))[0] == 401
        assert (await call(f"Basic {key}"))[0] == 401
        assert (await call("Bearer \udcff"))[0] == 401
        assert (await call(f"Bearer {reader}"))[0] == 403
        answers = [await call(f"Bearer {slow}") for _ in range(4)]
        assert [status for status, _ in answers] == [201, 201, 429, 429]
        assert answers[-1][1]["Retry-After"] == "1"
        give(it.service, key, b"not a record")
        assert (await call(f"Bearer {key}"))[0] == 401


async def test_requests_in_flight_are_finished_and_new_ones_see_it_coming() -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    torn_down: list[bool] = []

    async def slow(request: web.Request) -> web.Response:
        entered.set()
        await release.wait()
        return json_response({"torn_down": list(torn_down)})

    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        service.route("GET", "/slow", slow)
        yield
        torn_down.append(True)

    async with running(start, drain_s=0.2) as it:
        in_flight = asyncio.create_task(it.call("GET", "/slow"))
        await entered.wait()
        it.service.stopping.set()
        await it.service.draining.wait()
        status, body, _ = await it.call("GET", "/readyz")
        assert (status, body["checks"]) == (503, {"draining": "the process is ending"})
        assert not it.ended.done()
        release.set()
        assert (await in_flight)[:2] == (200, {"torn_down": []})
        assert await it.ended == 0
        assert torn_down == [True]


async def test_a_background_task_that_fails_ends_the_process() -> None:
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise ValueError("broken")

    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        service.spawn(work(), "work")
        yield

    async with running(start) as it:
        go.set()
        assert await asyncio.wait_for(it.ended, 5) == 1


async def raw(port: int, target: bytes, *lines: bytes) -> bytes:
    """The answer to a GET, whose bytes may be any."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *lines]) + b"\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("target", [b"/\xff", b"/k/\xff", b"/livez?\xff=1", b"/livez?a=\xff", b"http://x/\xff", b"/\xc3\xa9"])
async def test_a_target_holds_ascii_alone(target: bytes) -> None:
    async with running(ROUTES) as it:
        assert (await raw(it.port, target)).split(b" ")[1] == b"400"


async def test_what_else_than_to_go_on_is_expected() -> None:
    async with running(ROUTES) as it:
        assert (await raw(it.port, b"/livez", b"Expect: 100-Continue")).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
        for expected in (b"\xff", b"\xc3\xa9", b"tea"):
            for target in (b"/livez", b"/nothing"):
                assert (await raw(it.port, target, b"Expect: " + expected)).split(b" ")[1] == b"417"
