"""One reconciliation: read Stripe's lists, book what no payment caused, compare both ways, and name what differs; then the same
with Tipalti's (`tipalti.py`).

Everything is compared in the database, one span of time after the other, so that memory holds a page of Stripe's list and
a page of results whatever the period.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from collections import Counter
from typing import Protocol

import asyncpg

from aggregator import queries
from aggregator.reconcile.ledger import Connect, bank_payouts, keep, read_transactions, spans
from aggregator.reconcile.tipalti import TipaltiBooks, TipaltiRun
from oncepay.errors import OncepayError, StripeUnavailable
from oncepay.logs import get_logger
from oncepay.stripe_client import StripeGateway, StripeRefused
from oncepay.tipalti_client import TipaltiClient

SQL = queries.load("reconcile.sql")
OF_PAYMENTS = (
    *("charge", "charge_failure", "refund", "refund_failure", "partial_capture_reversal", "dispute", "dispute_reversal"),
)
"""Reporting categories that payments cause: their entries come from the payments themselves."""
OF_BANK = frozenset({"payout", "payout_reversal"})
MARGIN = dt.timedelta(days=1)
"""Stripe is read from so long before the period: entries are booked a little after their transaction."""
BOOKED_MAX = 500
"""Transactions that are booked in one go, BOOKING_AT_ONCE at a time."""
BOOKING_AT_ONCE = 8
LOOKED_UP_MAX = 2_000
"""Transactions of another time that are looked up singly, and differences whose cause is looked up, in one run."""
FEED_WAIT_S = 30.0
"""How long a run waits for the feed to bring what it has booked."""
FEED_PAUSE_S = 0.1
NOTE_S = 1.0
DETAIL_MAX = 500
FAILED = ("failed", "canceled")

_log = get_logger("reconcile")


class Books(TipaltiBooks, Protocol):
    """The shards, as far as a reconciliation needs them."""

    async def book(self, transaction: str, currency: str, amount: int, fee: int, *, bank: bool) -> str:
        """Commit a transaction's entries: `booked`, `same` or `differs`. Raises OncepayError."""
        ...

    async def payment_of(self, intent: str) -> tuple[str, str] | None:
        """The key and the state of the payment whose row names the intent. Raises OncepayError."""
        ...


