"""The aggregator's end of the benchmark of the feed: takes batches and says so. A process of its own, as the aggregator is."""

from __future__ import annotations

import sys

import msgspec
from aiohttp import web

from oncepay.feed import FEED_BYTES_MAX, FeedAnswer, FeedPosition, lsn_text


class Head(msgspec.Struct, array_like=True):
    """The members of a batch before its rows."""

    shard: str
    incarnation: str
    epoch: int
    from_lsn: int
    to_lsn: int


def main() -> None:
    """`PORT WATERMARK INCARNATION`: begin there; a line on standard output for each batch says where it is then."""
    port, watermark, incarnation = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    at = [watermark]

    async def position(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(FeedPosition(at[0], incarnation, 0)))

    async def post(request: web.Request) -> web.Response:
        head = msgspec.msgpack.decode(await request.read(), type=Head)
        at[0] = head.to_lsn
        print(lsn_text(at[0]), flush=True)
        return web.Response(body=msgspec.json.encode(FeedAnswer(True, at[0], incarnation, head.epoch)))

    app = web.Application(client_max_size=FEED_BYTES_MAX)
    app.router.add_get("/v1/feed/{shard}", position)
    app.router.add_post("/v1/feed", post)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=lambda *_: print("listening", flush=True))


if __name__ == "__main__":
    main()
