"""The seat of a shard's active worker: one key in etcd under a lease. The others wait for it.

A seat is no mutual exclusion: whoever loses it may not know yet. What fences is the epoch in the shard's database, which
its holder takes after the seat and which every transaction compares. So while etcd is away the holder goes on.
"""

from __future__ import annotations

import asyncio
import uuid

import msgspec

from oncepay.errors import EtcdUnavailable
from oncepay.etcd import Etcd, EtcdRefused, Lease
from oncepay.etcd.types import KeyValue
from oncepay.logs import get_logger

TTL_S = 5
RETRY_S = 0.5
RECHECK_S = 10.0
"""How often a standby looks at the key itself, whatever the watch tells."""

_log = get_logger("lease")


class Holder(msgspec.Struct, frozen=True):
    """Who sits: the process's name, a mark of this run, and where it is reached (empty: it takes no calls)."""

    name: str
    run: str
    url: str = ""


class Seat:
    """The seat under `key` (`workers/<shard>` for a shard's active worker), for the process `name`."""

    def __init__(self, etcd: Etcd, key: str, name: str, ttl_s: int = TTL_S, *, url: str = "") -> None:
        self.key = key
        self._etcd = etcd
        self._ttl_s = ttl_s
        self._value = msgspec.json.encode(Holder(name, uuid.uuid4().hex, url))
        self._lease: Lease | None = None

    async def take(self) -> None:
        """Wait until the seat is free, and take it."""
        waited = False
        while True:
            try:
                holder = await self._etcd.get(self.key)
                if holder is None or holder.value == self._value:
                    if await self._sit(holder):
                        _log.info("seat taken", key=self.key)
                        return
                    continue
                if not waited:
                    waited = True
                    _log.info("standing by", key=self.key, holder=holder.value.decode(errors="replace"))
                await self._until_changed(holder)
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.info("seat not taken", key=self.key, error=str(error))
                await asyncio.sleep(RETRY_S)

    async def held(self) -> bool:
        """Whether nobody else is known to have the seat."""
        try:
            holder = await self._etcd.get(self.key)
        except (EtcdUnavailable, EtcdRefused):
            return True
        return holder is None or holder.value == self._value

    async def lost(self) -> None:
        """Return when somebody else has the seat, or it was left. While etcd is away, or the key is nobody's, it is kept."""
        while self._lease is not None:
            await self._lease.lost.wait()
            if self._lease is None:
                return
            try:
                holder = await self._etcd.get(self.key)
                if holder is not None and holder.value != self._value:
                    _log.warning("seat lost", key=self.key, holder=holder.value.decode(errors="replace"))
                    return
                if await self._sit(holder):
                    _log.info("seat taken again", key=self.key)
                    continue
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.info("seat not renewed", key=self.key, error=str(error))
            await asyncio.sleep(RETRY_S)

    async def leave(self) -> None:
        """Give the seat up at once."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.revoke()

    async def _sit(self, holder: KeyValue | None) -> bool:
        """Write the key under a new lease, where it still is as `holder`."""
        lease = await self._etcd.grant_lease(self._ttl_s)
        revision = holder.mod_revision if holder is not None else 0
        try:
            taken = await self._etcd.compare_and_put(self.key, self._value, revision, lease.id) is not None
        except BaseException:
            await lease.revoke()
            raise
        if not taken:
            await lease.revoke()
            return False
        self._lease = lease
        return True

    async def _until_changed(self, holder: KeyValue) -> None:
        try:
            async with asyncio.timeout(RECHECK_S):
                async for event in self._etcd.watch_prefix(self.key, holder.mod_revision + 1):
                    if not hasattr(event, "kv") or event.kv.key == self.key:
                        return
        except TimeoutError:
            pass
