"""Where each shard's leader is: Patroni's own keys in etcd, watched.

A leader found here is only a hint. That it may acknowledge is proved by the quorum commit and its evidence.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from oncepay.errors import ShardUnavailable
from oncepay.etcd import Etcd, Mirror
from oncepay.etcd.types import KeyValue


class Node(msgspec.Struct, frozen=True):
    """A Postgres node of a shard."""

    name: str
    host: str
    port: int


class _Member(msgspec.Struct):
    conn_url: str = ""


class Leaders:
    """Every shard's leader and members. Callbacks get the shard's name when its leader changes or goes."""

    def __init__(self, etcd: Etcd) -> None:
        self._mirror = Mirror(etcd, "patroni/", on_change=self._changed)
        self._current: dict[str, Node] = {}
        self._member_slots: dict[str, list[str]] = {}
        self._callbacks: list[Callable[[str], None]] = []
        self._waiters: dict[str, asyncio.Event] = {}

    async def start(self, timeout_s: float = 60.0) -> None:
        """Begin to watch. Raises EtcdUnavailable after `timeout_s`."""
        self._mirror.start()
        await self._mirror.wait_synced(timeout_s)

    async def stop(self) -> None:
        """End the watch."""
        await self._mirror.stop()

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Call `callback(shard)` whenever that shard's leader changes."""
        self._callbacks.append(callback)

    def current(self, shard: str) -> Node | None:
        """The leader as etcd names it, None while there is none."""
        return self._current.get(shard)

    async def wait(self, shard: str, timeout_s: float) -> Node:
        """The leader, as soon as there is one. Raises ShardUnavailable after `timeout_s`."""
        event = self._waiters.setdefault(shard, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                while (node := self._current.get(shard)) is None:
                    event.clear()
                    await event.wait()
        except TimeoutError:
            raise ShardUnavailable(f"shard {shard} has had no leader for {timeout_s:.0f} s") from None
        return node

    def member_slots(self, shard: str) -> list[str]:
        """The names of the physical replication slots that the shard's members use, as Patroni makes them."""
        found = self._member_slots.get(shard)
        if found is None:
            start = f"{shard}/members/"
            found = [slot_name(key[len(start) :]) for key in self._mirror.kvs if key.startswith(start)]
            self._member_slots[shard] = found
        return found

    def nodes(self, shard: str) -> list[Node]:
        """All nodes of the shard that Patroni knows, by name."""
        start = f"{shard}/members/"
        found = (self._member(shard, key[len(start) :]) for key in sorted(self._mirror.kvs) if key.startswith(start))
        return [node for node in found if node is not None]

    def _changed(self, key: str, value: KeyValue | None) -> None:
        shard, _, rest = key.partition("/")
        if rest != "leader" and not rest.startswith("members/"):
            return
        self._member_slots.pop(shard, None)
        before, now = self._current.get(shard), self._find(shard)
        if before == now:
            return
        if now is None:
            self._current.pop(shard, None)
        else:
            self._current[shard] = now
            self._waiters.setdefault(shard, asyncio.Event()).set()
        for callback in self._callbacks:
            callback(shard)

    def _find(self, shard: str) -> Node | None:
        leader = self._mirror.get(f"{shard}/leader")
        if leader is None:
            return None
        return self._member(shard, leader.value.decode())

    def _member(self, shard: str, name: str) -> Node | None:
        member = self._mirror.get(f"{shard}/members/{name}")
        if member is None:
            return None
        url = urlsplit(msgspec.json.decode(member.value, type=_Member).conn_url)
        return Node(name, url.hostname, url.port) if url.hostname and url.port else None


def slot_name(member: str) -> str:
    """Patroni's rule for the physical slot of a member (its `slot_name_from_member_name`)."""
    return re.sub(r"[^a-z0-9_]", lambda match: "_" if match.group() in "-." else f"u{ord(match.group()):04d}", member.lower())[
        :63
    ]
