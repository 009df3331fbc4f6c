"""A copy of a prefix in memory that keeps itself current."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

from oncepay.errors import EtcdUnavailable, OncepayError
from oncepay.etcd.types import Event, KeyValue, Resync
from oncepay.logs import get_logger

if TYPE_CHECKING:
    from oncepay.etcd.client import Etcd
    from oncepay.etcd.watch import Watch

RESYNC_S = 30.0
RETRY_PAUSE_S = 0.2

_log = get_logger("etcd")

OnChange = Callable[[str, KeyValue | None], None]
"""Called with the key (without the mirror's prefix) and what it holds now, None when it was deleted."""


class Mirror:
    """The keys under `prefix`, by what follows it, kept current by a range read, a watch and a range read every
    `resync_s` (watches have dropped events). While etcd is away it keeps its last content.

        mirror = Mirror(etcd, "apikeys/")
        mirror.start()
        await mirror.wait_synced(5)
        mirror.get("abc")

    Changes reach `on_change` in the order of their revisions; those between two range reads may be folded into one.
    """

    def __init__(self, etcd: Etcd, prefix: str, *, on_change: OnChange | None = None, resync_s: float = RESYNC_S) -> None:
        self.prefix = prefix
        self.kvs: dict[str, KeyValue] = {}
        self.revision = 0
        """Everything up to this revision is in `kvs`."""
        self._etcd = etcd
        self._resync_s = resync_s
        self._synced = asyncio.Event()
        self._changed = asyncio.Event()
        self._callbacks: list[OnChange] = [on_change] if on_change else []
        self._watch: Watch | None = None
        self._read_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"mirror-{self.prefix}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    @property
    def synced(self) -> bool:
        """Whether the content was read at least once."""
        return self._synced.is_set()

    @property
    def stale_s(self) -> float:
        """Seconds since etcd last said something; while it is below some 4 s the content is current."""
        if not self.synced:
            return float("inf")
        heard_at = max(self._read_at, self._watch.heard_at if self._watch else 0.0)
        return time.monotonic() - heard_at

    def get(self, key: str) -> KeyValue | None:
        return self.kvs.get(key)

    def on_change(self, callback: OnChange) -> None:
        """Call `callback` for each change from now on. It must not block; what it raises is logged."""
        self._callbacks.append(callback)

    async def wait_synced(self, timeout_s: float) -> None:
        """EtcdUnavailable when the content couldn't be read within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._synced.wait()
        except TimeoutError:
            raise EtcdUnavailable(f"{self.prefix} could not be read from etcd in {timeout_s} s") from None

    async def wait_revision(self, revision: int, timeout_s: float) -> None:
        """Return when `revision` of a key in this prefix is in the content; EtcdUnavailable after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.revision < revision:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise EtcdUnavailable(f"{self.prefix} has not reached revision {revision} in {timeout_s} s") from None

    async def _run(self) -> None:
        while True:
            try:
                kvs, revision = await self._etcd.get_prefix(self.prefix)
            except OncepayError as error:  # also what etcd refuses, as a proxy or a full member does for a moment
                if not isinstance(error, EtcdUnavailable):
                    _log.warning("prefix not read", prefix=self.prefix, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            self._replace(kvs, revision)
            watch = self._watch = self._etcd.watch_prefix(self.prefix, revision + 1)
            try:
                async with asyncio.timeout(self._resync_s), aclosing(aiter(watch)) as events:  # type: ignore[type-var]
                    async for event in events:
                        self._apply(event)
            except TimeoutError:
                pass
            except OncepayError as error:
                _log.warning("watch ended", prefix=self.prefix, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)

    def _apply(self, event: Event | Resync) -> None:
        if isinstance(event, Resync):
            self._replace(event.kvs, event.revision)
            return
        key = event.kv.key[len(self.prefix) :]
        if event.kind == "put":
            self.kvs[key] = event.kv
            self._tell(key, event.kv)
        elif self.kvs.pop(key, None) is not None:
            self._tell(key, None)
        self.revision = event.kv.mod_revision
        self._changed.set()

    def _replace(self, kvs: Iterable[KeyValue], revision: int) -> None:
        if revision < self.revision:
            _log.warning("etcd went back", prefix=self.prefix, revision=revision, known_revision=self.revision)
        before, cut = self.kvs, len(self.prefix)
        self.kvs = {kv.key[cut:]: kv for kv in kvs}
        self.revision = revision
        self._read_at = time.monotonic()
        self._synced.set()
        self._changed.set()
        for key in before.keys() - self.kvs.keys():
            self._tell(key, None)
        for key, kv in self.kvs.items():
            old = before.get(key)
            if old is None or old.mod_revision != kv.mod_revision:
                self._tell(key, kv)

    def _tell(self, key: str, kv: KeyValue | None) -> None:
        for callback in self._callbacks:
            try:
                callback(key, kv)
            except Exception:  # a record that can't be read must not keep the others from being followed
                _log.exception("change not taken", prefix=self.prefix, key=key)
