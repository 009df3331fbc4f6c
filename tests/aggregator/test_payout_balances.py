"""What runs compute payouts from, against a real Postgres: balances, what is pending, the last sequence; payouts by the feed."""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator import apply, database, runs
from aggregator.database import Database
from aggregator.positions import Reader
from aggregator.propose import Owed
from aggregator.runs import Runs, balances
from oncepay.feed import EntryRow, FeedBatch, PayoutRow
from oncepay.keys import payout_key
from oncepay.ledger import payout_entry, payout_returned_entry
from oncepay.payment import Payment
from oncepay.payout import GIVEN_BACK, Payout, PayoutStatus, ref_code
from oncepay.settings import PayoutSettings, TipaltiSettings
from oncepay.tipalti_client import TipaltiClient
from shard.store.payouts import Moment, PayoutStore
from shard.store.store import Shards
from tests.aggregator.database import EPOCH, empty
from tests.aggregator.strategies import DAY_US, FIRST_US, History, entry_row, histories, slot_of
from tests.aggregator.test_apply import REAL

pytestmark = pytest.mark.cluster


def payout_row(lsn: int, seller: str, sequence: int, *, status: str = "created", version: int = 1, amount: int = 1) -> PayoutRow:
    key = payout_key(seller, "usd", sequence)
    over = PayoutStatus(status) in GIVEN_BACK or status == "cleared"
    return PayoutRow(
        *(lsn, 0, slot_of(key), key, seller, "usd", sequence, status, version, amount, "payee", ref_code(key), "run-1", "ann"),
        *('{"s0": "0/1"}', '{"payment": "pay_1"}', not over, FIRST_US, FIRST_US + version),
    )


def naive(entries: list[EntryRow], since_us: int | None, last: dict[str, int]) -> list[Owed]:
    """The same by hand: sums by account, and by payment since a moment."""
    owed: Counter[tuple[str, str]] = Counter()
    fresh: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    payments = {
        entry.key for entry in entries if entry.kind == "payment" and since_us is not None and entry.created_at_us >= since_us
    }
    for entry in entries:
        for account, amount in zip(entry.accounts, entry.amounts, strict=True):
            if account.startswith("seller:") and account.endswith(":payable"):
                seller = account[7:-8]
                owed[seller, entry.currency] -= amount
                if since_us is not None and entry.created_at_us >= since_us and entry.key in payments:
                    fresh[seller, entry.currency, entry.key] -= amount
    pending: Counter[tuple[str, str]] = Counter()
    for (seller, currency, _), amount in fresh.items():
        pending[seller, currency] += max(amount, 0)
    return sorted(
        Owed(seller, currency, balance, pending[seller, currency], last.get(seller, 0) if currency == "usd" else 0, True)
        for (seller, currency), balance in owed.items()
        if balance > 0
    )


@REAL
@given(
    history=histories(),
    paid=st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.integers(1, 5_000), st.booleans())),
    day=st.integers(0, 5),
)
async def test_balances_are_the_fold_of_the_entries(
    aggregator_dsn: str,
    connection: asyncpg.Connection,
    history: History,
    paid: list[tuple[str, int, bool]],
    day: int,
) -> None:
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    last: dict[str, int] = {}
    payouts: list[PayoutRow] = []
    for seller, amount, back in paid:
        last[seller] = last.get(seller, 0) + 1
        key = payout_key(seller, "usd", last[seller])
        lsn = history.commit()
        payouts.append(payout_row(lsn, seller, last[seller], amount=amount))
        history.entries.append(entry_row(lsn, key, payout_entry(seller, "usd", amount, ref_code(key))))
        if back:
            lsn = history.commit()
            payouts.append(payout_row(lsn, seller, last[seller], status="rejected", version=2, amount=amount))
            history.entries.append(entry_row(lsn, key, payout_returned_entry(seller, "usd", amount, ref_code(key))))
    await apply.apply(connection, replace(history.whole(), payouts=tuple(payouts)))
    assert sorted(await balances(connection, None, None, None)) == naive(history.booked, None, last)
    since_us = FIRST_US + day * DAY_US
    since = EPOCH + dt.timedelta(microseconds=since_us)
    assert sorted(await balances(connection, None, None, since)) == naive(history.booked, since_us, last)
    some = ["ann", "é{}, "]
    expected = [item for item in naive(history.booked, since_us, last) if item.seller in some and item.currency == "usd"]
    assert sorted(await balances(connection, "usd", some, since)) == expected


