"""Bodies in and out: msgspec both ways, errors as problem documents (RFC 9457)."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE

from oncepay.errors import BodyTooLarge, MalformedBody, NotFound, OncepayError

T = TypeVar("T")

PROBLEM_JSON = "application/problem+json"

_USUAL = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})

_AT = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<name>[^`]*)`")
_decoders: dict[object, msgspec.json.Decoder[Any]] = {}
_encode = msgspec.json.Encoder(enc_hook=str).encode


class MethodNotAllowed(OncepayError):
    """This path doesn't take this method."""

    status = 405
    slug = "method-not-allowed"


class BadRequest(OncepayError):
    """The request can't be understood."""

    status = 400
    slug = "bad-request"


class Request(Protocol):
    """What handlers ask of a request: aiohttp's own, or one that came whole (`oncepay.front`). Headers' names in any case."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def match_info(self) -> Mapping[str, str]: ...
    @property
    def transport(self) -> asyncio.Transport | None: ...
    async def read(self) -> bytes: ...
    def get(self, key: web.RequestKey[Any], default: Any, /) -> Any: ...
    def __getitem__(self, key: web.RequestKey[Any], /) -> Any: ...
    def __setitem__(self, key: web.RequestKey[Any], value: Any, /) -> None: ...


class WholeResponse(web.Response):
    """An answer whose body is there before its first byte is sent. To a usual request it goes out as one piece.

    aiohttp prepares each answer for bodies in pieces, compression, cookies and hooks, which costs as much as a small handler.
    What is not usual (HTTP/1.0, HEAD, a connection that is to be closed) goes its way.
    """

    _to: AbstractStreamWriter | None = None

    @property
    def prepared(self) -> bool:
        return self._to is not None or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        return True if self._to is not None else super().keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        usual = request.version == HttpVersion11 and request.keep_alive and request.method in _USUAL
        if not usual or self.prepared or super().keep_alive is False:
            return await super().prepare(request)
        self._to = request.writer
        return self._to

    async def write_eof(self, data: bytes = b"") -> None:
        if self._to is None:
            await super().write_eof(data)
            return
        await self._to.write(self.piece())

    def piece(self) -> bytes:
        """The answer as it goes over the wire, on a connection that stays open."""
        body = self.body
        assert isinstance(body, bytes | None)
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *[f"{name}: {value}" for name, value in self.headers.items()]]
        head = "\r\n".join(lines)
        if head.count("\r") + head.count("\n") != 2 * len(lines) - 2:
            raise ValueError("a header's value can't hold the end of a line")
        end = f"Date: {_date(int(time.time()))}\r\nServer: {SERVER_SOFTWARE}\r\n\r\n"
        if body is None:
            assert self.status in {204, 304}, "an answer of another status says how long its body is"
            return f"{head}\r\n{end}".encode()
        return f"{head}\r\nContent-Length: {len(body)}\r\n{end}".encode() + body


@functools.lru_cache(4)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer with `body` (anything that msgspec encodes) as JSON."""
    return WholeResponse(body=_encode(body), status=status, headers=headers, content_type="application/json")


def problem_response(
    error: OncepayError, headers: Mapping[str, str] | None = None, *, more: Mapping[str, object] | None = None
) -> web.Response:
    """The error as application/problem+json with the members of `more`, and with Retry-After when it says so."""
    body = error.problem() | dict(more or {})
    response = WholeResponse(body=_encode(body), status=error.status, headers=headers, content_type=PROBLEM_JSON)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def decode(request: Request, body_type: type[T]) -> T:
    """The body as `body_type`. MalformedBody names the field; BodyTooLarge past the service's limit."""
    try:
        return decode_bytes(await request.read(), body_type)
    except web.HTTPRequestEntityTooLarge as error:
        raise BodyTooLarge(error.text or "") from None


def decode_bytes(body: bytes, body_type: type[T]) -> T:
    """`body` as JSON of `body_type`; MalformedBody with the path of the field that doesn't fit."""
    try:
        return _decoder(body_type).decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        path = match["path"] if (match := _AT.search(text)) else ""
        if named := _NAMED.match(text):
            path = f"{path}.{named['name']}" if path else named["name"]
        raise MalformedBody(_AT.sub("", text), field=path or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(f"the body is not JSON: {error}" if body else "the body is empty") from None


def from_http_exception(error: web.HTTPException) -> OncepayError:
    """The error of our family that says what aiohttp's exception says."""
    if error.status == 404:
        return NotFound()
    if error.status == 413:
        return BodyTooLarge(error.text or "")
    return BadRequest(error.reason)


def _decoder(body_type: type[T]) -> msgspec.json.Decoder[T]:
    decoder = _decoders.get(body_type)
    if decoder is None:
        decoder = _decoders[body_type] = msgspec.json.Decoder(body_type)
    return decoder
