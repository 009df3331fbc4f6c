"""The usual way: prepared keys in a Postgres table, taken with FOR UPDATE SKIP LOCKED, behind a bare aiohttp handler.

    python -m loadtest.bench.table --port 18000 --dsn postgresql://… --prepare 1000000

Checks no API key and speaks to one Postgres without a standby, committed to disk: less than a deployment would need.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from importlib.resources import files

import asyncpg
import msgspec
import uvloop
from aiohttp import web

from loadtest.bench.bare import Request

CONNECTIONS = 16
TAKE = files("loadtest.bench").joinpath("take_prepared.sql").read_text(encoding="utf-8")
PREPARE = files("loadtest.bench").joinpath("prepare_keys.sql").read_text(encoding="utf-8")
POOL: web.AppKey[asyncpg.Pool] = web.AppKey("pool")


async def issue(request: web.Request) -> web.Response:
    body = msgspec.json.decode(await request.read(), type=Request)
    rows = await request.app[POOL].fetch(TAKE, body.count)
    keys = msgspec.json.encode({"keys": [row[0] for row in rows]})
    return web.Response(body=keys, status=201 if len(rows) == body.count else 503, content_type="application/json")


async def prepare(dsn: str, count: int) -> None:
    """Make the table anew, with `count` keys."""
    connection = await asyncpg.connect(dsn)
    try:
        for statement in PREPARE.split(";"):
            if statement.strip():
                await connection.execute(statement.replace("$1", str(count)))
    finally:
        await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--prepare", type=int, default=1_000_000, help="how many keys the table gets (default: %(default)s)")
    options = parser.parse_args()
    uvloop.install()
    asyncio.run(prepare(options.dsn, options.prepare))
    app = web.Application()

    async def pool(app: web.Application) -> AsyncIterator[None]:
        async with asyncpg.create_pool(options.dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as app[POOL]:
            yield

    app.cleanup_ctx.append(pool)
    app.router.add_post("/v1/keys", issue)
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