@REAL
@given(order=st.permutations([1, 2, 3, 4]), cuts=st.sets(st.integers(1, 3)), quiet=st.sets(st.integers(2, 4)))
async def test_a_payouts_highest_version_stays(
    aggregator_dsn: str, connection: asyncpg.Connection, order: list[int], cuts: set[int], quiet: set[int]
) -> None:
    """In whatever order and batches they come, also when a log doesn't repeat what didn't change."""
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    statuses = {1: "created", 2: "submitting", 3: "paid", 4: "returned"}
    rows = []
    for n, version in enumerate(order):
        row = payout_row(1_100 + 100 * n, "ann", 1, status=statuses[version], version=version)
        rows.append(replace(row, progress=None, positions=None) if version in quiet and order[0] == 1 else row)
    bounds = [0, *sorted(cuts), 4]
    for start, end in itertools.pairwise(bounds):
        batch = FeedBatch("s0", "i1", 1, 1_000 + 100 * start, 1_000 + 100 * end, payouts=tuple(rows[start:end]))
        assert (await apply.apply(connection, batch)).applied
    found = await connection.fetchrow("select status, version, positions, progress from oncepay.payouts")
    assert tuple(found) == ("returned", 4, '{"s0": "0/1"}', '{"payment": "pay_1"}')


async def test_a_payout_whose_entry_is_missing_holds_the_next_one_back(connection: asyncpg.Connection) -> None:
    """It can't come without its entry; if it did, its amount would still be in the balance."""
    history = History("s0")
    history.entries.append(entry_row(history.commit(), "k", payout_returned_entry("ann", "usd", 700, "op-1")))
    rows = tuple(payout_row(history.commit(), "ann", sequence) for sequence in (1, 2, 3))
    await apply.apply(connection, replace(history.whole(), payouts=rows))
    assert await balances(connection, None, None, None) == [Owed("ann", "usd", 700, 0, 3, False)]


class NoRows:
    """A `PayoutStore` without a shard."""

    async def moments(self) -> dict[str, Moment]:
        return {}

    async def disputed(self) -> list[Payment]:
        return []

    async def make(self, payouts: Sequence[Payout], not_after: Mapping[str, dt.datetime]) -> Mapping[str, str]:
        raise AssertionError("nobody is owed anything")


async def test_a_run_may_read_for_longer_than_a_reader(monkeypatch: pytest.MonkeyPatch, aggregator_dsn: str) -> None:
    monkeypatch.setattr(database, "READ_STATEMENT_S", 1)
    slow = "select $1::text, $2::text[], $3::timestamptz from pg_sleep(1.2) s (slept) where slept is null"
    monkeypatch.setattr(runs, "SQL", {"owed": slow})
    async with Database(aggregator_dsn) as connected, TipaltiClient(TipaltiSettings()) as tipalti:
        made = Runs(Reader(connected), cast(Shards, None), cast(PayoutStore, NoRows()), tipalti, PayoutSettings())
        assert (await made.run("ann")).payouts == []


@REAL
@given(last=st.integers(1, 40), lost=st.sets(st.integers(1, 40), max_size=3))
async def test_the_first_payout_that_is_missing_before_the_last_one_is_told(
    aggregator_dsn: str, connection: asyncpg.Connection, last: int, lost: set[int]
) -> None:
    """Of the last 32, and of this seller and currency alone."""
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    history = History("s0")
    history.entries.append(entry_row(history.commit(), "k", payout_returned_entry("ann", "usd", 700, "op-1")))
    there = [sequence for sequence in range(1, last + 1) if sequence == last or sequence not in lost]
    rows = [payout_row(history.commit(), "ann", sequence) for sequence in there]
    rows += [payout_row(history.commit(), "bob", sequence) for sequence in range(1, 41)]
    await apply.apply(connection, replace(history.whole(), payouts=tuple(rows)))
    missing = next((sequence for sequence in range(max(1, last - 31), last) if sequence in lost), 0)
    assert await balances(connection, None, None, None) == [Owed("ann", "usd", 700, 0, last, False, missing)]
