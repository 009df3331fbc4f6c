"""A feed that lost its log, and the rebuild that puts it right, on a real Postgres and the real aggregator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from msgspec.structs import replace

from aggregator.fold import fold
from oncepay.cart import Fee, Item, shares_of
from oncepay.errors import OncepayError, OutcomeUnknown, ShardUnavailable
from oncepay.feed import REBUILD_END, EntryRow
from oncepay.ledger import payment_entry
from oncepay.payment import Failure, Progress, Status
from oncepay.settings import PayoutSettings, PollSettings
from shard.store.rows import Put
from shard.worker.cache import PendingCache
from shard.worker.errors import FeedHalted, StandDown
from shard.worker.feed import Place
from shard.worker.fill import fill
from shard.worker.payout_cache import PayoutCache
from shard.worker.resnapshot import Resnapshot
from shard.worker.snapshot import SQL
from shard.worker.stream import SLOT
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.shard.worker.harness import (
    SHARD,
    RunningAggregator,
    RunningFeed,
    ShardDatabase,
    eventually,
    new_payment,
    running_aggregator,
    running_feed,
    settings_for,
    shard_database,
)

__all__ = ["postgres_server"]

pytestmark = pytest.mark.cluster


@pytest.fixture
async def shard(postgres_server: PostgresServer) -> AsyncIterator[ShardDatabase]:
    async with shard_database(postgres_server) as made:
        yield made


@pytest.fixture
async def aggregator(postgres_server: PostgresServer, shard: ShardDatabase) -> AsyncIterator[RunningAggregator]:
    async with running_aggregator(postgres_server, settings_for(shard)) as made:
        yield made


async def pay(shard: ShardDatabase, *keys: str) -> None:
    """Payments that come and succeed, each with its entry."""
    for key in keys:
        made = new_payment(key)
        await shard.put(Put(made, 0, "accepted"))
        paid = replace(made, status=Status.SUCCEEDED, intent=f"pi_{key}", version=2, amount_captured=1000)
        await shard.put(Put(paid, 1, "seen", (payment_entry("usd", f"ch_{key}", made.terms.shares),)))


@asynccontextmanager
async def paying(shard: ShardDatabase, count: int) -> AsyncIterator[None]:
    """Payments `during0` and so on come and succeed meanwhile, over a session of their own."""
    writer = ShardDatabase(shard.server, shard.dsn, await asyncpg.connect(shard.dsn))
    going_on = asyncio.create_task(pay(writer, *(f"during{n}" for n in range(count))))
    try:
        yield
        await going_on
    finally:
        going_on.cancel()
        await asyncio.gather(going_on, return_exceptions=True)
        await writer.close()


async def is_the_fold(shard: ShardDatabase, aggregator: RunningAggregator) -> bool:
    """Whether the aggregator's rows and sums are exactly those of the shard's tables."""
    assert aggregator.connection is not None
    rows = await shard.connection.fetch("select key, version, status from oncepay.payments order by 1")
    derived = await aggregator.connection.fetch("select key, version, status from oncepay.payments order by 1")
    if [tuple(row) for row in rows] != [tuple(row) for row in derived]:
        return False
    wanted = fold(
        EntryRow(*(0, 0, 0, *row, 0))  # the day doesn't matter for accounts and kinds
        for row in await shard.connection.fetch(
            "select key, entry_id, kind, currency, source, accounts, amounts, sellers from oncepay.ledger"
        )
    )
    accounts = await aggregator.connection.fetch("select account, currency, debit, credit from oncepay.account_totals")
    kinds = await aggregator.connection.fetch("select kind, currency, entries, amount from oncepay.kind_totals")
    sums = {tuple(row) for row in accounts} | {tuple(row) for row in kinds}
    return sums == {(*name, total.debit, total.credit) for name, total in wanted.accounts.items()} | {
        (*name, total.entries, total.amount) for name, total in wanted.kinds.items()
    }


@asynccontextmanager
async def rebuilder(shard: ShardDatabase, feed: RunningFeed, aggregator: RunningAggregator) -> AsyncIterator[Resnapshot]:
    async def connect(host: str, port: int) -> asyncpg.Connection:
        return await asyncpg.connect(shard.dsn)

    epoch = int(await shard.connection.fetchval("select epoch from oncepay.worker_epoch"))
    async with aiohttp.ClientSession() as http:
        yield Resnapshot(
            SHARD, "worker-s0-1", epoch, aggregator.settings, shard.leaders, connect, http, feed.feed, feed.forwarder
        )


async def halted(feed: RunningFeed) -> None:
    def is_halted() -> bool:
        return any(isinstance(part.problem, FeedHalted) for part in (feed.feed, feed.forwarder))

    await eventually(is_halted, "the feed halted")
    problem = feed.forwarder.problem if isinstance(feed.forwarder.problem, FeedHalted) else feed.feed.problem
    assert "oncepay shards resnapshot" in str(problem)


async def free(change: Callable[[], object]) -> None:
    """Do something with the slot as soon as its reader has gone."""

    async def done() -> bool:
        try:
            await change()  # type: ignore[misc]
        except asyncpg.ObjectInUseError:
            return False
        return True

    await eventually(done, "the slot was free")


async def test_a_slot_that_was_dropped_and_made_again(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """The feed stops and names the command; the rebuild brings what never came, while payments go on."""
    async with running_feed(shard, aggregator.settings):
        await pay(shard, "a", "b")
        await aggregator.holds("a", "b")
    await free(lambda: shard.connection.execute(f"select pg_drop_replication_slot('{SLOT}')"))
    await pay(shard, "lost1", "lost2")
    await shard.connection.execute(f"select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
    async with running_feed(shard, aggregator.settings) as feed:
        await pay(shard, "after")
        await halted(feed)
        assert await aggregator.keys() == {"a", "b"}
        async with paying(shard, 40), rebuilder(shard, feed, aggregator) as resnapshot:
            position = await resnapshot.rebuild()
        await aggregator.holds("lost1", "lost2", "after", "during39")
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")
        assert (await aggregator.watermark() or 0) >= position
        await eventually(lambda: feed.forwarder.problem is None, "the feed moves")
        await pay(shard, "later")
        await eventually(lambda: is_the_fold(shard, aggregator), "the feed goes on exactly")
        assert resnapshot.progress.rows >= 10


async def test_a_slot_that_lost_its_log_is_made_anew(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    async with running_feed(shard, aggregator.settings):
        await pay(shard, "a")
        await aggregator.holds("a")
    await pay(shard, "lost")
    await lose_the_log(shard)
    async with running_feed(shard, aggregator.settings) as feed:
        await halted(feed)
        async with rebuilder(shard, feed, aggregator) as resnapshot:
            await resnapshot.rebuild()
        await pay(shard, "later")
        await aggregator.holds("a", "lost", "later")
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")


async def lose_the_log(shard: ShardDatabase) -> None:
    """As when the feed stood still until `max_slot_wal_keep_size` was used up. Nobody reads the slot."""
    session = shard.connection
    await session.execute("alter system set max_slot_wal_keep_size = '16MB'")
    await session.execute("select pg_reload_conf()")
    try:

        async def is_lost() -> bool:
            await session.execute("select pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")
            await session.execute("checkpoint")
            state = await session.fetchval("select wal_status from pg_replication_slots where slot_name = $1", SLOT)
            return str(state) == "lost"

        await eventually(is_lost, "the slot lost its log")
    finally:
        await session.execute("alter system reset max_slot_wal_keep_size")
        await session.execute("select pg_reload_conf()")


async def drop_the_slot(shard: ShardDatabase) -> None:
    await free(lambda: shard.connection.execute(f"select pg_drop_replication_slot('{SLOT}')"))


class Caches:
    """A worker's caches, beside a feed that runs."""

    def __init__(self, shard: ShardDatabase, feed: RunningFeed) -> None:
        self.payments = PendingCache(PollSettings())
        self.payouts = PayoutCache(PayoutSettings())
        self.payments.begin_fill()
        self.payouts.begin_fill()
        self._shard = shard
        self._feed = feed.feed
        assert not feed.seen
        self._feed._on_certain = lambda transaction: self.payments.changed_all(transaction.payments)

    async def fill(self) -> None:
        async def connect(host: str, port: int) -> asyncpg.Connection:
            return await asyncpg.connect(self._shard.dsn)

        async with asyncio.timeout(20):
            await fill(self.payments, self.payouts, self._feed, connect, [(0, 65_535)])

    async def holds(self, *keys: str) -> None:
        await eventually(lambda: {pending.key for pending in self.payments} == set(keys), f"{keys} are pending")


