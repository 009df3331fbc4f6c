"""A payout run: from balances to committed rows. It tells Tipalti nothing; each shard's worker does, once the rows are there.

What keeps a seller from being paid twice or too much, whoever runs, dies or is late:
- every shard's position is taken first, also of one that owns nothing any more, and the balances are read when the aggregator
  has applied all up to there;
- a payout's sequence follows the last one whose entry those very balances hold, and a sequence is made once, by its key;
- no run is made while a restored shard holds them (`oncepay.payout_hold`), asked at the beginning and before rows are made;
- rows are taken only for FRESH_S by the clock of the shard that holds them, so a run that was frozen makes nothing late.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

import asyncpg
from prometheus_client import Counter as Metric

from aggregator import queries
from aggregator.payout_views import HeldView, RunTotal, RunView, payout_view
from aggregator.positions import Reader
from aggregator.propose import Held, Owed, payable, proposed
from oncepay.errors import TooBusy
from oncepay.logs import get_logger
from oncepay.payment import Payment
from oncepay.payout import Payout, PayoutStatus
from oncepay.refunds import held_by_inquiries
from oncepay.settings import PayoutSettings
from oncepay.tipalti_client import TipaltiClient
from shard.store.payouts import Moment, PayoutStore
from shard.store.sellers import Seller, by_shard, read_sellers
from shard.store.store import Shards

FRESH_S = 900
"""How old, by a shard's own clock, what a payout was computed from may be when its row is committed."""
SELLERS_A_READ = 1_000
LISTED_MAX = 10_000
"""Payouts, and held balances, that an answer lists; the sums count all."""

SQL = queries.load("payouts.sql")
MADE = Metric("oncepay_payouts_made_total", "Payouts that runs have made.", ["currency"])
HELD = Metric("oncepay_payouts_held_total", "Balances that runs have held, by reason.", ["reason"])
_log = get_logger("payouts")


class RunUnderWay(TooBusy):
    """This process is making a run already."""

    slug = "payout-run-under-way"


class Rows(Protocol):
    """What a run needs of `PayoutStore`."""

    async def moments(self) -> dict[str, Moment]: ...

    async def disputed(self) -> list[Payment]: ...

    async def make(self, payouts: Sequence[Payout], not_after: Mapping[str, dt.datetime]) -> Mapping[str, str]: ...


async def _nothing_holds() -> None:
    pass


