"""Batches against a real Postgres: whatever is sent again, cut or moved, an entry counts once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator import apply, reads
from aggregator.metrics import CONTRADICTIONS
from aggregator.migrate import migrate
from oncepay.cart import Fee, Item, shares_of
from oncepay.errors import MalformedBody
from oncepay.feed import FeedPosition, LinkRow, lsn_text
from oncepay.ledger import BalanceLink, payment_entry, stripe_fee_entry
from tests.aggregator.conftest import PASSWORDS
from tests.aggregator.database import empty, expected, held
from tests.aggregator.strategies import FIRST_US, History, coded_rows, entry_row, histories, payment_row

pytestmark = pytest.mark.cluster
REAL = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ITEMS = [Item("ann", 1000), Item("bob", 250, 2)]


def paid(shard: str = "s0", key: str = "k", *, entry_only: bool = False) -> History:
    """A payment from created to succeeded."""
    history = History(shard)
    if not entry_only:
        history.payments.append(payment_row(history.commit(), key, "created", 1, ITEMS))
    lsn = history.commit()
    history.payments.append(payment_row(lsn, key, "succeeded", 2, ITEMS, captured=1500))
    history.entries.append(entry_row(lsn, key, payment_entry("usd", "ch", shares_of(ITEMS, {}, Fee(1000)))))
    return history


async def test_a_migration_can_be_run_again_and_by_two_at_once(aggregator_dsn: str) -> None:
    again = await asyncio.gather(*(migrate(aggregator_dsn, passwords=PASSWORDS) for _ in range(2)))
    assert again == [[], []]


async def test_the_service_can_neither_change_nor_delete_an_entry(connection: asyncpg.Connection) -> None:
    for statement in (
        "delete from oncepay.entry_rows",
        "update oncepay.entry_rows set kind = 'x'",
        "truncate oncepay.entry_rows",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


async def test_a_batch_is_applied_with_its_watermark(connection: asyncpg.Connection) -> None:
    history = paid()
    assert await apply.position(connection, "s0") == FeedPosition(None, "", 0)
    answer = await apply.apply(connection, history.whole())
    assert (answer.applied, answer.watermark, answer.epoch) == (True, history.lsn, 1)
    assert await held(connection) == expected([history])
    assert await apply.position(connection, "s0") == FeedPosition(history.lsn, "i1", 1)


async def test_a_doubled_batch_counts_once(connection: asyncpg.Connection) -> None:
    history = paid()
    await apply.apply(connection, history.whole())
    answer = await apply.apply(connection, history.whole())
    assert (answer.applied, answer.watermark, answer.reason) == (False, history.lsn, "gap")
    assert await held(connection) == expected([history])


async def test_one_batch_sent_by_two_at_once_counts_once(aggregator_dsn: str, connection: asyncpg.Connection) -> None:
    history = paid()
    other = await asyncpg.connect(aggregator_dsn)
    answers = await asyncio.gather(*(apply.apply(each, history.whole()) for each in (connection, other)))
    await other.close()
    assert sorted(answer.applied for answer in answers) == [False, True]
    assert await held(connection) == expected([history])


async def test_a_batch_past_the_watermark_is_refused(connection: asyncpg.Connection) -> None:
    history = paid()
    first = history.payments[0].lsn
    await apply.apply(connection, history.batch(1000, first))
    answer = await apply.apply(connection, history.batch(first + 1, history.lsn))
    assert (answer.applied, answer.watermark, answer.reason) == (False, first, "gap")
    assert (await apply.apply(connection, history.batch(first, history.lsn))).applied
    assert await held(connection) == expected([history])


async def test_a_worker_whose_epoch_is_over_is_refused(connection: asyncpg.Connection) -> None:
    history = paid()
    first = history.payments[0].lsn
    await apply.apply(connection, history.batch(1000, first, epoch=3))
    answer = await apply.apply(connection, history.batch(first, history.lsn, epoch=2))
    assert (answer.applied, answer.epoch, answer.reason) == (False, 3, "epoch")
    assert (await apply.apply(connection, history.batch(first, history.lsn, epoch=4))).applied
    assert (await apply.position(connection, "s0")).epoch == 4


async def test_another_incarnation_is_refused(connection: asyncpg.Connection) -> None:
    history = paid()
    await apply.apply(connection, history.batch(1000, 1100))
    history.incarnation = "i2"
    answer = await apply.apply(connection, history.batch(1100, history.lsn))
    assert (answer.applied, answer.incarnation, answer.reason) == (False, "i1", "incarnation")
    assert (await held(connection))["entries"] == {}


async def test_rows_from_outside_of_the_batch_are_refused(connection: asyncpg.Connection) -> None:
    history = paid()
    whole = history.whole()
    for from_lsn, to_lsn in ((history.payments[0].lsn, history.lsn), (1000, history.lsn - 1), (history.lsn, 1000)):
        broken = type(whole)("s0", "i1", 1, from_lsn, to_lsn, whole.payments, whole.entries, whole.links)
        with pytest.raises(MalformedBody):
            await apply.apply(connection, broken)
    assert (await held(connection))["watermarks"] == {}


async def test_a_batch_that_fails_leaves_nothing(connection: asyncpg.Connection) -> None:
    history = paid()
    history.entries[0] = entry_row(history.lsn, "k", payment_entry("usd", "nul\x00", shares_of(ITEMS, {}, Fee(1000))))
    with pytest.raises(asyncpg.PostgresError):
        await apply.apply(connection, history.whole())
    assert await held(connection) == expected([])


@pytest.mark.parametrize("order", [("s0", "s1"), ("s1", "s0")])
async def test_a_moved_payments_streams_may_come_in_either_order(connection: asyncpg.Connection, order: Sequence[str]) -> None:
    """The source has it from its beginning, the target its later changes, without the terms; one entry is in both."""
    source, target = paid("s0"), History("s1")
    target.payments.append(payment_row(target.commit(), "k", "succeeded", 3, ITEMS, captured=1500, terms=False))
    target.entries.append(entry_row(target.lsn, "k", payment_entry("usd", "ch", shares_of(ITEMS, {}, Fee(1000)))))
    streams = {"s0": source, "s1": target}
    for shard in order:
        assert (await apply.apply(connection, streams[shard].whole())).applied
    assert await held(connection) == expected([source, target])
    assert (await held(connection))["payments"]["k"][2] == 3


async def test_an_entry_that_comes_again_with_another_content_is_counted_and_changes_nothing(
    connection: asyncpg.Connection,
) -> None:
    await apply.apply(connection, paid("s0").whole())
    before = await held(connection)
    other = History("s1")
    other.entries.append(entry_row(other.commit(), "k", payment_entry("usd", "ch", shares_of(ITEMS[:1], {}, Fee(1000)))))
    counted = CONTRADICTIONS.labels("s1")._value.get()
    assert (await apply.apply(connection, other.whole())).applied
    after = await held(connection)
    assert {**after, "watermarks": 0} == {**before, "watermarks": 0}
    assert CONTRADICTIONS.labels("s1")._value.get() == counted + 1


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("order", [("s0", "s1"), ("s1", "s0")])
async def test_what_a_row_tells_counts_once_beside_the_rows_of_earlier_workers(
    connection: asyncpg.Connection, order: Sequence[str], together: bool
) -> None:
    """A moved payment whose source's worker packs, and whose target's doesn't yet; its fee may come alone."""
    entries = [payment_entry("usd", "ch", shares_of(ITEMS, {}, Fee(1000))), stripe_fee_entry("usd", "txn", 60)]
    links = [BalanceLink("txn", entry.entry_id) for entry in entries]
    source, target = paid("s0"), History("s1")
    source.entries = coded_rows(source.lsn, "k", entries, links)
    assert [row.fee for row in source.entries] == [60]
    target.payments.append(payment_row(target.commit(), "k", "succeeded", 3, ITEMS, captured=1500))
    for entry, link in zip(entries, links, strict=True):
        lsn = target.lsn if together else target.commit()
        target.entries.append(entry_row(lsn, "k", entry))
        target.links.append(LinkRow(lsn, 0, target.entries[0].slot, "k", link.entry_id, "txn", FIRST_US))
    streams = {"s0": source, "s1": target}
    for shard in order:
        history = streams[shard]
        for lsn in range(1000, history.lsn, 100):
            assert (await apply.apply(connection, history.batch(lsn, lsn + 100))).applied
    assert await held(connection) == expected([source, target])
    rows = await connection.fetchval("select count(*) from oncepay.balance_links")
    assert rows == 2, "and no link is shown twice"


