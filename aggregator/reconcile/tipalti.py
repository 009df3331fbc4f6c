"""Tipalti's half of a reconciliation: its payments against the payouts, its fundings against their entries, both ways.

Tipalti's lists are read on from where the last run ended, into the copy that the aggregator keeps; what may still change is
looked up again by its reference code. A payout that differs is looked up once more before it is named: it may have changed since.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import asyncpg

from aggregator import queries
from aggregator.reconcile.ledger import Connect, spans
from oncepay.errors import OncepayError
from oncepay.logs import get_logger
from oncepay.payout import PaymentView
from oncepay.tipalti_client import LOOK_MAX, TipaltiClient, TipaltiRefused
from oncepay.tipalti_objects import FundingView

SQL = queries.load("reconcile_tipalti.sql")
KEYS_MAX = 20_000
"""Payouts of a time that are compared in one go."""
BOOKED_MAX = 200
"""Fundings that are booked in one go, BOOKING_AT_ONCE at a time."""
BOOKING_AT_ONCE = 8
FEED_WAIT_S = 30.0
"""How long a run waits for the feed to bring what it has booked."""
FEED_PAUSE_S = 0.1
ASKED_MAX = 2_000
"""Payments without a payout that the shards are asked for in one run: the feed may be behind."""
SPAN = dt.timedelta(days=1)
TELLING = dt.timedelta(hours=1)
"""Tipalti is told of a payout again and again, with gaps that grow to `payouts.poll_max_s`."""

_log = get_logger("reconcile")


class TipaltiBooks(Protocol):
    """The shards, as far as Tipalti's half needs them."""

    async def book_funding(self, funding: str, currency: str, amount: int) -> str:
        """Commit a funding's entry, once: `booked`, `same` or `differs`. Raises OncepayError."""
        ...

    async def has_payout(self, ref_code: str) -> bool:
        """Whether any shard has a payout with this reference code. Raises OncepayError."""
        ...


