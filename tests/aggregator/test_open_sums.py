"""Sellers' sums that are behind while a shard catches up: whoever reads them sees what they come to at the watermark."""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import apply, queries, reads
from aggregator.fold import SELLER_ACCOUNTS, SellerDay, fold
from aggregator.reads import Span
from aggregator.views import RevenueRow
from oncepay.entry_rows import entries_of
from oncepay.feed import FeedBatch
from oncepay.ledger import Entry, Posting
from tests.aggregator.database import EPOCH, empty, expected, held
from tests.aggregator.strategies import SELLERS, History, entry_row, histories
from tests.aggregator.test_apply import REAL, paid
from tests.aggregator.test_audit import differing
from tests.aggregator.test_rebuild import body, rebuilt

pytestmark = pytest.mark.cluster
KEPT_DAYS = "select coalesce(sum(gross), 0)::bigint from oncepay.seller_days"
OPEN = "select shard, open_postings, open_of_one from oncepay.watermarks where open_since is not null order by shard"
SELLER_ACCOUNT = "seller:{}:payable"


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """They are as they were after each test."""
    for name in ("CATCHING_UP_ROWS", "OPEN_MAX", "OPEN_OF_ONE_MAX"):
        monkeypatch.setattr(apply, name, getattr(apply, name))
    return monkeypatch


async def emptied(dsn: str) -> None:
    owner = await asyncpg.connect(dsn)
    await empty(owner)
    await owner.close()


async def applied(connection: asyncpg.Connection, batch: FeedBatch, *, behind: bool) -> None:
    apply.CATCHING_UP_ROWS = 0 if behind else 1 << 30
    assert (await apply.apply(connection, batch)).applied


async def agree(connection: asyncpg.Connection, *streams: History) -> None:
    """Tables, answers and the audit all say what a fold of the entries says."""
    assert await held(connection) == expected(streams)
    sums = fold({(row.key, row.entry_id): row for history in streams for row in history.entries}.values())
    far = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    for seller in SELLERS:
        owed = {each.currency: (each.credited, each.debited) for each in await reads.balance(connection, seller, far)}
        account = SELLER_ACCOUNT.format(seller)
        assert owed == {c: (total.credit, total.debit) for (name, c), total in sums.accounts.items() if name == account}
        for currency in ("usd", "eur", "jpy"):
            rows, _ = await reads.revenue(connection, seller, currency, Span(None, None, "day", 99))
            assert {row.from_: _shown(row) for row in rows} == {
                day: _shown(row) for (who, what, day), row in sums.seller_days.items() if (who, what) == (seller, currency)
            }
            whole, _ = await reads.revenue(connection, seller, currency, Span(None, None, None, 9))
            assert sum(row.net for row in whole) == sum(row.net for row in rows)
    top = {(row.seller, row.currency): row.gross for row in await reads.sellers(connection, None, 99)}
    assert sum(top.values()) == sum(row.gross for row in sums.seller_days.values())
    _, accounts = await reads.totals(connection)
    assert {(one.account, one.currency): (one.debit, one.credit) for one in accounts} == _as_one(sums.accounts)
    for history in streams:
        assert await differing(connection, history) == {"postings": set(), "sellers": set(), "accounts": set()}


def _shown(row: Any) -> tuple[int, ...]:
    assert isinstance(row, SellerDay | RevenueRow)
    return row.payments, row.gross, row.refunded, row.disputed, row.fees, row.net


def _as_one(accounts: Any) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (name, currency), total in accounts.items():
        shown = (SELLER_ACCOUNTS if name.startswith("seller:") else name, currency)
        debit, credit = found.get(shown, (0, 0))
        found[shown] = debit + total.debit, credit + total.credit
    return found


@REAL
@given(first=histories(), second=histories(shard="s1", prefix="m"), data=st.data())
async def test_sums_that_are_behind_in_any_way_are_the_fold(
    aggregator_dsn: str, connection: asyncpg.Connection, first: History, second: History, data: st.DataObject
) -> None:
    await emptied(aggregator_dsn)
    streams = [history for history in (first, second) if history.lsn > 1000]
    for history in streams:
        commits = list(range(1000, history.lsn + 1, 100))
        cuts = sorted(data.draw(st.sets(st.sampled_from(commits), max_size=5), label="cuts") | {1000, history.lsn})
        for start, end in itertools.pairwise(cuts):
            apply.OPEN_MAX = data.draw(st.sampled_from([5, 1000]), label="open, at most")
            apply.OPEN_OF_ONE_MAX = data.draw(st.sampled_from([3, 1000]), label="of one seller, at most")
            await applied(connection, history.batch(start, end), behind=data.draw(st.booleans(), label="behind"))
    await agree(connection, *streams)
    for history in streams:
        await applied(connection, History(history.shard, lsn=history.lsn).batch(history.lsn, history.lsn + 1), behind=False)
        history.lsn += 1
    assert not await connection.fetch(OPEN)
    await agree(connection, *streams)


async def test_postings_are_open_until_a_batch_has_nothing_behind_it(connection: asyncpg.Connection) -> None:
    history = paid()
    await applied(connection, history.whole(), behind=True)
    assert await connection.fetchval(KEPT_DAYS) == 0
    assert [tuple(row) for row in await connection.fetch(OPEN)] == [("s0", 2, 1)]
    await agree(connection, history)
    await applied(connection, History("s0").batch(history.lsn, history.lsn + 5), behind=False)
    history.lsn += 5
    assert await connection.fetchval(KEPT_DAYS) == 1500
    assert not await connection.fetch(OPEN)
    await agree(connection, history)