class Runs:
    """Makes payout runs. `check_not_held` raises when none may be made now."""

    def __init__(
        self,
        reader: Reader,
        shards: Shards,
        store: PayoutStore,
        tipalti: TipaltiClient,
        settings: PayoutSettings,
        check_not_held: Callable[[], Awaitable[None]] = _nothing_holds,
    ) -> None:
        self._reader = reader
        self._shards = shards
        self._store: Rows = store
        self._tipalti = tipalti
        self._settings = settings
        self._check_not_held = check_not_held
        self._busy = False

    async def run(
        self, created_by: str, *, dry_run: bool = False, currency: str | None = None, sellers: Sequence[str] | None = None
    ) -> RunView:
        """Make a run; what it made and what it held.

        Raises PositionNotReached when a feed is behind, PayoutsHeld when runs are held: nothing was made.
        """
        if self._busy:
            raise RunUnderWay
        self._busy = True
        try:
            return await self._run(created_by, dry_run=dry_run, currency=currency, sellers=sellers)
        finally:
            self._busy = False

    async def _run(self, created_by: str, *, dry_run: bool, currency: str | None, sellers: Sequence[str] | None) -> RunView:
        name = f"run-{uuid.uuid4().hex[:16]}"
        if not dry_run:
            await self._check_not_held()
        # In this order: an inquiry that takes the money meanwhile is held and deducted, and never neither.
        inquiries = sums_of_inquiries(await self._store.disputed())
        moments = await self._store.moments()
        hold_s = self._settings.hold_s
        since = min(moment.now for moment in moments.values()) - dt.timedelta(seconds=hold_s) if hold_s else None
        wanted = {shard: moment.lsn for shard, moment in moments.items()}
        async with self._reader.snapshot(wanted, use="work") as (connection, positions):
            owed = await balances(connection, currency, sellers, since)
        made, held = await self._proposals(name, created_by, owed, inquiries, positions)
        if not dry_run and made:
            limits = {shard: moment.now + dt.timedelta(seconds=FRESH_S) for shard, moment in moments.items()}
            await self._check_not_held()
            outcomes = await self._store.make(made, limits)
            held += [Held(p.seller, p.currency, p.amount, outcomes[p.key], p.key) for p in made if outcomes[p.key] != "made"]
            made = [payout for payout in made if outcomes[payout.key] == "made"]
            for payout in made:
                MADE.labels(payout.currency).inc()
        view = _view(name, dry_run, created_by, made, held, positions)
        for reason, count in view.held_by_reason.items():
            HELD.labels(reason).inc(0 if dry_run else count)
        _log.info("payout run", run=name, dry_run=dry_run, by=created_by, made=len(made), held=view.held_by_reason)
        return view

    async def _proposals(
        self,
        name: str,
        created_by: str,
        owed: Sequence[Owed],
        inquiries: Mapping[tuple[str, str], int],
        positions: Mapping[str, str],
    ) -> tuple[list[Payout], list[Held]]:
        held: list[Held] = []
        amounts: list[tuple[Owed, int]] = []
        for item in owed:
            amount = payable(item, inquiries, self._settings)
            if isinstance(amount, Held):
                held.append(amount)
            else:
                amounts.append((item, amount))
        known = await self._sellers({item.seller for item, _ in amounts})
        why_not = await self._why_not(seller.payee for seller in known.values())
        made: list[Payout] = []
        now_ms = time.time_ns() // 1_000_000
        for item, amount in amounts:
            seller = known.get(item.seller)
            reason, detail = ("no_seller", "") if seller is None else why_not.get(seller.payee, ("", ""))
            if reason or seller is None:
                held.append(Held(item.seller, item.currency, item.balance, reason, detail))
            else:
                made.append(
                    proposed(
                        item,
                        amount,
                        seller.payee,
                        self._settings,
                        run=name,
                        created_by=created_by,
                        positions=positions,
                        now_ms=now_ms,
                    )
                )
        return made, held

    async def _sellers(self, names: Iterable[str]) -> dict[str, Seller]:
        """The sellers that were put, of these."""
        found: dict[str, Seller] = {}
        wanted = sorted(names)
        for start in range(0, len(wanted), SELLERS_A_READ):
            some = wanted[start : start + SELLERS_A_READ]

            async def attempt(some: Sequence[str] = some) -> dict[str, Seller]:
                read: dict[str, Seller] = {}
                for shard, of_shard in by_shard(self._shards, some).items():
                    rows = await read_sellers(self._shards.batcher(shard), of_shard)
                    read |= {name: seller for name, seller in rows.items() if seller is not None}
                return read

            found |= await self._shards.hold(attempt)
        return found

    async def _why_not(self, payees: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Why payees can't be paid, for those that can't; nobody is asked where there is no Tipalti."""
        wanted = set(payees)
        if not self._tipalti.on or not wanted:
            return {}
        found = await self._tipalti.payees(wanted)
        why: dict[str, tuple[str, str]] = {}
        for name in wanted:
            payee = found.get(name)
            if payee is None:
                why[name] = "unknown_payee", name
            elif payee.held_because:
                why[name] = "unpayable", payee.held_because
        return why


async def balances(
    connection: asyncpg.Connection, currency: str | None, sellers: Sequence[str] | None, since: dt.datetime | None
) -> list[Owed]:
    """What sellers are owed. `since`: money of payments from then on is pending."""
    rows = await connection.fetch(SQL["owed"], currency, list(sellers) if sellers is not None else None, since)
    return [Owed(*row) for row in rows]


def sums_of_inquiries(payments: Iterable[Payment]) -> dict[tuple[str, str], int]:
    """What open inquiries hold, by seller and currency."""
    sums: Counter[tuple[str, str]] = Counter()
    for payment in payments:
        for seller, amount in held_by_inquiries(payment).items():
            sums[seller, payment.currency] += amount
    return dict(sums)


def _view(
    name: str, dry_run: bool, created_by: str, made: Sequence[Payout], held: Sequence[Held], positions: dict[str, str]
) -> RunView:
    totals = []
    for currency in sorted({payout.currency for payout in made}):
        of = [payout for payout in made if payout.currency == currency]
        awaiting = sum(1 for payout in of if payout.status is PayoutStatus.AWAITING_APPROVAL)
        totals.append(RunTotal(currency, len(of), sum(payout.amount for payout in of), awaiting))
    return RunView(
        run=name,
        dry_run=dry_run,
        created_by=created_by,
        totals=totals,
        held_by_reason=dict(Counter(item.reason for item in held)),
        payouts=[payout_view(payout) for payout in made[:LISTED_MAX]],
        held=[HeldView(*item) for item in held[:LISTED_MAX]],
        positions=positions,
    )
