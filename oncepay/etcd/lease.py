"""A lease and its keepalives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aetcd import rpc

from oncepay.errors import OncepayError
from oncepay.etcd.members import METADATA, Members, NotConnected
from oncepay.logs import get_logger

RETRY_PAUSE_S = 0.2

_log = get_logger("etcd")


class Lease:
    """A lease of etcd, kept alive until it is revoked or lost.

    Its deadline is the holder's own view, on the monotonic clock: `ttl_s` after the *sending* of the last keepalive that
    was acknowledged, so never later than etcd's own. A lease is no mutual exclusion: a holder that froze between a look
    at `held` and an action still acts, so the action itself has to be fenced.
    """

    __slots__ = ("_deadline", "_members", "_on_lost", "_revoke", "_task", "id", "lost", "ttl_s")

    def __init__(
        self, members: Members, lease_id: int, ttl_s: int, granted_at: float, revoke: Callable[[int], Awaitable[None]]
    ) -> None:
        self.id = lease_id
        self.ttl_s = ttl_s
        self.lost = asyncio.Event()
        self._members = members
        self._deadline = granted_at + ttl_s
        self._revoke = revoke
        self._on_lost: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether the lease is surely alive at etcd now, by the local clock; right also just after a freeze."""
        return not self.lost.is_set() and time.monotonic() < self._deadline

    @property
    def remaining_s(self) -> float:
        """Seconds until it counts as lost when no further keepalive is acknowledged."""
        return 0.0 if self.lost.is_set() else max(self._deadline - time.monotonic(), 0.0)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the lease is lost or revoked."""
        self._on_lost.append(callback)

    def start(self) -> asyncio.Task[None]:
        """Start the keepalives."""
        self._task = asyncio.create_task(self._keep_alive(), name=f"lease-{self.id:x}")
        return self._task

    async def revoke(self) -> None:
        """Give the lease back: its keys are deleted at once. Best effort; without etcd it ends by itself."""
        if self._task is not None:
            self._task.cancel()
        self._lose()
        try:
            await self._revoke(self.id)
        except OncepayError as error:
            _log.info("lease not revoked", lease=self.id, reason=str(error))

    async def _keep_alive(self) -> None:
        pause_s = self.ttl_s / 3
        while not self.lost.is_set():
            try:
                async with asyncio.timeout(min(pause_s, self.remaining_s)):
                    await self.lost.wait()
                return
            except TimeoutError:
                pass
            if not self.held:
                break
            pause_s = self.ttl_s / 3 if await self._ping() else RETRY_PAUSE_S
        self._lose()

    async def _ping(self) -> bool:
        """One keepalive; whether it was acknowledged. Marks the lease as lost when etcd doesn't know it any more."""
        member = self._members.current()
        sent_at = time.monotonic()
        timeout_s = min(self.ttl_s / 3, 2.0)
        try:
            await member.ready(timeout_s)
            call = member.lease.LeaseKeepAlive(timeout=timeout_s, metadata=METADATA)
            await call.write(rpc.LeaseKeepAliveRequest(ID=self.id))
            await call.done_writing()
            answer = await call.read()
        except (NotConnected, rpc.AioRpcError, asyncio.InvalidStateError):
            self._members.failed(member)
            return False
        ttl_s = int(getattr(answer, "TTL", -1))
        if ttl_s > 0:
            self._deadline = max(self._deadline, sent_at + ttl_s)
            return True
        if ttl_s == 0:
            _log.warning("lease is gone", lease=self.id)
            self._lose()
        else:
            self._members.failed(member)
        return False

    def _lose(self) -> None:
        if not self.lost.is_set():
            self.lost.set()
            for callback in self._on_lost:
                callback()
