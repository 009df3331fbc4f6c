"""The shell of every HTTP service: arguments, logs, listening, health, errors, authorization, a graceful end.

    @asynccontextmanager
    async def start(service: Service) -> AsyncIterator[None]:
        service.route("POST", "/v1/things", create, scope="pay")
        service.check("store", store.ping)
        yield
        await store.close()

    def main() -> None:
        run(start, kind="things", description="Keeps things.")

`start` registers what the service has and must not wait for other parts (that is what checks are for): the ports open
when it has reached its `yield`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from time import perf_counter
from typing import NamedTuple, TypeVar

from aiohttp import HttpVersion11, web

from oncepay import logs, telemetry
from oncepay.apikeys import NO_AUTH, PREFIX, ApiKey, Authenticator, Scope
from oncepay.errors import Forbidden, MalformedBody, NotFound, OncepayError, SettingsError, Unavailable
from oncepay.etcd import Etcd, Mirror
from oncepay.front import Front
from oncepay.settings import Settings, load
from oncepay.web import MethodNotAllowed, Request, decode, from_http_exception, json_response, problem_response

__all__ = ["Handler", "NotReady", "Request", "Service", "Start", "api_key", "decode", "json_response", "request_id", "run"]

BODY_LIMIT_BYTES = 1 << 20
CHECK_TIMEOUT_S = 2.0
DRAIN_S = 0.5
SHUTDOWN_S = 10.0
BACKLOG = 1024
COLLECT_AFTER = (50_000, 0, 10)
"""A look for garbage in rings after so many new objects, which sorts those that live on among the old at once; at the old after
ten of these. Python's own rhythm looked through all that is in flight again and again: a tenth of a router's time."""
REQUEST_ID_CHARACTERS = 64

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Check = Callable[[], Awaitable[None]]
Asked = TypeVar("Asked", bound=Request)

_MEMBER = re.compile(r"\{(\w+)\}")
_REQUEST_ID = web.RequestKey("request_id", str)
_API_KEY = web.RequestKey("api_key", ApiKey)

_log = logs.get_logger("service")


class NotReady(Unavailable):
    """This process can't take requests now."""

    slug = "not-ready"


class ClientGone(OncepayError):
    """The client closed the connection before it was answered."""

    status = 499
    slug = "client-gone"


class Internal(OncepayError):
    """Something went wrong here."""


def api_key(request: Request) -> ApiKey:
    """Who sent the request; on a public route nobody in particular."""
    key: ApiKey = request.get(_API_KEY, NO_AUTH)
    return key


def request_id(request: Request) -> str:
    """The request's id: what the client sent as X-Request-Id, else one of ours."""
    given: str = request[_REQUEST_ID]
    return given


class Route(NamedTuple):
    """What is served under a path as it was registered; scope None: to everybody."""

    method: str
    path: str
    scope: Scope | None


