"""What is refused before any other part is asked: the whole router, whose etcd is nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import pytest

from oncepay.service import Service, listen
from oncepay.settings import EtcdSettings, Settings
from router.app import start

NOWHERE = EtcdSettings(endpoints=("127.0.0.1:1",))


@asynccontextmanager
async def router(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a router that runs in this process."""
    service = Service(settings, kind="router", name="router-1")
    sock = listen("127.0.0.1", 0, shared=False)
    ended = asyncio.create_task(service.serve(start, [sock], drain_s=0))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}") as client:
        async with asyncio.timeout(10):
            while True:
                try:
                    async with client.get("/livez"):
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.01)
        yield client
    service.stopping.set()
    assert await ended == 0


async def statuses(client: aiohttp.ClientSession, paths: Sequence[str]) -> dict[str, int]:
    """The answers' statuses, by path."""
    found = {}
    for path in paths:
        async with client.get(path) as answer:
            found[path] = answer.status
    return found


async def test_limits_that_are_none() -> None:
    none = ("000000100999999", "000000100" + "9" * 5_000, "9" * 5_000, "0" * 9 + "5", "0", "101", "-1", "+1", "1e1", "\u0663", "")
    paths = [f"/v1/{kind}?limit={limit}" for kind in ("payments", "disputes") for limit in none]
    async with router(Settings(etcd=NOWHERE, auth=False)) as client:
        assert await statuses(client, paths) == dict.fromkeys(paths, 422)