@pytest.mark.parametrize("limit", ["OPEN_MAX", "OPEN_OF_ONE_MAX"])
async def test_no_more_than_the_limits_are_open(connection: asyncpg.Connection, limits: pytest.MonkeyPatch, limit: str) -> None:
    limits.setattr(apply, limit, 3)
    history, seen = History("s0"), []
    for key in "abcdef":
        before, paying = history.lsn, paid(key=key)
        lsn = history.commit()
        history.entries.append(entry_row(lsn, key, _entry(paying)))
        await applied(connection, history.batch(before, lsn), behind=True)
        rows = await connection.fetch(OPEN)
        seen.append(rows[0]["open_postings" if limit == "OPEN_MAX" else "open_of_one"] if rows else 0)
    assert seen == ([2, 0, 2, 0, 2, 0] if limit == "OPEN_MAX" else [1, 2, 0, 1, 2, 0])
    await agree(connection, history)


def _entry(history: History) -> Entry:
    (row,) = history.entries
    (read,) = entries_of(row.stored)
    postings = tuple(Posting(*each) for each in zip(read.accounts, read.amounts, read.sellers, strict=True))
    return Entry(read.entry_id, read.kind, read.currency, read.source, postings)


async def test_an_entry_of_an_earlier_day_is_added_to_that_day(connection: asyncpg.Connection) -> None:
    """Times don't come in order: what is open may be of before what is not."""
    late, early = paid(key="late"), paid(key="early")
    day_us = 86_400_000_000
    late.entries[0] = entry_row(late.lsn, "late", _entry(late), late.entries[0].created_at_us + day_us)
    await applied(connection, late.whole(), behind=False)
    for row in early.entries:
        late.entries.append(entry_row(late.commit(), "early", _entry(early), row.created_at_us))
    await applied(connection, late.batch(late.lsn - 100, late.lsn), behind=True)
    await agree(connection, late)
    rows, _ = await reads.revenue(connection, "ann", "usd", Span(None, None, "day", 9))
    assert [row.from_ for row in rows] == [
        (EPOCH + dt.timedelta(microseconds=r.created_at_us)).date() for r in late.entries[::-1]
    ]


async def test_a_moved_payments_entry_counts_once_while_both_are_behind(connection: asyncpg.Connection) -> None:
    source, target = paid("s0"), paid("s1", entry_only=True)
    await applied(connection, source.whole(), behind=True)
    await applied(connection, target.whole(), behind=True)
    await agree(connection, source, target)


@REAL
@given(history=histories(prefix="k"), other=histories(shard="s1", prefix="m"), data=st.data())
async def test_a_rebuild_of_what_is_open_is_the_fold(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, other: History, data: st.DataObject
) -> None:
    """Of all slots: what the other shard brought is gone, and its sums are made again."""
    await emptied(aggregator_dsn)
    until = data.draw(st.integers(10, history.lsn // 100), label="applied") * 100
    for batch in (history.batch(1000, until), other.whole()):
        await applied(connection, batch, behind=data.draw(st.booleans(), label="behind"))
    await rebuilt(connection, "s0", body(history))
    bare = History("s1", lsn=other.lsn)
    assert not await connection.fetch(OPEN)
    await agree(connection, history, bare)
    following = paid("s1", "following")
    following.payments, following.entries = [], [entry_row(other.lsn + 100, "following", _entry(following))]
    following.lsn = other.lsn + 100
    await applied(connection, following.batch(other.lsn, following.lsn), behind=True)
    await agree(connection, history, following)


async def test_postings_from_before_they_had_a_shard_are_summed_by_a_rebuild(
    aggregator_dsn: str, connection: asyncpg.Connection
) -> None:
    """Of a shard that lost other entries by it."""
    moved, stays = paid("s0", "k"), paid("s0", "stays")
    await applied(connection, moved.whole(), behind=False)
    entry = entry_row(moved.lsn + 100, "stays", _entry(stays))
    moved.entries.append(entry)
    moved.lsn += 100
    await applied(connection, moved.batch(moved.lsn - 100, moved.lsn), behind=False)
    owner = await asyncpg.connect(aggregator_dsn)
    await owner.execute("update oncepay.seller_postings set shard = null, lsn = null, debit = null, credit = null, named = true")
    await owner.close()
    target, slot = paid("s1", "k"), moved.entries[0].slot
    await rebuilt(connection, "s1", body(target, slots=((slot, slot),)))
    left = History("s0", lsn=moved.lsn)
    left.entries.append(entry)
    await agree(connection, left, target)
    assert await connection.fetchval("select count(*) from oncepay.seller_postings where shard is null") == 0


async def test_payout_runs_see_what_is_open(connection: asyncpg.Connection) -> None:
    sql = queries.load("payouts.sql")["owed"]
    history = paid()
    await applied(connection, history.whole(), behind=True)
    rows = await connection.fetch(sql, None, None, None)
    assert {row["seller"]: row["balance"] for row in rows} == {"ann": 900, "bob": 450}
    one = await connection.fetch(sql, "usd", ["bob"], None)
    assert [row["balance"] for row in one] == [450]
