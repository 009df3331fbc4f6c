"""Books what came to the platform's balance at Tipalti from its bank: each funding once, by its id, however often it is read."""

from __future__ import annotations

import asyncio

from prometheus_client import Counter

from oncepay.errors import OncepayError
from oncepay.etcd import Etcd
from oncepay.logs import get_logger
from oncepay.tipalti_client import TipaltiClient
from shard.store.payouts import PayoutStore

CURSOR_KEY = "payouts/fundings"
"""Where reading goes on: the end of the last full page that was booked. If it is lost, all are read again, and booked once."""
LOOK_S = 15.0
RETRY_S = 60.0

BOOKED = Counter("oncepay_fundings_total", "Fundings of the balance at Tipalti, by what became of them.", ["outcome"])
_log = get_logger("payouts")


class Fundings:
    """Reads Tipalti's list of fundings and commits their entries."""

    def __init__(self, etcd: Etcd, store: PayoutStore, tipalti: TipaltiClient) -> None:
        self._etcd = etcd
        self._store = store
        self._tipalti = tipalti
        self._seen: set[str] = set()
        """Those of the page that isn't full yet, which is read again and again."""

    async def work(self) -> None:
        """Run until canceled."""
        while True:
            pause_s = LOOK_S
            try:
                await self._read()
            except OncepayError as error:
                pause_s = RETRY_S
                _log.warning("fundings not read", error=repr(error))
            await asyncio.sleep(pause_s)

    async def _read(self) -> None:
        """What is new, page by page."""
        found = await self._etcd.get(CURSOR_KEY)
        cursor = found.value.decode() if found is not None else ""
        while True:
            page = await self._tipalti.fundings_after(cursor)
            for funding, why in page.unreadable:  # the others don't wait for it; the reconciliation names it
                if funding not in self._seen:
                    _log.error("a funding can't be read", funding=funding, problem=why)
            new = [item for item in page.items if item.funding not in self._seen]
            await asyncio.gather(*(self._book(item.funding, item.currency, item.amount) for item in new))
            self._seen.update(item.funding for item in new)
            self._seen.update(funding for funding, _ in page.unreadable)
            if page.cursor is None:
                return
            cursor = page.cursor
            await self._etcd.put(CURSOR_KEY, cursor.encode())
            self._seen.clear()

    async def _book(self, funding: str, currency: str, amount_minor: int) -> None:
        outcome = await self._store.book_funding(funding, currency, amount_minor)
        BOOKED.labels(outcome).inc()
        if outcome == "differs":
            _log.error("a funding was booked with another amount", funding=funding, amount_minor=amount_minor, currency=currency)