@pytest.mark.parametrize("lose", [lose_the_log, drop_the_slot])
async def test_a_worker_that_starts_without_the_slot_looks_after_payments_while_its_feed_is_halted(
    shard: ShardDatabase, aggregator: RunningAggregator, lose: Callable[[ShardDatabase], Awaitable[None]]
) -> None:
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("a")
        await aggregator.holds("a")
        await eventually(feed.keeping.done, "the shard knows that its feed was applied")
    await shard.accept("lost")
    await lose(shard)
    watermark = await aggregator.watermark()
    assert watermark is not None
    made: set[int] = set()
    for n in range(2):  # the second worker finds the slot as the first one made it
        async with running_feed(shard, aggregator.settings) as feed:
            caches = Caches(shard, feed)
            await caches.fill()
            await shard.accept(f"after{n}")
            await caches.holds("a", "lost", *(f"after{m}" for m in range(n + 1)))
            await eventually(lambda: isinstance(feed.forwarder.problem, FeedHalted), "the feed is halted")
            assert "jumped ahead" in str(feed.forwarder.problem)
            assert feed.feed.problem is None
            assert await aggregator.keys() == {"a"}
            assert await aggregator.watermark() == watermark
            made.add(await shard.confirmed_lsn())
    assert len(made) == 1, "the slot stands still"
    assert made.pop() > watermark, "so that what is missing is seen"
    async with running_feed(shard, aggregator.settings) as feed:
        caches = Caches(shard, feed)
        await caches.fill()
        async with rebuilder(shard, feed, aggregator) as resnapshot:
            await resnapshot.rebuild()
        await shard.accept("later")
        await aggregator.holds("a", "lost", "after0", "after1", "later")
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")
        await caches.holds("a", "lost", "after0", "after1", "later")
        assert not any(task.done() for task in feed.tasks), "a rebuild needs no new start"