class TipaltiRun:
    """Tipalti's half of the run `name` over [first, last). What changed at or after `settled` may still be on its way."""

    def __init__(
        self, name: str, first: dt.datetime, last: dt.datetime, *, tipalti: TipaltiClient, books: TipaltiBooks, connect: Connect,
        settled: dt.datetime, checked: Counter[str], note: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.name = name
        self.first = first
        self.last = last
        self.checked = checked
        self._tipalti = tipalti
        self._books = books
        self._connect = connect
        self._settled = settled.replace(microsecond=0)  # Tipalti's times are of whole seconds
        self._told = min(settled, dt.datetime.now(dt.UTC) - TELLING)
        self._note = note

    async def whole(self) -> None:
        """All of it, in order. Raises TipaltiUnavailable, TipaltiRefused, what the shards raise, or the database."""
        await self._from_its_cursor("payments", self._read_payments)
        await self._from_its_cursor("fundings", self._read_fundings)
        await self._book_fundings()
        await self._look_again()
        await self._compare_payouts()
        await self._without_payout()
        for span in spans(self.first, self.last, SPAN):
            async with self._connect() as connection:
                for name in ("fundings_that_differ", "of_nothing_at_tipalti"):
                    await connection.execute(SQL[name], self.name, *span, self._settled)
            await self._note()
        async with self._connect() as connection:
            for counted, name in (("tipalti_payments", "count_payments"), ("tipalti_fundings", "count_fundings")):
                self.checked[counted] = await connection.fetchval(SQL[name], self.first, self.last)
            self.checked["payouts_awaiting_approval"] = await connection.fetchval(SQL["count_waiting"])

    # Tipalti's lists

    async def _from_its_cursor(self, listed: str, read: Callable[[str], Awaitable[None]]) -> None:
        async with self._connect() as connection:
            cursor = await connection.fetchval(SQL["cursor"], listed) or ""
        try:
            await read(cursor)
        except TipaltiRefused:
            if not cursor:
                raise
            await read("")  # it doesn't know the cursor any more: from the beginning

    async def _read_payments(self, cursor: str) -> None:
        while True:
            page = await self._tipalti.payments_after(cursor)
            await self._keep(page.items)
            await self._took(len(page.items), "payment", page.unreadable)
            if page.cursor is None:
                return
            cursor = page.cursor
            await self._keep_cursor("payments", cursor)

    async def _read_fundings(self, cursor: str) -> None:
        while True:
            page = await self._tipalti.fundings_after(cursor)
            await self._keep_fundings(page.items)
            await self._took(len(page.items), "funding", page.unreadable)
            if page.cursor is None:
                return
            cursor = page.cursor
            await self._keep_cursor("fundings", cursor)

    async def _took(self, read: int, what: str, unreadable: Sequence[tuple[str, str]]) -> None:
        self.checked["read"] += read
        for name, why in unreadable:
            await self._differ("unreadable", transaction=name, category=what, detail=why)
        await self._note()

    async def _keep_cursor(self, listed: str, cursor: str) -> None:
        async with self._connect() as connection:
            await connection.execute(SQL["keep_cursor"], listed, cursor)

    async def _keep(self, payments: Sequence[PaymentView]) -> None:
        rows = [
            (p.payment, p.ref_code, p.status, p.currency, p.amount, p.fee, p.fee_currency or p.currency, p.reason,
             _time(p.submitted_s), _time(p.changed_s))
            for p in payments
        ]  # fmt: skip
        if rows:
            async with self._connect() as connection:
                await connection.execute(SQL["keep_payments"], *map(list, zip(*rows, strict=True)))

    async def _keep_fundings(self, fundings: Sequence[FundingView]) -> None:
        rows = [(f.funding, f.currency, f.amount, _time(f.created_s)) for f in fundings]
        if rows:
            async with self._connect() as connection:
                await connection.execute(SQL["keep_fundings"], *map(list, zip(*rows, strict=True)))

    async def _book_fundings(self) -> None:
        """Book what the aggregator's own look at the list hasn't, and wait until the feed has brought it."""
        after, gate = "", asyncio.Semaphore(BOOKING_AT_ONCE)

        async def book(funding: str, currency: str, amount: int) -> bool:
            async with gate:
                try:
                    self.checked[await self._books.book_funding(funding, currency, amount)] += 1
                except OncepayError as error:
                    _log.error("a funding is not booked", funding=funding, error=str(error))
                    return False
            return True

        while True:
            async with self._connect() as connection:
                rows = await connection.fetch(SQL["fundings_to_book"], self.first, self.last, after, BOOKED_MAX)
            if not rows:
                return
            after = rows[-1]["id"]
            done = await asyncio.gather(*(book(*row) for row in rows))
            await self._until_fed([row["id"] for row, booked in zip(rows, done, strict=True) if booked])
            await self._note()

    async def _until_fed(self, fundings: list[str]) -> None:
        deadline_s = time.monotonic() + FEED_WAIT_S
        while True:
            async with self._connect() as connection:
                if await connection.fetchval(SQL["count_booked"], fundings) == len(fundings):
                    return
            if time.monotonic() > deadline_s:
                _log.warning("the feed hasn't brought what was booked", fundings=len(fundings))
                return
            await asyncio.sleep(FEED_PAUSE_S)

    async def _look_again(self) -> None:
        """Payments that were open when they were last seen."""
        after = ""
        while True:
            async with self._connect() as connection:
                codes = [row["ref_code"] for row in await connection.fetch(SQL["open"], after, LOOK_MAX)]
            if not codes:
                return
            await self._look_up(codes)
            after = codes[-1]

    async def _look_up(self, ref_codes: Sequence[str]) -> None:
        for start in range(0, len(ref_codes), LOOK_MAX):
            found = await self._tipalti.payments_of(ref_codes[start : start + LOOK_MAX])
            await self._keep(found)
            self.checked["looked_up"] += len(found)
            await self._note()

    # Comparing

    async def _compare_payouts(self) -> None:
        """Those of each span of the time, and those that aren't over, however old."""
        for span in spans(self.first, self.last, SPAN):
            await self._compare("payouts_of_a_time", *span)
        await self._compare("payouts_under_way")

    async def _compare(self, named: str, *span: dt.datetime) -> None:
        after = ""
        while True:
            async with self._connect() as connection:
                keys = [row["key"] for row in await connection.fetch(SQL[named], *span, after, KEYS_MAX)]
            if not keys:
                return
            after = keys[-1]
            if differing := {row["key"]: row["ref_code"] for row in await self._that_differ(keys)}:
                await self._look_up(sorted(differing.values()))
                for row in await self._that_differ(list(differing)):
                    at_tipalti = f"{row['statuses']} at Tipalti" if row["statuses"] else "not at Tipalti"
                    await self._differ(
                        row["kind"], transaction=row["payment"], key=row["key"], source=row["ref_code"], category="payout",
                        currency=row["currency"] or row["of_currency"], expected=row["expected"], actual=row["actual"],
                        detail=f"it is {row['status']} here, and {at_tipalti}",
                    )  # fmt: skip
            await self._note()

    async def _that_differ(self, keys: list[str]) -> list[asyncpg.Record]:
        async with self._connect() as connection:
            found: list[asyncpg.Record] = await connection.fetch(SQL["payouts_that_differ"], keys, self._settled, self._told)
        return found

    async def _without_payout(self) -> None:
        """Payments that nobody here has ordered. The shards are asked: the feed of one may be far behind."""
        after, asked = "", 0
        while True:
            async with self._connect() as connection:
                rows = await connection.fetch(SQL["without_payout"], self.first, min(self.last, self._settled), after, LOOK_MAX)
            if not rows:
                return
            after = rows[-1]["id"]
            for row in rows:
                asked += 1
                if asked <= ASKED_MAX and row["ref_code"] and await self._books.has_payout(row["ref_code"]):
                    self.checked["payouts_not_fed_yet"] += 1
                    continue
                await self._differ(
                    "payment_without_payout", transaction=row["id"], source=row["ref_code"], category="payment",
                    currency=row["currency"], expected=0 if row["given_back"] else -row["amount"], actual=0,
                    detail=f"it is {row['status']} at Tipalti",
                )  # fmt: skip
            await self._note()

    async def _differ(
        self, kind: str, *, transaction: str | None = None, key: str | None = None, source: str | None = None, category: str,
        currency: str | None = None, expected: int | None = None, actual: int | None = None, detail: str = "",
    ) -> None:  # fmt: skip
        async with self._connect() as connection:
            await connection.execute(
                SQL["differ"], self.name, kind, transaction, key, source, category, currency, expected, actual, detail
            )


def _time(seconds: int) -> dt.datetime | None:
    return dt.datetime.fromtimestamp(seconds, dt.UTC) if seconds else None
