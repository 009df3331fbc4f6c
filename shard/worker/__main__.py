"""The worker's process: `python -m shard.worker --config FILE --name worker-s0-1 --shard s0 --own-port PORT`."""

from __future__ import annotations

import argparse
import hmac
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
from aiohttp import web

from oncepay.budget import Budget
from oncepay.errors import Unauthorized, Unavailable
from oncepay.service import Service, json_response, run
from oncepay.stripe_client import StripeGateway
from shard.store.store import Shards
from shard.worker.lease import Seat
from shard.worker.stream import ROLE
from shard.worker.worker import Worker


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Register health and the cache's listing, and start working."""
    settings, shard = service.settings, service.args.shard
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        budget = Budget(service.etcd, settings.stripe, name=service.name, role="worker")
        budget.start()
        stack.push_async_callback(budget.stop)
        stripe = await stack.enter_async_context(StripeGateway(settings.stripe, budget))
        shards = Shards(service.etcd, settings, role=ROLE, password=settings.postgres.worker_password, actor=service.name)
        stack.push_async_callback(shards.stop)
        seat = Seat(service.etcd, shard, service.name)
        stack.push_async_callback(seat.leave)
        worker = Worker(shard, service.name, settings, shards, stripe, seat, http)
        service.check("feed", worker.check_feed)
        service.check("cache", worker.check_cache)
        service.route("GET", "/v1/cache", lambda request: _cache(request, worker, settings.internal_token))
        for method in ("GET", "POST"):
            service.route(method, "/v1/resnapshot", lambda request: _resnapshot(request, worker, settings.internal_token))
        service.spawn(worker.run(), "worker")
        yield


def _authorize(request: web.Request, token: str) -> None:
    given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Unauthorized("a worker's calls take the secret between services")


async def _resnapshot(request: web.Request, worker: Worker, token: str) -> web.Response:
    """POST /v1/resnapshot: begin a rebuild; GET: how far it is. Both answer `{"name", "feed", "progress": {…}}`."""
    _authorize(request, token)
    if not (worker.active and worker.resnapshot):
        raise Unavailable("this worker stands by")
    progress = worker.resnapshot.ask() if request.method == "POST" else worker.resnapshot.progress
    status = 202 if request.method == "POST" else 200
    return json_response({"name": worker.name, "feed": worker.problem, "progress": progress}, status=status)


async def _cache(request: web.Request, worker: Worker, token: str) -> web.Response:
    """GET /v1/cache: `{"shard", "name", "certain_lsn", "pending": [[key, version, status], …]}`, of the active worker."""
    _authorize(request, token)
    if not (worker.active and worker.filled and worker.feed):
        raise Unavailable("this worker stands by, or its cache is being filled")
    pending = [(item.key, item.version, item.status.value) for item in worker.cache]
    body = {"shard": worker.shard, "name": worker.name, "certain_lsn": worker.feed.certain_lsn, "pending": pending}
    return json_response(body)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.prog = "python -m shard.worker"
    parser.epilog = "example: python -m shard.worker --config oncepay.toml --name worker-s0-1 --shard s0 --own-port 8110"
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
        argv=argv,
    )


if __name__ == "__main__":
    main()