class Run:
    """One run over [first, last). `grace` is how long Stripe, Tipalti, the workers and the feed may take for what is new.

    Without `tipalti` payouts are compared with nothing: they are booked by hand.
    """

    def __init__(
        self, name: str, first: dt.datetime, last: dt.datetime, *, stripe: StripeGateway, books: Books, connect: Connect,
        grace: dt.timedelta, tipalti: TipaltiClient | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.first = first
        self.last = last
        self.checked: Counter[str] = Counter()
        self._stripe = stripe
        self._tipalti = tipalti
        self._books = books
        self._connect = connect
        self._settled = dt.datetime.now(dt.UTC) - grace
        self._noted_s = 0.0

    async def whole(self) -> None:
        """All of it, in order. Raises StripeUnavailable, or what the database raises. That Tipalti is away is a difference."""
        await self._read()
        await self._book()
        await self._check_bank()
        for span in spans(self.first, self.last, MARGIN):
            await self._compare(*span)
        await self._look_up()
        await self._explain()
        if self._tipalti is not None:
            half = TipaltiRun(
                self.name, self.first, self.last, tipalti=self._tipalti, books=self._books, connect=self._connect,
                settled=self._settled, checked=self.checked, note=self._note,
            )  # fmt: skip
            try:
                await half.whole()
            except OncepayError as error:  # Tipalti is away, or a shard that was asked
                _log.error("not compared with Tipalti", error=str(error))
                await self._differ("tipalti_not_compared", detail=str(error)[:DETAIL_MAX])
        await self._note(now=True)

    async def _read(self) -> None:
        def taken(count: int) -> None:
            self.checked["read"] += count

        reading = asyncio.create_task(
            read_transactions(self._stripe, self._connect, self.first - MARGIN, self.last, taken), name="reconcile-read"
        )
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=NOTE_S)
                await self._note()
            await reading
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            reading.cancel()
        async with self._connect() as connection:
            self.checked["transactions"] = await connection.fetchval(SQL["count_transactions"], self.first, self.last)

    async def _book(self) -> None:
        """Book what no payment caused, and wait until the feed has brought it."""
        tried: set[str] = set()
        while True:
            async with self._connect() as connection:
                rows = await connection.fetch(SQL["to_book"], self.first, self.last, OF_PAYMENTS, BOOKED_MAX + len(tried))
            new = [row for row in rows if row["id"] not in tried]
            if not new:
                return
            gate = asyncio.Semaphore(BOOKING_AT_ONCE)
            booked = await asyncio.gather(*(self._book_one(row, gate) for row in new))
            tried.update(name for name, arrives in booked if not arrives)
            await self._until_fed([name for name, arrives in booked if arrives], tried)
            await self._note()

    async def _book_one(self, row: asyncpg.Record, gate: asyncio.Semaphore) -> tuple[str, bool]:
        """The transaction, and whether the feed will bring it."""
        name, bank = row["id"], row["category"] in OF_BANK
        async with gate:
            try:
                outcome = await self._books.book(name, row["currency"], row["amount"], row["fee"], bank=bank)
            except OncepayError as error:
                _log.error("not booked", transaction=name, error=str(error))
                await self._differ("not_booked", transaction=name, currency=row["currency"], detail=str(error))
                return name, False
        self.checked[outcome] += 1
        if outcome == "differs":
            await self._differ("booked_otherwise", transaction=name, currency=row["currency"], expected=row["amount"])
        return name, True

    async def _until_fed(self, names: list[str], tried: set[str]) -> None:
        deadline_s = time.monotonic() + FEED_WAIT_S
        while True:
            async with self._connect() as connection:
                if await connection.fetchval(SQL["count_linked"], names) == len(names):
                    return
            if time.monotonic() > deadline_s:
                _log.warning("the feed hasn't brought what was booked", transactions=len(names))
                tried.update(names)
                return
            await asyncio.sleep(FEED_PAUSE_S)

    async def _check_bank(self) -> None:
        """Each payout to the bank has its transaction of the same amount; a failed one has the one that brought it back."""
        async for payout in bank_payouts(self._stripe, self.first, self.last):
            self.checked["bank_payouts"] += 1
            sides = [(payout.balance_transaction, -payout.amount)]
            if payout.status in FAILED:
                sides.append((payout.failure_balance_transaction, payout.amount))
            for transaction, amount in sides:
                row = await self._transaction(transaction) if transaction else None
                if row is None or (row["amount"], row["currency"]) != (amount, payout.currency):
                    detail = f"{payout.id} is {payout.status}" + ("" if row else ", and has no transaction for it")
                    await self._differ(
                        "bank_payout", transaction=transaction, source=payout.id, currency=payout.currency, expected=amount,
                        actual=row["amount"] if row else None, detail=detail,
                    )  # fmt: skip

    async def _transaction(self, name: str) -> asyncpg.Record | None:
        """A transaction, also one of another time: a payout may fail after the period."""
        async with self._connect() as connection:
            row = await connection.fetchrow(SQL["transaction"], name)
        if row is None and await self._found(name):
            async with self._connect() as connection:
                row = await connection.fetchrow(SQL["transaction"], name)
        return row

    async def _found(self, name: str) -> bool:
        """Look a transaction up that Stripe's list didn't bring, and keep it; whether it is there."""
        self.checked["looked_up"] += 1
        try:
            found = await self._stripe.balance_transaction(name)
        except StripeRefused:
            return False
        async with self._connect() as connection:
            await keep(connection, [found])
        return True

    async def _compare(self, first: dt.datetime, last: dt.datetime) -> None:
        async with self._connect() as connection, connection.transaction():
            await connection.execute(SQL["join_in_memory"])
            for name in ("unbooked", "unlinked"):
                await connection.execute(SQL[name], self.name, first, last, self._settled)
            for name in ("net_differs", "net_missing", "of_several", "linked_twice"):
                await connection.execute(SQL[name], self.name, first, last)
        await self._note()

    async def _look_up(self) -> None:
        """Linked transactions that Stripe's list didn't bring are of another time, or not Stripe's."""
        async with self._connect() as connection:
            rows = await connection.fetch(SQL["not_in_copy"], self.first, min(self.last, self._settled), LOOKED_UP_MAX + 1)
        for row in rows[:LOOKED_UP_MAX]:
            name = row["balance_transaction"]
            if not await self._found(name):
                await self._differ("not_at_stripe", transaction=name, key=row["key"], entry_id=row["entry_id"])
            await self._note()
        if len(rows) > LOOKED_UP_MAX:
            await self._differ("not_looked_up", detail=f"more than {LOOKED_UP_MAX}")

    async def _explain(self) -> None:
        """Which payment a charge is of that nothing is linked to: money without a row, or a payment with open work."""
        async with self._connect() as connection:
            rows = await connection.fetch(SQL["to_explain"], self.name, LOOKED_UP_MAX)
        for n, source in rows:
            try:
                intent = (await self._stripe.charge(source)).payment_intent or ""
                payment = await self._books.payment_of(intent) if intent else None
            except StripeUnavailable:
                raise
            except OncepayError as error:
                _log.warning("a difference stays unexplained", source=source, error=str(error))
                continue
            if payment is None:
                kind, key, detail = "money_without_row", None, f"{source} is of {intent or 'no PaymentIntent'}; no row names it"
            else:
                kind, (key, status) = "unbooked", payment
                detail = f"{source} is of {intent}; its payment is {status}"
            async with self._connect() as connection:
                await connection.execute(SQL["explain"], self.name, n, kind, key, detail)

    async def _differ(
        self, kind: str, *, transaction: str | None = None, key: str | None = None, entry_id: str | None = None,
        source: str | None = None, currency: str | None = None, expected: int | None = None, actual: int | None = None,
        detail: str = "",
    ) -> None:  # fmt: skip
        async with self._connect() as connection:
            await connection.execute(
                SQL["differ"], self.name, kind, transaction, key, entry_id, source, None, currency, expected, actual, detail
            )

    async def _note(self, *, now: bool = False) -> None:
        """Show how far it is, once in a while."""
        if now or time.monotonic() - self._noted_s > NOTE_S:
            self._noted_s = time.monotonic()
            async with self._connect() as connection:
                await connection.execute(SQL["note_progress"], self.name, json.dumps(self.checked))
