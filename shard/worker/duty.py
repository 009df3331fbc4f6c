"""A worker process's duty: it stands by for the shard's seat, and while it has it, it is the shard's active worker.

What only the active one needs is imported and opened then: a standby costs little memory, connects to no database, and takes
no share of Stripe's rate budget.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from oncepay.budget import give_back
from oncepay.errors import OncepayError, Unavailable
from oncepay.etcd import Etcd
from oncepay.logs import get_logger
from oncepay.settings import Settings
from shard.worker import metrics
from shard.worker.errors import StandDown
from shard.worker.lease import Seat

if TYPE_CHECKING:
    from shard.worker.worker import Worker

RETRY_S = 0.5

_log = get_logger("worker")


class Duty:
    """The duty of the process `name` in `shard`."""

    def __init__(self, shard: str, name: str, settings: Settings, etcd: Etcd, url: str) -> None:
        self.worker: Worker | None = None
        """The active worker, while this process is it."""
        self._shard = shard
        self._name = name
        self._settings = settings
        self._etcd = etcd
        self._seat = Seat(etcd, f"workers/{shard}", name, url=url)
        metrics.ACTIVE.labels(shard).set(0)

    async def run(self) -> None:
        """Stand by, be active, stand by again, until canceled."""
        await give_back(self._etcd, self._name)  # what the process before under this name had, if it was killed
        while True:
            await self._seat.take()
            try:
                await self._lead()
            except* StandDown as group:
                for error in _flat(group):
                    _log.warning("standing down", reason=str(error))
            finally:
                self.worker = None
                metrics.ACTIVE.labels(self._shard).set(0)
                await self._seat.leave()
            await asyncio.sleep(RETRY_S)

    async def leave(self) -> None:
        """Give the seat up at once."""
        await self._seat.leave()

    async def _lead(self) -> None:
        from shard.worker.engine import engine

        async with engine(self._shard, self._name, self._settings, self._etcd, self._seat) as worker:
            self.worker = worker
            await worker.run()

    def active(self) -> Worker:
        """The active worker. Raises Unavailable on a standby."""
        if self.worker is None or not self.worker.active:
            raise Unavailable("this worker stands by")
        return self.worker

    # Health: standing by is being ready

    async def check_feed(self) -> None:
        """Raises what an operator has to know: the feed is halted, or can't read the shard."""
        if self.worker is not None:
            await self.worker.check_feed()

    async def check_cache(self) -> None:
        """Raises Unavailable while the active worker has not filled its cache."""
        if self.worker is not None:
            await self.worker.check_cache()


def _flat(group: BaseExceptionGroup[OncepayError]) -> list[OncepayError]:
    found: list[OncepayError] = []
    for error in group.exceptions:
        found += _flat(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