async def test_a_version_that_comes_twice_is_shown_once(connection: asyncpg.Connection) -> None:
    source, target = paid("s0"), History("s1")
    target.payments += [payment_row(target.commit(), "k", "succeeded", version, ITEMS, captured=1500) for version in (2, 3)]
    for history in (source, target):
        assert (await apply.apply(connection, history.whole())).applied
    shown = [(row.version, row.status, row.shard, row.lsn) for row in await reads.history(connection, "k")]
    assert shown == [
        (1, "created", "s0", lsn_text(source.payments[0].lsn)),
        (2, "succeeded", "s1", lsn_text(target.payments[0].lsn)),
        (3, "succeeded", "s1", lsn_text(target.lsn)),
    ]


@REAL
@given(history=histories(), data=st.data())
async def test_any_split_with_resends_is_exactly_the_fold(
    aggregator_dsn: str, connection: asyncpg.Connection, history: History, data: st.DataObject
) -> None:
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    commits = list(range(1000, history.lsn + 1, 100))
    cuts = sorted(data.draw(st.sets(st.sampled_from(commits)), label="cuts") | {1000, history.lsn})
    batches = [history.batch(start, end) for start, end in itertools.pairwise(cuts)]
    for n, batch in enumerate(batches):
        for other in data.draw(st.lists(st.sampled_from(batches), max_size=2), label="out of turn"):
            if n > 0 and other.from_lsn != batch.from_lsn:
                assert not (await apply.apply(connection, other)).applied
        assert (await apply.apply(connection, batch)).applied
        if data.draw(st.booleans(), label="twice"):
            assert not (await apply.apply(connection, batch)).applied
    assert await held(connection) == expected([history] if batches else [])


