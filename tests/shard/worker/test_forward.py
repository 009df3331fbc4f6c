"""A forwarder whose stream changes while it asks the aggregator where it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from oncepay.feed import FeedAnswer, FeedPosition, decode_batch
from oncepay.settings import Settings
from shard.store.leader import Node
from shard.worker.errors import FeedHalted
from shard.worker.forward import Forwarder
from shard.worker.stream import Stream
from tests.shard.worker.harness import eventually


def stream(start_lsn: int) -> Stream:
    connection: Any = SimpleNamespace(confirm=lambda _lsn: None, server_lsn=1_000)
    return Stream(connection, Node("s0-n0", "127.0.0.1", 1), 1, "i", start_lsn, 1_000, True)


class Aggregator:
    """Applies what it is posted; `gate` holds up its answers about where it is."""

    def __init__(self) -> None:
        self.watermark = 100
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.page = ""
        self.posted: list[tuple[int, int]] = []

    async def position(self, _request: web.Request) -> web.Response:
        self.asked += 1
        await self.gate.wait()
        if self.page == "position":
            return web.Response(text="<html>Be right back</html>")
        return web.Response(body=msgspec.json.encode(FeedPosition(self.watermark, "i", 1)))

    async def batch(self, request: web.Request) -> web.Response:
        batch = decode_batch(await request.read())
        if self.page == "batch":
            return web.Response(text="<html>Be right back</html>")
        self.posted.append((batch.from_lsn, batch.to_lsn))
        self.watermark = batch.to_lsn
        return web.Response(body=msgspec.json.encode(FeedAnswer(True, batch.to_lsn, "i", 1)))


@asynccontextmanager
async def forwarding(aggregator: Aggregator) -> AsyncIterator[Forwarder]:
    """A forwarder that runs, before this aggregator."""
    app = web.Application()
    app.router.add_get("/v1/feed/s0", aggregator.position)
    app.router.add_post("/v1/feed", aggregator.batch)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = Settings(aggregator_url=f"http://127.0.0.1:{runner.addresses[0][1]}")
    async with aiohttp.ClientSession() as http:
        forwarder = Forwarder(http, settings, "s0", 1)
        running = asyncio.create_task(forwarder.run())
        try:
            yield forwarder
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    await runner.cleanup()


async def test_a_slot_that_jumped_ahead_meanwhile_is_not_taken_for_the_one_before() -> None:
    aggregator = Aggregator()
    async with forwarding(aggregator) as forwarder:
        forwarder.connected(stream(100))
        forwarder.offer([], 110)
        await eventually(lambda: aggregator.posted == [(100, 110)], "the first stream is forwarded")
        aggregator.gate.clear()
        forwarder.connected(stream(110))
        await eventually(lambda: aggregator.asked == 2, "the aggregator is asked where it is")
        forwarder.connected(stream(200))
        forwarder.offer([], 250)
        aggregator.gate.set()
        await eventually(lambda: isinstance(forwarder.problem, FeedHalted), "the feed halted")
        assert aggregator.posted == [(100, 110)]


async def test_a_page_that_is_not_the_aggregators_is_like_no_answer() -> None:
    """A load balancer's, with 200."""
    aggregator = Aggregator()
    async with forwarding(aggregator) as forwarder:
        for what in ("position", "batch"):
            aggregator.page = what
            forwarder.connected(stream(100))
            forwarder.offer([], 110)
            await eventually(lambda: "not the aggregator's answer" in str(forwarder.problem), f"no {what}")
        aggregator.page = ""
        await eventually(lambda: forwarder.problem is None, "it goes on")
        assert forwarder.watermark == 110
