"""Bodies in and out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Annotated

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from oncepay.errors import MalformedBody, RateLimited, Unauthorized
from oncepay.web import PROBLEM_JSON, decode_bytes, json_response, problem_response


class Item(msgspec.Struct, forbid_unknown_fields=True):
    amount: Annotated[int, msgspec.Meta(ge=1)]
    names: dict[str, int] = {}


class Order(msgspec.Struct, forbid_unknown_fields=True):
    buyer: str
    items: list[Item]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "buyer"),
        (b'{"buyer": 1, "items": []}', "buyer"),
        (b'{"buyer": "b", "items": {}}', "items"),
        (b'{"buyer": "b", "items": [{"amount": "1"}]}', "items[0].amount"),
        (b'{"buyer": "b", "items": [{"amount": 1}, {"amount": 0}]}', "items[1].amount"),
        (b'{"buyer": "b", "items": [{}]}', "items[0].amount"),
        (b'{"buyer": "b", "items": [{"amount": 1, "x": 1}]}', "items[0].x"),
        (b'{"buyer": "b", "items": [{"amount": 1, "names": {"a": "b"}}]}', "items[0].names[...]"),
        (b"[]", None),
        (b"", None),
        (b"{", None),
        (b"\xff", None),
        (b'{"buyer": "\xff", "items": []}', None),
    ],
)
def test_what_doesn_t_fit_is_named(body: bytes, field: str | None) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode_bytes(body, Order)
    assert caught.value.field == field
    assert caught.value.detail
    assert "$" not in caught.value.detail


@given(st.binary(max_size=60))
def test_no_body_breaks_it(body: bytes) -> None:
    try:
        decode_bytes(body, Order)
    except MalformedBody:
        pass


def test_what_goes_out_comes_in() -> None:
    order = Order("b", [Item(3, {"a": 1})])
    body = json_response(order, 201).body
    assert isinstance(body, bytes)
    assert decode_bytes(body, Order) == order


def test_problems_say_when_to_come_back() -> None:
    response = problem_response(RateLimited(retry_after_s=7))
    assert (response.status, response.headers["Retry-After"], response.content_type) == (429, "7", PROBLEM_JSON)
    assert "Retry-After" not in problem_response(MalformedBody()).headers
    assert problem_response(Unauthorized()).headers["WWW-Authenticate"] == "Bearer"


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server whose answers are whole; it answers with the headers that the query names."""

    async def answer(request: web.Request) -> web.Response:
        return json_response({"é": "x" * int(request.query.get("length", 1))}, 201, {"X-Said": request.query.get("said", "")})

    app = web.Application()
    app.router.add_route("*", "/", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def said(port: int, request: bytes) -> list[tuple[bytes, dict[bytes, bytes], bytes]]:
    """All answers on one connection, until the server closes it: status line, headers, body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answers = []
    async with asyncio.timeout(10):
        while head := (await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""):
            status, *lines = head.rstrip().split(b"\r\n")
            headers = {name.lower(): value for name, value in (line.split(b": ", 1) for line in lines if b": " in line)}
            body = b"" if request.startswith(b"HEAD") else await reader.readexactly(int(headers[b"content-length"]))
            answers.append((status, headers, body))
            if headers.get(b"connection") == b"close" or b"1.0" in status:
                assert await reader.read() == b""
                break
    writer.close()
    return answers


async def test_answers_go_out_whole_one_after_the_other_on_a_connection(port: int) -> None:
    get = b"GET /?length=100000 HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"POST /?said=yes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    first, second, third = await said(port, get + get + last)
    assert first[0] == second[0] == third[0] == b"HTTP/1.1 201 Created"
    assert first[2] == second[2] == '{"é":"'.encode() + b"x" * 100_000 + b'"}'
    assert third[1][b"x-said"] == b"yes"
    assert third[2] == '{"é":"x"}'.encode()
    assert b"connection" not in first[1]
    for name in (b"content-type", b"content-length", b"server"):
        assert (first[1][name] == third[1][name]) is (name != b"content-length")
    assert parsedate_to_datetime(first[1][b"date"].decode()).tzinfo is not None


async def test_what_is_not_usual_is_answered_too(port: int) -> None:
    ((status, headers, body),) = await said(port, b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
    assert (status, body) == (b"HTTP/1.0 201 Created", '{"é":"x"}'.encode())
    ((status, headers, _),) = await said(port, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (status, headers[b"content-length"]) == (b"HTTP/1.1 201 Created", b"10")


async def test_a_header_can_t_become_two(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /?said=a%0d%0aX-Evil:%20b HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()
    assert b"evil" not in answer.lower()
    writer.close()
