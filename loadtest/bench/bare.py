"""The yardstick: a bare aiohttp handler that answers with time-ordered UUIDs (like version 7), under uvloop.

python -m loadtest.bench.bare --port 18000
"""

from __future__ import annotations

import argparse
import os
import time
import uuid

import msgspec
import uvloop
from aiohttp import web


class Request(msgspec.Struct):
    count: int


def uuid7() -> str:
    """48 bits of milliseconds, the rest random."""
    return str(uuid.UUID(int=(time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | int.from_bytes(os.urandom(9), "big") | 1 << 63))


async def issue(request: web.Request) -> web.Response:
    body = msgspec.json.decode(await request.read(), type=Request)
    keys = msgspec.json.encode({"keys": [uuid7() for _ in range(body.count)]})
    return web.Response(body=keys, status=201, content_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    app = web.Application()
    app.router.add_post("/v1/keys", issue)
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=args.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
