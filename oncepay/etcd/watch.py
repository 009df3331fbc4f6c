"""Watching a prefix, through breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aetcd import rpc

from oncepay.errors import EtcdUnavailable
from oncepay.etcd.members import METADATA, Member, NotConnected
from oncepay.etcd.types import Event, Resync
from oncepay.logs import get_logger

if TYPE_CHECKING:
    from oncepay.etcd.client import Etcd

PING_S = 2.0
"""Pings are most of what an idle service does."""
SILENT_S = 3.0
"""Looked at with each ping, so a dead stream is left after 4 s."""
CONNECT_S = 1.0
RETRY_PAUSE_S = 0.1
RETRY_PAUSE_MAX_S = 1.0

_log = get_logger("etcd")


class _Broken(Exception):
    """The stream ended; open another one."""


class _Compacted(Exception):
    """Revisions that were still to come are gone."""


class Watch:
    """The changes of a prefix as an endless async iterator of `Event` and `Resync`.

    A break is bridged by revision; a stream that doesn't answer for SILENT_S seconds is broken. When etcd has compacted
    what was missed, a `Resync` with the whole content comes instead. Only revisions of events move the position: a
    progress answer may run ahead of events that are still to come.
    """

    def __init__(self, etcd: Etcd, prefix: str, from_revision: int) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self.next_revision = from_revision
        self.heard_at = time.monotonic()
        """When etcd last answered on the stream, by the monotonic clock."""

    async def __aiter__(self) -> AsyncIterator[Event | Resync]:
        members = self._etcd.members
        failures = 0
        while True:
            member = members.current()
            try:
                await member.ready(CONNECT_S)
                async with aclosing(self._stream(member)) as events:
                    async for event in events:
                        failures = 0
                        yield event
            except _Compacted:
                try:
                    kvs, revision = await self._etcd.get_prefix(self._prefix)
                except EtcdUnavailable:
                    continue
                self.next_revision = revision + 1
                self.heard_at = time.monotonic()
                yield Resync(kvs, revision)
            except (NotConnected, _Broken, rpc.AioRpcError) as error:
                members.failed(member)
                failures += 1
                if failures == 1:
                    _log.info("watch broke", prefix=self._prefix, endpoint=member.endpoint, reason=_reason(error))
                await asyncio.sleep(min(RETRY_PAUSE_S * failures, RETRY_PAUSE_MAX_S))

    async def _stream(self, member: Member) -> AsyncGenerator[Event, None]:
        """Events of one stream; ends only with _Broken, _Compacted or an AioRpcError."""
        key = self._etcd.full(self._prefix)
        create = rpc.WatchCreateRequest(
            key=key, range_end=_prefix_end(key), start_revision=self.next_revision, progress_notify=True
        )
        call = member.watch.Watch(metadata=METADATA)
        read: asyncio.Future[Any] | None = None
        try:
            async with asyncio.timeout(SILENT_S):
                await call.write(rpc.WatchRequest(create_request=create))
            heard_at = time.monotonic()
            while True:
                read = read or asyncio.ensure_future(call.read())
                done, _ = await asyncio.wait({read}, timeout=PING_S)
                if not done:
                    if time.monotonic() - heard_at > SILENT_S:
                        raise _Broken("silent")
                    async with asyncio.timeout(SILENT_S):
                        await call.write(_PROGRESS)
                    continue
                answer, read = _result(read), None
                self.heard_at = heard_at = time.monotonic()
                for event in self._events(answer):
                    yield event
        except (TimeoutError, asyncio.InvalidStateError) as error:
            raise _Broken(_reason(error)) from error
        finally:
            call.cancel()
            if read is not None:
                await asyncio.wait({read})
                if not read.cancelled():
                    read.exception()

    def _events(self, answer: Any) -> list[Event]:
        """What an answer tells beyond the position, which moves past it."""
        if answer.canceled:
            if answer.compact_revision:
                raise _Compacted
            raise _Broken(answer.cancel_reason or "canceled")
        events = []
        for event in answer.events:
            if event.kv.mod_revision < self.next_revision:
                continue
            kind = event.EventType.Name(event.type)
            events.append(Event("delete" if kind == "DELETE" else "put", self._etcd.key_value(event.kv)))
        if events:
            self.next_revision = events[-1].kv.mod_revision + 1
        return events


_PROGRESS = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())


def _result(read: asyncio.Future[Any]) -> Any:
    if read.cancelled():
        raise _Broken("cancelled")
    answer = read.result()
    if not hasattr(answer, "events"):
        raise _Broken("end of stream")
    return answer


def _reason(error: BaseException) -> str:
    return str(error.details()) if isinstance(error, rpc.AioRpcError) else str(error) or type(error).__name__


def _prefix_end(key: bytes) -> bytes:
    from oncepay.etcd.client import prefix_end

    return prefix_end(key)
