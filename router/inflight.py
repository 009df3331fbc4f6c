"""The payments that this process is driving, and the callers that wait for one."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from prometheus_client import Gauge

from oncepay.deadlines import Deadlines
from oncepay.driver import Driver
from oncepay.errors import OncepayError, TooBusy
from oncepay.logs import get_logger
from oncepay.payment import Payment
from oncepay.ports import PaymentStore

DRIVES_MAX = 10_000
"""Payments in flight in one process; more are refused with TooBusy before anything is written."""
RUNNERS_MAX = 512
"""Payments that are driven at the same time; the others wait for their turn, as no more than a row in a queue."""
LOOK_AGAIN_S = 1.0
"""How often a waiting caller's payment is read again, in case another process moved it."""
FIRST_LOOKS_S = (0.25, 0.5)
"""The first waits of such a caller: a payment that another router drives is mostly settled by then."""
DRIVEN_LOOK_AGAIN_S = 4.0
"""The same of a payment that this process drives: it mostly tells of the end itself, and a busy shard is spared the reads."""

_log = get_logger("inflight")

IN_FLIGHT = Gauge("oncepay_router_in_flight", "Payments that this process is driving.")


class InFlight:
    """Drives in the background; whoever waits hears of each move at once."""

    def __init__(self, store: PaymentStore) -> None:
        self._store = store
        self._deadlines = Deadlines()
        self._driven: set[str] = set()
        self._queue: deque[tuple[Driver, Payment]] = deque()
        self._runners: set[asyncio.Task[None]] = set()
        self._next: dict[str, tuple[Driver, Payment]] = {}
        self._stopping = False
        self._waiting: dict[str, set[asyncio.Future[Payment]]] = {}
        IN_FLIGHT.set_function(lambda: len(self._driven))

    def check_room(self) -> None:
        """Raises TooBusy when as many payments are in flight as may be."""
        if len(self._driven) >= DRIVES_MAX:
            raise TooBusy(f"{DRIVES_MAX} payments are in flight")

    def moved(self, payment: Payment) -> None:
        """Tell those who wait for this payment, when it is what they wait for: a move on the way would wake them in vain."""
        if payment.key in self._waiting and payment.settled:
            self._wake(payment)

    def _wake(self, payment: Payment) -> None:
        for future in self._waiting.get(payment.key, ()):
            if not future.done():
                future.set_result(payment)

    def drive(self, driver: Driver, payment: Payment) -> None:
        """Drive the payment in the background; when this process does so already, once more after that."""
        if payment.key in self._driven:
            self._next[payment.key] = (driver, payment)
            return
        self._driven.add(payment.key)
        self._queue.append((driver, payment))
        if len(self._runners) < RUNNERS_MAX:
            runner = asyncio.create_task(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    async def _run(self) -> None:
        """Drive what is queued, one after the other, until nothing is."""
        while self._queue:
            await self._drive(*self._queue.popleft())

    async def _drive(self, driver: Driver, payment: Payment) -> None:
        key = payment.key
        try:
            payment = await driver.drive(payment)
        except OncepayError as error:  # the row says where the worker goes on
            _log.warning("left to the worker", key=key, problem=error.slug, error=str(error))
        except Exception:
            _log.exception("drive failed", key=key)
        finally:
            self._driven.remove(key)
            if (again := self._next.pop(key, None)) is not None and not self._stopping:
                self.drive(*again)
            self._wake(payment)  # from now on its callers have to look for themselves

    async def wait(self, payment: Payment, timeout_s: float, *, refunds: bool = False) -> Payment:
        """The payment once it is settled or waits for the buyer or the merchant, else as it is after `timeout_s`. `refunds`: its
        refunds are waited for, too."""
        deadline_s, first_looks_s = time.monotonic() + timeout_s, iter(FIRST_LOOKS_S)
        while is_awaited(payment, refunds=refunds) and (left_s := deadline_s - time.monotonic()) > 0:
            future: asyncio.Future[Payment] = asyncio.get_running_loop().create_future()
            waiting = self._waiting.setdefault(payment.key, set())
            waiting.add(future)
            look_s = DRIVEN_LOOK_AGAIN_S if payment.key in self._driven else next(first_looks_s, LOOK_AGAIN_S)
            try:
                moved = await self._deadlines.within(min(left_s, look_s), future)
                if moved.version > payment.version:  # else a move that was committed before what is waited for, told late
                    payment = moved
            except TimeoutError:
                payment = await self._read(payment)
            finally:
                waiting.discard(future)
                if not waiting:
                    self._waiting.pop(payment.key, None)
        return payment

    async def _read(self, payment: Payment) -> Payment:
        """The row as it is now; a shard that is away for a moment only means a later look."""
        try:
            return await self._store.get(payment.key) or payment
        except OncepayError:
            return payment

    async def stop(self, timeout_s: float) -> None:
        """Let the drives in flight end, at most `timeout_s`; what is left the worker drives on."""
        self._stopping = True
        if self._runners:
            await asyncio.wait(list(self._runners), timeout=timeout_s)
        for runner in list(self._runners):
            runner.cancel()


def is_awaited(payment: Payment, *, refunds: bool) -> bool:
    """Whether who waits for the payment's outcome, or also for its refunds', still waits."""
    return not payment.settled or (refunds and payment.refunds_asked)
