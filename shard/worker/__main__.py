"""The worker's process: `python -m shard.worker --config FILE --name worker-s0-1 --shard s0 --own-port PORT`."""

from __future__ import annotations

import argparse
import hmac
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from oncepay.errors import Unauthorized, Unavailable
from oncepay.service import Service, decode, json_response, run
from shard.worker.duty import Duty

EVENTS_BYTES_MAX = 32 << 20
"""The largest hand-over: several times a part of the reader's, for one event that is larger."""
EVERYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104 (compared with, not listened on)


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Register health and a worker's calls, and stand by."""
    settings = service.settings
    duty = Duty(service.args.shard, service.name, settings, service.etcd, _url(service))
    service.check("feed", duty.check_feed)
    service.check("cache", duty.check_cache)
    token = settings.internal_token
    service.route("GET", "/v1/cache", lambda request: _cache(request, duty, token))
    service.route("POST", "/v1/events", lambda request: _events(request, duty, token))
    for method in ("GET", "POST"):
        service.route(method, "/v1/resnapshot", lambda request: _resnapshot(request, duty, token))
    service.spawn(duty.run(), "worker")
    yield
    await duty.leave()


def _url(service: Service) -> str:
    """Where other workers reach this process."""
    if service.args.url:
        return str(service.args.url).rstrip("/")
    host = service.args.host or service.settings.host
    return f"http://{socket.gethostname() if host in EVERYWHERE else host}:{service.args.own_port or service.args.port}"


def _authorize(request: web.Request, token: str) -> None:
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Unauthorized("a worker's calls take the secret between services")


async def _resnapshot(request: web.Request, duty: Duty, token: str) -> web.Response:
    """POST /v1/resnapshot: begin a rebuild; GET: how far it is. Both answer `{"name", "feed", "progress": {…}}`."""
    _authorize(request, token)
    worker = duty.active()
    if worker.resnapshot is None:
        raise Unavailable("this worker is taking over")
    progress = worker.resnapshot.ask() if request.method == "POST" else worker.resnapshot.progress
    status = 202 if request.method == "POST" else 200
    return json_response({"name": worker.name, "feed": worker.problem, "progress": progress}, status=status)


async def _events(request: web.Request, duty: Duty, token: str) -> web.Response:
    """POST /v1/events: Stripe's events of this shard's payments. 200 once their effects are committed: how many had which."""
    _authorize(request, token)
    worker = duty.active()
    if worker.handed is None:
        raise Unavailable("the worker's cache is being filled")
    from shard.worker.events import HandOver

    return json_response(await worker.handed.take(await decode(request, HandOver)))


async def _cache(request: web.Request, duty: Duty, token: str) -> web.Response:
    """GET /v1/cache: `{"shard", "name", "certain_lsn", "pending": [[key, version, status], …]}`, of the active worker."""
    _authorize(request, token)
    worker = duty.active()
    if not (worker.filled and worker.feed):
        raise Unavailable("the worker's cache is being filled")
    pending = [(str(item.key), item.version, item.status.value) for item in worker.cache]
    pending += [(item.key, item.version, item.status.value) for item in worker.payouts]
    body = {"shard": worker.shard, "name": worker.name, "certain_lsn": worker.feed.certain_lsn, "pending": pending}
    return json_response(body)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.prog = "python -m shard.worker"
    parser.epilog = "example: python -m shard.worker --config oncepay.toml --name worker-s0-1 --shard s0 --own-port 8110"
    parser.add_argument("--url", help="where other workers reach this one (default: its host and own port)")
    parser.add_argument("--shard", required=True, help="the shard that this worker serves")


def main() -> None:
    """Run until SIGTERM. A worker shares no port, so its own is the one that it listens on."""
    argv = sys.argv[1:]
    if "--port" not in argv and not any(word.startswith("--port=") for word in argv):
        argv = [word.replace("--own-port", "--port", 1) if word.startswith("--own-port") else word for word in argv]
    run(
        start,
        kind="worker",
        description="Looks after a shard's open payments and forwards its changes to the aggregator.",
        add_arguments=_arguments,
        body_limit_bytes=EVENTS_BYTES_MAX,
        argv=argv,
    )


if __name__ == "__main__":
    main()