async def test_a_log_that_was_lost_before_the_aggregator_had_anything_is_missed(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    """Without a position the feed would begin where the new slot does, and skip what came before."""
    await shard.accept("lost")
    await lose_the_log(shard)
    for _ in range(2):
        async with running_feed(shard, aggregator.settings) as feed:
            caches = Caches(shard, feed)
            await caches.fill()
            await caches.holds("lost")
            await eventually(lambda: isinstance(feed.forwarder.problem, FeedHalted), "the feed is halted")
            assert await aggregator.watermark() is None
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await resnapshot.rebuild()
        await aggregator.holds("lost")


async def test_a_new_shard_without_its_slot_is_waited_for(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """It is made with the shard, and its feed begins there."""
    await drop_the_slot(shard)
    async with running_feed(shard, aggregator.settings) as feed:
        await eventually(lambda: "has no slot" in str(feed.feed.problem), "the feed waits for the slot")
        assert not await shard.is_fed()
        await shard.connection.execute(f"select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
        await shard.accept("a")
        await aggregator.holds("a")


async def test_a_worker_whose_slot_was_made_anew_meanwhile_stands_down(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    """What changed in between is in no stream: it is in the caches of the next turn, which are filled from the table."""
    async with running_feed(shard, aggregator.settings) as feed:
        caches = Caches(shard, feed)
        await caches.fill()
        await shard.accept("a")
        await aggregator.holds("a")

        async def confirmed() -> bool:
            return await shard.confirmed_lsn() == await aggregator.watermark()

        await eventually(confirmed, "the slot is confirmed to the aggregator's position")
        shard.leaders.move(None)
        await shard.accept("b")
        shard.leaders.move(shard.node)
        await aggregator.holds("b")
        await caches.holds("a", "b")
        assert not any(task.done() for task in feed.tasks), "its own slot is never past what it has delivered"
        shard.leaders.move(None)
        await drop_the_slot(shard)
        await shard.accept("missed")
        await shard.connection.execute(f"select pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
        shard.leaders.move(shard.node)
        await eventually(feed.tasks[0].done, "its turn ended")
        assert isinstance(feed.tasks[0].exception(), StandDown)
    async with running_feed(shard, aggregator.settings) as feed:
        caches = Caches(shard, feed)
        await caches.fill()
        await caches.holds("a", "b", "missed")


async def test_a_rebuild_of_a_feed_that_moves_takes_nothing_back(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, "a")
        async with paying(shard, 60):
            for _ in range(3):
                before = await aggregator.watermark() or 0
                assert await resnapshot.rebuild() >= before
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")
        await eventually(lambda: feed.forwarder.problem is None, "the feed moves")


@pytest.mark.parametrize("blocks", [1, 1_024])
async def test_all_comes_out_of_the_tables_as_the_feed_had_brought_it(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """What was lost comes again from nothing, piece by piece, and with rows of before entries were packed."""
    monkeypatch.setattr("shard.worker.snapshot.PIECE_BLOCKS", blocks)
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, *(f"k{n}" for n in range(140)))
        await odd(shard, *(f"k{n}" for n in range(140, 150)))
        for statement in OF_BEFORE:
            await shard.connection.execute(statement)
        await aggregator.holds("k149", "old2")
        await eventually(lambda: is_the_fold(shard, aggregator), "all was forwarded")
        database = aggregator.connection
        assert database is not None
        before = {table: await all_of(database, table) for table in DERIVED}
        await database.execute("truncate oncepay.payment_versions, " + ", ".join(f"oncepay.{table}" for table in DERIVED))
        await resnapshot.rebuild()
        assert {table: await all_of(database, table) for table in DERIVED} == before
        assert resnapshot.progress.rows == 152 + 142 + 1
        last = "select key, version, status, event, actor from oncepay.{} order by key, version"
        assert await database.fetch(last.format("payment_history")) == await shard.connection.fetch(last.format("payments"))


DERIVED = (
    *("entry_rows", "seller_postings", "link_rows", "payments"),
    *("account_totals", "account_days", "kind_totals", "seller_days"),
)
ITEMS: tuple[tuple[Item, ...], ...] = (
    (Item("ann", 1), Item("bob", 2, 3), Item("ann", 1, 1, "again")),
    (Item('q"uo\\te', 5, 1, 'é{}, "quoted" \\n \n\t\x01\x7f/ \u2028 \U0001f600'), Item("platform", 3, 2)),
    (Item("ann", 0, 1, "1"), Item("bob", 10, 10, "[]"), Item("bob", 1, 1, "no\0text")),
)
FAILURES = (None, Failure("card_declined"), Failure("x", 'a "message" \\ é\x02', "fraudulent"))


async def odd(shard: ShardDatabase, *keys: str) -> None:
    """Payments of all kinds of items, with failures and without, some with shares that don't follow from the items."""
    for n, key in enumerate(keys):
        made, items = new_payment(key), ITEMS[n % len(ITEMS)]
        shares = shares_of(items, {}, Fee(1000, 1))
        terms = replace(made.terms, items=items, shares=tuple(reversed(shares)) if n % 2 else shares)
        amount = sum(item.amount * item.quantity for item in items)
        made = replace(made, terms=terms, amount=amount, progress=Progress(attempt=n, failure=FAILURES[n % 4 % 3]))
        await shard.put(Put(made, 0, "accepted"))


OF_BEFORE = (
    """
insert into oncepay.payments (slot, key, status, version, buyer, currency, amount, intent, fingerprint, terms, progress,
    open_work, event, actor, created_at, updated_at, expires_at)
select oncepay.slot_of(k), k, status, version, buyer, currency, amount, 'pi_' || k, fingerprint,
       '{"items": [{"seller": "é", "amount": 1000}], "shares": [{"seller": "é", "gross": 1000, "fee": 1}], "api_version": "v"}',
       '{"failure": {"code": "gone", "message": ""}}', open_work, event, actor, created_at, updated_at, expires_at
from oncepay.payments cross join (values ('old1'), ('old2')) o (k) where key = 'k0'
""",
    """
insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at)
select slot, key, 'fee:a "quoted" é', 'stripe_fee', 'usd', 'txn_1', array['stripe:fees', 'stripe:clearing'], array[30, -30],
       array['', ''], now()
from oncepay.payments where key = 'k0'
""",
    """
insert into oncepay.entries (slot, key, entry_id, currency, accounts, amounts, created_at, balance_transaction, fee)
select slot, key, 'refund:re_1', 'usd', array['C', 'Pann', 'Fann', 'Fplatform'], array[-100, 80, 15, 5], now(), 'txn_2', -7
from oncepay.payments where key = 'k1'
""",
    "insert into oncepay.balance_links (slot, key, entry_id, balance_transaction, created_at)"
    " select slot, key, 'payment', 'txn_é', now() from oncepay.payments where key = 'k2'",
    # What no JSON of Postgres can hold.
    "update oncepay.payments set course = replace(course, 'card_declined', 'card\\u0000declined'), version = version + 1"
    " where course like '%card_declined%'",
)


async def all_of(database: asyncpg.Connection, table: str) -> set[str]:
    """A table's rows, whatever position they came by."""
    return {row[0] for row in await database.fetch(f"select (to_jsonb(t) - 'lsn')::text from oncepay.{table} t")}


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def refuse(request: web.Request) -> web.StreamResponse:
    """At once, while the worker has more to send than fits."""
    return web.Response(status=409, text="not you")


async def go_away(request: web.Request) -> web.StreamResponse:
    """In the middle of a table."""
    await request.content.readexactly(1 << 20)
    assert request.transport is not None
    request.transport.abort()
    raise asyncio.CancelledError


async def take_time(request: web.Request) -> web.StreamResponse:
    """Enough for the shard's node to end the session that reads."""
    await request.content.readexactly(1 << 20)
    await asyncio.sleep(3)
    await request.content.read()
    raise AssertionError


@asynccontextmanager
async def instead_of_the_aggregator(resnapshot: Resnapshot, answer: Answer) -> AsyncIterator[None]:
    """Rebuilds are answered so."""
    app = web.Application()
    app.router.add_post(f"/v1/feed/{SHARD}/rebuild", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    honest = resnapshot._settings
    resnapshot._settings = replace(honest, aggregator_url=f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield
    finally:
        resnapshot._settings = honest
        await runner.cleanup()


async def test_no_range_leaves_while_the_shard_is_rebuilt(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """The rebuild would replace what the range's new owner brought by what was there before."""
    fence = "select oncepay.fence_range('mv_1', 1, 0, 65535, 150)"
    await shard.connection.fetchval("select oncepay.claim_move('mv_1', 1, 'me', array['x'])")
    refused: list[str] = []

    async def try_to_leave(request: web.Request) -> web.StreamResponse:
        session = await asyncpg.connect(shard.dsn)
        try:
            await session.fetchval(fence)
        except asyncpg.PostgresError as error:
            refused.append(str(error.sqlstate))
        finally:
            await session.close()
        return web.Response(status=409, text="not now")

    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, "a")
        async with instead_of_the_aggregator(resnapshot, try_to_leave):
            with pytest.raises(OncepayError):
                await resnapshot.rebuild()
        assert refused == ["OP005"]

        async def leaves() -> bool:  # the session that held it is just ending
            try:
                return bool(await shard.connection.fetchval(fence))
            except asyncpg.PostgresError:
                return False

        await eventually(leaves, "the range leaves afterwards")


async def test_a_rebuild_whose_hold_on_the_ranges_was_lost_is_not_committed(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    ended: list[bool] = []

    async def lose_it(request: web.Request) -> web.StreamResponse:
        holding = "select pg_terminate_backend(pid, 5000) from pg_locks where locktype = 'advisory' and classid = 4"
        ended.append(await shard.connection.fetchval(holding))
        ended.append((await request.content.read()).endswith(REBUILD_END))
        return web.Response(status=409, text="not now")

    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, "a")
        async with instead_of_the_aggregator(resnapshot, lose_it):
            with pytest.raises(ShardUnavailable, match="a range may have left"):
                await resnapshot.rebuild()
    assert ended == [True]


@pytest.mark.parametrize("answer", [refuse, go_away, take_time])
async def test_a_rebuild_that_breaks_in_the_middle_of_a_copy_is_a_failed_rebuild_and_no_more(
    shard: ShardDatabase, aggregator: RunningAggregator, answer: Answer
) -> None:
    """The worker lives on, keeps nothing open at the shard, and does the next one."""
    await pay(shard, "k")
    await shard.connection.execute(
        "select pg_replication_origin_create('planted'), pg_replication_origin_session_setup('planted')"
    )
    await shard.connection.execute(MANY)
    await shard.connection.execute("select pg_replication_origin_session_reset(), pg_replication_origin_drop('planted')")
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        running = asyncio.create_task(resnapshot.run())
        async with instead_of_the_aggregator(resnapshot, answer):
            resnapshot.ask()
            if answer is take_time:
                await eventually(lambda: reading(shard), "a table is read")
                await asyncio.sleep(0.5)
                await shard.connection.execute(f"select pg_terminate_backend(pid) from ({READING}) r")
            await eventually(lambda: resnapshot.progress.state == "failed", "the rebuild failed")
            assert resnapshot.progress.problem
            assert not running.done()
            await eventually(lambda: nothing_open(shard), "nothing is left open")
        resnapshot.ask()
        await eventually(lambda: resnapshot.progress.state == "done", "the next one is done")
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


MANY = """
insert into oncepay.entries (slot, key, entry_id, kind, currency, source, accounts, amounts, created_at)
select p.slot, p.key, 'adjusted:' || n, 'adjusted', 'usd', repeat(n::text, 1000 / length(n::text)),
       array['C', 'Pann'], array[n, -n], now()
from oncepay.payments p cross join generate_series(1, 12000) n where p.key = 'k'
"""
READING = "select pid from pg_stat_activity where state = 'active' and query ilike 'copy (%oncepay.entries%'"


async def reading(shard: ShardDatabase) -> bool:
    return bool(await shard.connection.fetchval(f"select exists ({READING})"))


async def nothing_open(shard: ShardDatabase) -> bool:
    """Neither a session that reads nor a slot for it."""
    slots = await shard.connection.fetchval("select count(*) from pg_replication_slots where temporary")
    return slots == 0 and not await reading(shard)


async def test_an_aggregator_that_refuses_in_the_middle_of_a_copy(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is told, nothing waits for it, and the next rebuild does."""
    monkeypatch.setattr("shard.worker.snapshot.PIECE_BLOCKS", 1)
    monkeypatch.setattr("shard.worker.snapshot.PARTS_AHEAD", 1)
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, *(f"k{n}" for n in range(150)))
        await aggregator.holds("k149")
        honest = dict(SQL)
        for wrong, told in (("'0/1'::pg_lsn", "not of|are of shard"), ("(select 1/0)::text::pg_lsn", "can't be read")):
            monkeypatch.setitem(SQL, "entry_rows", honest["entry_rows"].replace("'{lsn}'::pg_lsn", wrong))
            with pytest.raises(OncepayError, match=told):
                async with asyncio.timeout(20):
                    await resnapshot.rebuild()
        monkeypatch.undo()
        await resnapshot.rebuild()
        await eventually(lambda: is_the_fold(shard, aggregator), "the aggregator is the fold")


async def test_a_leader_that_changed_meanwhile_changes_nothing(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of a leader that was deposed may be gone; without a barrier on the same one nothing is committed."""
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, "a")
        await aggregator.holds("a")
        assert aggregator.connection is not None
        await eventually(lambda: is_the_fold(shard, aggregator), "all was forwarded")
        honest = feed.feed.fence

        async def elsewhere() -> Place:
            return (await honest())._replace(timeline=7)

        monkeypatch.setattr(feed.feed, "fence", elsewhere)
        await aggregator.connection.execute("update oncepay.payments set status = 'old'")
        with pytest.raises(ShardUnavailable, match="leader changed"):
            await resnapshot.rebuild()
        assert await aggregator.connection.fetchval("select status from oncepay.payments") == "old"
        monkeypatch.undo()
        await resnapshot.rebuild()
        await eventually(lambda: is_the_fold(shard, aggregator), "the next one works")


async def test_what_no_quorum_holds_is_not_rebuilt(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that no standby has is in the tables; a rebuild that read it waits for a barrier behind it, and gives up."""
    monkeypatch.setattr("shard.worker.resnapshot.FENCE_S", 0.5)
    async with running_feed(shard, aggregator.settings) as feed, rebuilder(shard, feed, aggregator) as resnapshot:
        await pay(shard, "certain")
        await aggregator.holds("certain")
        shard.barrier_error = OutcomeUnknown("no standby")
        await pay(shard, "uncertain")
        with pytest.raises(TimeoutError):
            await resnapshot.rebuild()
        assert await aggregator.keys() == {"certain"}
        shard.barrier_error = None
        await resnapshot.rebuild()
        assert await aggregator.keys() == {"certain", "uncertain"}