@REAL
@given(first=histories(prefix="k"), second=histories(shard="s1", prefix="k"), data=st.data())
async def test_two_shards_streams_in_any_interleaving_are_the_fold(
    aggregator_dsn: str, connection: asyncpg.Connection, first: History, second: History, data: st.DataObject
) -> None:
    """The same keys in both, as after a move: each entry once, the highest version."""
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    _continue(first, second)
    queues = {history.shard: list(range(1000, history.lsn, 100)) for history in (first, second)}
    streams = {history.shard: history for history in (first, second)}
    while any(queues.values()):
        shard = data.draw(st.sampled_from([name for name, left in queues.items() if left]))
        lsn = queues[shard].pop(0)
        assert (await apply.apply(connection, streams[shard].batch(lsn, lsn + 100))).applied
    assert await held(connection) == expected(history for history in (first, second) if history.lsn > 1000)


def _continue(source: History, target: History) -> None:
    """Make `target` the later life of the keys of `source`: higher versions, the same terms, the same entries (a fee may be in
    a row of its own in one, and in its payment's in the other)."""
    known = {row.key: row for row in source.payments}
    terms = {row.key: row.terms for row in source.payments if row.terms}
    fixed = [
        replace(
            row, version=row.version + 100, terms=row.terms and terms[row.key], buyer=known[row.key].buyer,
            currency=known[row.key].currency, amount=known[row.key].amount, created_at_us=known[row.key].created_at_us,
        )
        if row.key in known
        else row
        for row in target.payments
    ]  # fmt: skip
    target.payments[:] = fixed
    entries = {(row.key, row.entry_id): row for row in [*source.booked, *source.entries]}
    target.entries[:] = [
        replace(entries.get((row.key, row.entry_id), row), lsn=row.lsn, committed_at_ms=row.committed_at_ms)
        for row in target.entries
    ]
