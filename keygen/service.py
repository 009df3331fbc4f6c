"""The key service's HTTP side."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
from aiohttp import web
from prometheus_client import Counter, Gauge

from keygen.blocks import Blocks
from keygen.openapi import document
from keygen.pool import AHEAD_S, Pool
from keygen.records import BLOCK_KEYS, SMALLEST_BLOCK_KEYS
from keygen.slots import SlotRange, check
from oncepay.keys import SLOTS
from oncepay.service import Request, Service, decode, json_response, run

KEYS_A_REQUEST = 10_000

ISSUED = Counter("oncepay_keys_issued", "Keys given out.")
READY = Gauge("oncepay_keys_ready", "Keys that are made and wait to be given out.")
AVAILABLE = Gauge("oncepay_keys_available", "Keys that can be issued without etcd.")
AVAILABLE_S = Gauge("oncepay_keys_available_seconds", "How long these last at the recent rate; +Inf without demand.")
KEYS_LEFT = Gauge("oncepay_keys_pool_left", "Keys left in all open blocks.")
BLOCKS_FREE = Gauge("oncepay_keys_blocks_free", "Blocks that no replica owns.")

_NO_STORE = {"Cache-Control": "no-store"}


Slot = Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)]


class IssueRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/keys. `slots`: first and last of the range that the keys shall be in; all by default."""

    count: Annotated[int, msgspec.Meta(ge=1, le=KEYS_A_REQUEST)]
    slots: tuple[Slot, Slot] | None = None


class Issued(msgspec.Struct, frozen=True):
    """The answer of POST /v1/keys."""

    keys: list[str]


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Routes, checks and the pool's upkeep."""
    pool = Pool(Blocks(service.etcd, service.name, service.args.block_keys), ahead_s=service.args.ahead_s)
    counted = 0

    async def issue(request: Request) -> web.Response:
        asked = await decode(request, IssueRequest)
        count = asked.count
        if asked.slots is None:
            keys = pool.take(count) or await pool.wait(count)
        else:
            slots = SlotRange(*asked.slots)
            check(slots, count)
            keys = await pool.take_in(slots, count)
        return json_response(Issued(keys), 201, _NO_STORE)

    async def state(request: web.Request) -> web.Response:
        return json_response(pool.state())

    def count_issued() -> None:
        nonlocal counted
        ISSUED.inc(pool.issued - counted)
        counted = pool.issued

    service.before_metrics(count_issued)
    READY.set_function(lambda: pool.ready)
    AVAILABLE.set_function(lambda: pool.available)
    AVAILABLE_S.set_function(lambda: pool.available_s)
    KEYS_LEFT.set_function(lambda: pool.state().keys_left)
    BLOCKS_FREE.set_function(lambda: pool.state().blocks_free)
    service.busy_route("POST", "/v1/keys", issue, scope="pay")
    service.route("GET", "/v1/keys/pool", state, scope="operate")
    service.check("keys", pool.check)
    service.openapi(document(KEYS_A_REQUEST))
    service.spawn(pool.run(), "pool")
    yield


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block-keys", type=_block_keys, default=BLOCK_KEYS, help="keys a new block has (default: %(default)s)")
    parser.add_argument(
        "--ahead-s",
        type=float,
        default=AHEAD_S,
        help="seconds of demand that are persisted ahead, to bridge an outage of etcd (default: %(default)s)",
    )


def _block_keys(text: str) -> int:
    number = int(text)
    if number < SMALLEST_BLOCK_KEYS:
        raise argparse.ArgumentTypeError(f"a block has at least {SMALLEST_BLOCK_KEYS} keys")
    return number


def main() -> None:
    """Serve until told to end."""
    run(start, kind="keygen", description="Issues idempotency keys.", add_arguments=_arguments)
