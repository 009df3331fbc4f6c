"""A session with Postgres that the network has lost ends by itself, where the system is asked for it."""

from __future__ import annotations

import asyncio
import socket

import asyncpg
import pytest

from shard.store.sessions import IDLE_S, INTERVAL_S, PROBES, UNACKNOWLEDGED_MS, watched
from shard.store.store import Shards

pytestmark = pytest.mark.cluster


async def test_the_system_watches_each_session(store: Shards) -> None:
    node = store.leaders.current("s0")
    assert node is not None
    session = await store.connect(node.host, node.port)
    try:
        sock = session._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        asked = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [sock.getsockopt(socket.IPPROTO_TCP, each) for each in asked] == [IDLE_S, INTERVAL_S, PROBES, UNACKNOWLEDGED_MS]
        assert await session.fetchval("select 1") == 1
    finally:
        session.terminate()


async def test_a_commit_that_waits_is_not_cut_off(store: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is acknowledged by its node's kernel, however long Postgres takes."""
    monkeypatch.setattr("shard.store.sessions._OPTIONS", ((socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 500),))
    node = store.leaders.current("s0")
    assert node is not None
    session: asyncpg.Connection = watched(await store.connect(node.host, node.port))
    try:
        async with asyncio.timeout(30):
            assert await session.fetchval("select 1 from pg_sleep(3)") == 1
    finally:
        session.terminate()