class Service:
    """One process of a service, while it runs."""

    def __init__(
        self,
        settings: Settings,
        *,
        kind: str,
        name: str,
        args: argparse.Namespace | None = None,
        body_limit_bytes: int = BODY_LIMIT_BYTES,
    ) -> None:
        self.settings = settings
        self.kind = kind
        self.name = name
        self.args = args or argparse.Namespace()
        self.etcd = Etcd(settings.etcd)
        self.draining = asyncio.Event()
        """Set when the process was told to end; requests are still served for a moment."""
        self.stopping = asyncio.Event()
        self.failed = False
        self.app = web.Application(client_max_size=body_limit_bytes)
        self._body_limit_bytes = body_limit_bytes
        self._checks: dict[str, Check] = {}
        self._openapi: object = None
        self._before_metrics: list[Callable[[], None]] = []
        self._routes: list[Route] = []
        self._busy: list[tuple[str, str, Callable[[Request], Awaitable[web.StreamResponse]]]] = []
        self._ids = map(f"{os.urandom(6).hex()}-{{:x}}".format, itertools.count(1))
        self._tasks: set[asyncio.Task[None]] = set()
        self._keys = Mirror(self.etcd, PREFIX)
        self._authenticator = Authenticator(self._keys)
        self.route("GET", "/livez", self._livez)
        self.route("GET", "/readyz", self._readyz)
        self.route("GET", "/metrics", self._metrics)
        self.route("GET", "/openapi.json", self._openapi_json)

    # What a service registers

    def busy_route(
        self, method: str, path: str, handler: Callable[[Request], Awaitable[web.StreamResponse]], *, scope: Scope | None = None
    ) -> None:
        """Serve `method path` like `route`, and its usual requests before aiohttp (`oncepay.front`): answers come whole."""
        wrapped = self._wrap(handler, telemetry.RequestMetrics(method, path), scope)
        self._add(method, path, wrapped)
        self._busy.append((method, path, wrapped))
        self._routes.append(Route(method, path, scope))

    def route(self, method: str, path: str, handler: Handler, *, scope: Scope | None = None, seller_member: str = "") -> None:
        """Serve `method path`; `scope` None makes it public (health, webhooks that carry a signature).

        `seller_member` names the member of the path that holds a seller's id: only such a route is open to a seller's own
        API key, and only for that seller.
        """
        wrapped = self._wrap(handler, telemetry.RequestMetrics(method, path), scope, seller_member)
        self._add(method, path, wrapped)
        self._routes.append(Route(method, path, scope))

    def _add(self, method: str, path: str, wrapped: Handler) -> None:
        pattern = _MEMBER.sub(r"{\1:[^/]+}", path)  # a member may hold braces too
        if method == "GET":
            self.app.router.add_get(pattern, wrapped, expect_handler=_expected)
        else:
            self.app.router.add_route(method, pattern, wrapped, expect_handler=_expected)

    @property
    def routes(self) -> tuple[Route, ...]:
        """What is served, in the order in which it was registered."""
        return tuple(self._routes)

    def check(self, name: str, check: Check) -> None:
        """`/readyz` answers 503 while `check` raises or takes longer than CHECK_TIMEOUT_S."""
        self._checks[name] = check

    def before_metrics(self, bring_up_to_date: Callable[[], None]) -> None:
        """Call this before each `/metrics`: for what is cheaper to count as a plain integer, many thousand times a second."""
        self._before_metrics.append(bring_up_to_date)

    def openapi(self, document: object) -> None:
        """What `/openapi.json` answers."""
        self._openapi = document

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run `work` in the background until the service ends. When it raises, the process ends with 1."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background task failed", task=task.get_name(), exc_info=error)
            self.failed = True
            self.stopping.set()

    # A request

    def _wrap(
        self,
        handler: Callable[[Asked], Awaitable[web.StreamResponse]],
        metrics: telemetry.RequestMetrics,
        scope: Scope | None,
        seller_member: str = "",
    ) -> Callable[[Asked], Awaitable[web.StreamResponse]]:
        check = self._authenticator.check if scope and self.settings.auth else None
        ids = self._ids

        async def handle(request: Asked) -> web.StreamResponse:
            began = perf_counter()
            headers = request.headers
            given = headers.get("X-Request-Id")
            if given is None or len(given) > REQUEST_ID_CHARACTERS or not (given.isascii() and given.isprintable()):
                given = next(ids)
            request[_REQUEST_ID] = given
            response: web.StreamResponse
            try:
                if check is not None and scope is not None:
                    key = request[_API_KEY] = check(headers.get("Authorization"), scope)
                    if key.seller and request.match_info.get(seller_member) != key.seller:
                        raise Forbidden(f"{key.name} may see the seller {key.seller} alone")
                response = await handler(request)
            except Exception as error:
                response = _error_response(request, error)
            response.headers["X-Request-Id"] = given
            metrics.done(response.status, perf_counter() - began)
            return response

        return handle

    async def _no_such_route(self, request: web.Request) -> web.StreamResponse:
        """Serves what no other route does: 405 where the path is known, else 404."""
        allowed: set[str] = set()
        for resource in self.app.router.resources():
            allowed |= (await resource.resolve(request))[1]
        allowed.discard("*")
        if not allowed:
            raise NotFound(f"there is no {request.path}")
        error = MethodNotAllowed(f"{request.path} takes {', '.join(sorted(allowed))}")
        telemetry.ERRORS.labels(error.slug).inc()
        return problem_response(error, {"Allow": ", ".join(sorted(allowed))})

    # What every service serves

    async def _livez(self, request: web.Request) -> web.Response:
        return json_response({"ok": True, "service": self.kind, "name": self.name})

    async def _readyz(self, request: web.Request) -> web.Response:
        failed = await self.not_ready()
        telemetry.READY.set(not failed)
        if not failed:
            return json_response({"ok": True, "checks": dict.fromkeys(self._checks, "ok")})
        problem = NotReady("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        return problem_response(problem, more={"checks": failed})

    async def not_ready(self) -> dict[str, str]:
        """The checks that fail now, and why."""
        if self.draining.is_set():
            return {"draining": "the process is ending"}
        names = list(self._checks)
        reasons = await asyncio.gather(*(_reason_not_ready(self._checks[name]) for name in names))
        return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}

    async def _metrics(self, request: web.Request) -> web.Response:
        for bring_up_to_date in self._before_metrics:
            bring_up_to_date()
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=telemetry.exposition(), headers=headers)

    async def _openapi_json(self, request: web.Request) -> web.Response:
        if self._openapi is None:
            raise NotFound("this service has no API document")
        return json_response(self._openapi)

    async def _api_keys_read(self) -> None:
        if not self._keys.synced:
            raise Unavailable("the API keys could not be read yet")

    # From start to end

    async def serve(self, start: Start, sockets: Sequence[socket.socket], *, drain_s: float = DRAIN_S) -> int:
        """Run `start`, listen on `sockets`, until `stopping` is set; the process's exit code."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.etcd)
            if self.settings.auth:
                await stack.enter_async_context(self._keys)
                self.check("api_keys", self._api_keys_read)
            await stack.enter_async_context(start(self))
            stack.push_async_callback(self._end_tasks)
            self.spawn(self.etcd.warn_of_old_members(), "etcd-versions")
            no_such_route = self._wrap(self._no_such_route, telemetry.RequestMetrics("*", "*"), None)
            self.app.router.add_route("*", "/{rest:.*}", no_such_route, expect_handler=_expected)
            runner = web.AppRunner(self.app, handle_signals=False, access_log=None, shutdown_timeout=SHUTDOWN_S)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            assert runner.server is not None
            front = Front(runner.server, body_bytes_max=self._body_limit_bytes)
            stack.push_async_callback(front.close, SHUTDOWN_S)
            for method, path, handler in self._busy:
                front.route(method, path, handler)
            for sock in sockets:
                await front.listen(sock, BACKLOG)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*COLLECT_AFTER)
            _log.info("serving", addresses=[sock.getsockname()[:2] for sock in sockets])
            await self.stopping.wait()
            self.draining.set()
            _log.info("draining")
            await asyncio.sleep(0 if self.failed else drain_s)
        _log.info("stopped")
        return 1 if self.failed else 0

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Start = Callable[[Service], AbstractAsyncContextManager[None]]


async def _expected(request: web.Request) -> None:
    """Let a client that asks before it sends its body go on. aiohttp's own would quote what else is expected, whose bytes may be
    such as no answer can hold."""
    if request.version != HttpVersion11:
        return
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun


def _error_response(request: Request, error: Exception) -> web.Response:
    """The problem document of `error`, logged and counted."""
    if isinstance(error, web.HTTPException):
        error = from_http_exception(error)
    if isinstance(error, OncepayError):
        known, exc_info = error, None
    elif request.transport is None or request.transport.is_closing():
        known, exc_info = ClientGone(), None
    elif isinstance(error, web.RequestPayloadError):
        known, exc_info = MalformedBody("the body can't be read as its headers say"), None
    else:
        known, exc_info = Internal(), error
    telemetry.ERRORS.labels(known.slug).inc()
    log = _log.debug if known.status < 500 else _log.warning if exc_info is None else _log.error
    log(
        known.slug,
        method=request.method,
        path=request.path,
        status=known.status,
        detail=known.detail,
        request_id=request_id(request),
        exc_info=exc_info,
    )
    return problem_response(known)


async def _reason_not_ready(check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check()
    except OncepayError as error:
        return str(error)
    except TimeoutError:
        return f"no answer in {CHECK_TIMEOUT_S:g} s"
    except Exception as error:
        _log.error("readiness check failed", exc_info=error)
        return type(error).__name__
    return ""


def parser(kind: str, description: str) -> argparse.ArgumentParser:
    """The arguments that every service takes."""
    made = argparse.ArgumentParser(
        prog=f"python -m {kind}",
        description=description,
        epilog=f"example: python -m {kind} --config oncepay.toml --name {kind}-1 --port 8080 --own-port 8090",
    )
    made.add_argument("--config", metavar="FILE", help="the deployment's settings (default: $ONCEPAY_CONFIG)")
    made.add_argument("--name", default=f"{kind}-1", help="this process's name in logs and records (default: %(default)s)")
    made.add_argument("--port", type=int, required=True, help="the port that the service's processes share")
    made.add_argument("--own-port", type=int, help="a port of this process alone, for health checks and load balancers")
    made.add_argument(
        "--drain-s",
        type=float,
        default=DRAIN_S,
        help="seconds from SIGTERM, and /readyz 503, to the ports' end: longer than a load balancer needs to notice "
        "(default: %(default)s)",
    )
    made.add_argument("--host", help="the address to listen on (default: the settings' host)")
    return made


def listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """A bound socket; with `shared` other processes may bind the same port, and the kernel deals out connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setblocking(False)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise SettingsError(f"can't listen on {host}:{port}: {error.strerror}") from error
    return sock


def run(
    start: Start,
    *,
    kind: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    body_limit_bytes: int = BODY_LIMIT_BYTES,
    argv: Sequence[str] | None = None,
) -> None:
    """The main of a service: parse, listen, serve until SIGTERM or SIGINT, exit.

    Exit codes: 0 after a signal, 1 when a background task failed, 2 when the settings can't be used.
    """
    made = parser(kind, description)
    if add_arguments is not None:
        add_arguments(made)
    args = made.parse_args(argv)
    try:
        settings = load(args.config)
        host = args.host or settings.host
        sockets = [listen(host, args.port, shared=True)]
        if args.own_port is not None:
            sockets.append(listen(host, args.own_port, shared=False))
    except SettingsError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        sys.exit(2)
    logs.setup(settings.log_level, service=kind, process=args.name)

    async def serve() -> int:
        service = Service(settings, kind=kind, name=args.name, args=args, body_limit_bytes=body_limit_bytes)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.stopping.set)
        return await service.serve(start, sockets, drain_s=args.drain_s)

    import uvloop

    sys.exit(uvloop.run(serve()))
