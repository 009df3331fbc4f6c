"""The feed on a real Postgres, into the real aggregator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from oncepay.errors import OutcomeUnknown
from oncepay.feed import lsn_text
from shard.store.rows import Put
from shard.worker import metrics
from shard.worker.errors import FeedHalted, StandDown
from tests.aggregator.database import empty
from tests.postgres_fixture import PostgresServer, postgres_server
from tests.shard.worker.harness import (
    SHARD,
    RunningAggregator,
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


async def test_changes_arrive_in_order_and_the_slot_follows(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    await shard.accept("before the worker")
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("a", "b")
        await shard.accept("c")
        await aggregator.holds("before the worker", "a", "b", "c")
        assert feed.seen_keys == ["before the worker", "a", "b", "c"]

        async def confirmed() -> bool:
            return await shard.confirmed_lsn() == await aggregator.watermark()

        await eventually(confirmed, "the slot is confirmed to the aggregator's watermark")
        lsns = [transaction.end_lsn for transaction in feed.seen]
        assert lsns == sorted(set(lsns))


async def test_nothing_is_forwarded_before_its_barrier_is_acknowledged(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    """A commit that no standby has is visible and decoded; it must not leave before a barrier after it is proved."""
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("certain")
        await aggregator.holds("certain")
        shard.barrier_error = OutcomeUnknown("no standby")
        await shard.accept("uncertain")
        tried = shard.barriers
        await eventually(lambda: shard.barriers >= tried + 3, "barriers are tried")
        assert "uncertain" not in feed.seen_keys
        assert "uncertain" not in await aggregator.keys()
        shard.barrier_error = None
        await aggregator.holds("uncertain")


async def test_a_barrier_acknowledged_elsewhere_frees_nothing(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """The reader follows one node and the committer another: an acknowledgement without the nonce in the stream."""
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("certain")
        await aggregator.holds("certain")
        honest, asked = shard.barrier, []

        async def elsewhere(nonce: str) -> None:
            asked.append(nonce)
            await honest(f"on another node: {nonce}")

        feed.feed._barrier = elsewhere
        await shard.accept("stale")
        await eventually(lambda: len(asked) >= 1, "a barrier was committed elsewhere")
        await asyncio.sleep(0.3)  # nothing happens: there is no event to wait for
        assert "stale" not in feed.seen_keys
        assert "stale" not in await aggregator.keys()


async def test_messages_alone_cause_no_loop_of_barriers_but_move_the_slot(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.worker.feed.IDLE_BARRIER_S", 0.5)
    async with running_feed(shard, aggregator.settings):
        await shard.accept("a")
        await aggregator.holds("a")
        before, confirmed = shard.barriers, await shard.confirmed_lsn()
        end_s = time.monotonic() + 1.4
        while time.monotonic() < end_s:
            await shard.put()
            await asyncio.sleep(0.01)
        assert 1 <= shard.barriers - before <= 4

        async def moved() -> bool:
            return await shard.confirmed_lsn() > confirmed

        await eventually(moved, "the slot moved")
        await asyncio.sleep(1.0)
        idle = shard.barriers
        await asyncio.sleep(1.2)
        assert shard.barriers == idle, "its own barriers are no reason for another one"


async def test_the_aggregator_goes_and_comes_back(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is away what is read goes on to the cache, in bounded memory; then it gets all, each once."""
    monkeypatch.setattr("shard.worker.forward.QUEUE_BYTES_MAX", 50_000)
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("a")
        await aggregator.holds("a")
        await aggregator.stop()
        keys = [f"k{n}" for n in range(300)]
        for key in keys:
            await shard.accept(key)
        await eventually(lambda: set(keys) <= set(feed.seen_keys), "the cache has seen all")
        assert feed.forwarder.oldest_ms is not None
        assert feed.forwarder._queue_bytes < 60_000
        confirmed = await shard.confirmed_lsn()
        assert confirmed == await aggregator.watermark()
        await aggregator.start()
        await aggregator.holds(*keys)
        assert sorted(feed.seen_keys) == sorted(["a", *keys]), "the cache saw each change once"


async def test_too_much_to_hold_is_read_again_from_the_slot(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog that is larger than what may be held back until its barrier is certain."""
    keys = [f"k{n:04}" for n in range(400)]
    for n in range(0, 400, 5):
        await shard.accept(*keys[n : n + 5])
    async with running_feed(shard, aggregator.settings) as feed:
        feed.feed._sieve._held_bytes_max = 20_000
        await aggregator.holds(*keys)
        assert feed.seen_keys == keys
        assert feed.feed.problem is None


async def test_a_large_backlog_is_made_certain_ahead_and_read_once(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog of more than may be held back, and what comes while it is read."""
    monkeypatch.setattr("shard.worker.feed.AHEAD_BYTES", 1)
    keys = [f"k{n:04}" for n in range(400)]
    for n in range(0, 400, 5):
        await shard.accept(*keys[n : n + 5])

    def opened() -> float:
        return float(metrics.CONNECTS.labels(SHARD, "open")._value.get())

    before = opened()
    async with running_feed(shard, aggregator.settings) as feed:
        sieve = feed.feed._sieve
        sieve._held_bytes_max = 20_000
        await shard.accept("later")
        await aggregator.holds(*keys, "later")
        assert feed.seen_keys == [*keys, "later"]
        assert not sieve.dropped
        assert opened() == before + 1, "the slot was read once"
        slots = await shard.connection.fetch("select slot_name from pg_replication_slots")
        assert [slot["slot_name"] for slot in slots] == ["oncepay_feed"], "the slot to look ahead with is gone"


@pytest.mark.parametrize("error", [None, OutcomeUnknown("no standby")])
async def test_a_barrier_that_another_node_acknowledged_or_none_proves_nothing_ahead(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr("shard.worker.feed.AHEAD_BYTES", 1)
    monkeypatch.setattr("shard.worker.ahead.AHEAD_S", 0.5)
    honest, asked = shard.barrier, []

    async def elsewhere(nonce: str) -> None:
        asked.append(nonce)
        if error is not None:
            raise error
        await honest(f"on another node: {nonce}")

    monkeypatch.setattr(shard, "barrier", elsewhere)
    await shard.accept("stale")
    async with running_feed(shard, aggregator.settings) as feed:
        await eventually(lambda: len(asked) >= 2, "the one ahead was given up, and the feed's own was tried")
        await asyncio.sleep(0.3)  # nothing happens: there is no event to wait for
        assert feed.seen_keys == []
        assert feed.feed._sieve.certain_lsn == 0
        assert await aggregator.keys() == set()
        feed.feed._barrier = honest
        await aggregator.holds("stale")


async def test_a_batch_whose_answer_was_lost_is_not_applied_twice(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("a")
        await aggregator.holds("a")
        lost = feed.forwarder._call
        lose = [True]

        async def call(method: str, url: str, body: bytes | None) -> bytes:
            answer = await lost(method, url, body)
            if method == "POST" and lose.pop():
                from shard.worker.errors import FeedDown

                lose.append(False)
                raise FeedDown("the answer was lost")
            lose[:] = [False]
            return answer

        feed.forwarder._call = call  # type: ignore[method-assign]
        await shard.accept("b")
        await shard.accept("c")
        await aggregator.holds("b", "c")
        await eventually(lambda: feed.forwarder.problem is None, "it went on")


async def test_a_slot_that_jumped_ahead_stops_the_feed_and_says_so(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    async with running_feed(shard, aggregator.settings):
        await shard.accept("a")
        await aggregator.holds("a")
    await shard.accept("lost")
    watermark = await aggregator.watermark()
    assert watermark is not None

    async def advanced() -> bool:
        try:
            await shard.connection.execute("select pg_replication_slot_advance('oncepay_feed', pg_current_wal_lsn())")
        except asyncpg.ObjectInUseError:
            return False
        return True

    await eventually(advanced, "the slot was free to be moved")
    jumped = await shard.confirmed_lsn()
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("after")
        await eventually(lambda: isinstance(feed.forwarder.problem, FeedHalted), "the feed halted")
        text = str(feed.forwarder.problem)
        assert f"the slot at {lsn_text(jumped)} jumped ahead of the aggregator at {lsn_text(watermark)}" in text
        assert "oncepay shards resnapshot" in text
        await eventually(lambda: "after" in feed.seen_keys, "the cache goes on")
        assert await aggregator.keys() == {"a"}
        assert await shard.confirmed_lsn() == jumped


async def test_another_history_stops_the_feed(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    async with running_feed(shard, aggregator.settings):
        await shard.accept("a")
        await aggregator.holds("a")
    await shard.connection.execute("update oncepay.identity set incarnation = 'restored'")
    async with running_feed(shard, aggregator.settings) as feed:
        await eventually(lambda: "history" in str(feed.forwarder.problem), "the feed halted")
        assert isinstance(feed.forwarder.problem, FeedHalted)


async def test_a_worker_that_starts_beside_an_aggregator_that_lost_everything_stops_its_feed(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    """The shard remembers that there was something. A feed that began where the slot stands would miss all before it."""
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("a")
        await aggregator.holds("a")
        await eventually(feed.keeping.done, "the shard knows that its feed was applied")
    assert await shard.is_fed()
    confirmed = await shard.confirmed_lsn()
    assert aggregator.connection is not None
    await empty(aggregator.connection)
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("after")
        await eventually(lambda: isinstance(feed.forwarder.problem, FeedHalted), "the feed halted")
        text = str(feed.forwarder.problem)
        assert text == "the aggregator has lost what it had applied: run `oncepay shards resnapshot`"
        await eventually(lambda: "after" in feed.seen_keys, "the cache goes on")
        assert await aggregator.keys() == set()
        assert await shard.confirmed_lsn() == confirmed


async def test_a_shard_that_can_not_keep_that_its_feed_was_applied_is_asked_again(
    shard: ShardDatabase, aggregator: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard.worker.forward.KEEP_AGAIN_S", 0.05)
    shard.keep_error = OutcomeUnknown("no standby")
    async with running_feed(shard, aggregator.settings) as feed:
        assert not await shard.is_fed()
        await shard.accept("a")
        await aggregator.holds("a")
        await shard.accept("b")
        await aggregator.holds("b")
        assert not feed.keeping.done()
        assert not await shard.is_fed()
        shard.keep_error = None
        await eventually(shard.is_fed, "the shard knows")


async def test_only_the_active_worker_says_that_the_feed_was_applied(shard: ShardDatabase) -> None:
    epoch = int(await shard.connection.fetchval("select oncepay.take_epoch('worker')"))
    with pytest.raises(asyncpg.PostgresError, match="is over"):
        await shard.keep_fed(epoch - 1)
    assert not await shard.is_fed()
    await shard.keep_fed(epoch)
    assert await shard.is_fed()


async def test_changes_that_come_again_are_dropped_by_the_watermark(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """After a failover the slot may stand far behind: here a copy of it from before takes its place."""
    await shard.connection.execute("select pg_copy_logical_replication_slot('oncepay_feed', 'behind')")
    async with running_feed(shard, aggregator.settings):
        await shard.accept("a", "b")
        await aggregator.holds("a", "b")
    await eventually(lambda: _swap_slots(shard), "the slot was free to be replaced")
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("c")
        await aggregator.holds("c")
        assert feed.seen_keys == ["a", "b", "c"]
        assert feed.forwarder.problem is None


async def _swap_slots(shard: ShardDatabase) -> bool:
    try:
        await shard.connection.execute("select pg_drop_replication_slot('oncepay_feed')")
    except asyncpg.ObjectInUseError:
        return False
    await shard.connection.execute("select pg_copy_logical_replication_slot('behind', 'oncepay_feed')")
    await shard.connection.execute("select pg_drop_replication_slot('behind')")
    return True


async def test_a_worker_whose_epoch_is_over_stands_down(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """The new one takes the slot from the old one's walsender, which may be frozen; the old one never gets it back."""
    async with running_feed(shard, aggregator.settings) as old:
        await shard.accept("a")
        await aggregator.holds("a")
        async with running_feed(shard, aggregator.settings) as new:
            await shard.accept("b")
            await aggregator.holds("b")
            await eventually(lambda: any(task.done() for task in old.tasks), "the old one ended")
            error = next(task.exception() for task in old.tasks if task.done())
            assert isinstance(error, StandDown)
            await shard.accept("c")
            await aggregator.holds("c")
            assert new.feed.problem is None


async def test_a_large_unchanged_value_is_absent_and_kept(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """A toasted `terms` isn't sent again by an update that leaves it alone."""
    import random

    noise = "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=6000))
    payment = new_payment("large", description=noise)
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.put(Put(payment, 0, "accepted"))
        import msgspec

        from oncepay.payment import Status

        await shard.put(Put(msgspec.structs.replace(payment, status=Status.CANCELED, version=2), 1, "canceled"))
        await eventually(lambda: len(feed.seen_keys) == 2, "both came")
        first, second = (row for transaction in feed.seen for row in transaction.payments)
        assert noise in (first.terms or "")
        assert second.terms is None
        assert second.version == 2
        await aggregator.holds("large")


async def test_how_far_behind_at_200_payments_a_second(shard: ShardDatabase, aggregator: RunningAggregator) -> None:
    """The aggregator is under 500 ms behind at p99, with four commits a payment."""
    async with running_feed(shard, aggregator.settings) as feed:
        await shard.accept("warm")
        await aggregator.holds("warm")
        behind_s: list[float] = []
        moved = feed.forwarder._move_to

        def measured(watermark: int) -> None:
            now_ms = time.time() * 1000
            for transaction in feed.forwarder._queue:
                if transaction.end_lsn <= watermark:
                    behind_s.append((now_ms - transaction.committed_at_ms) / 1000)
            moved(watermark)

        feed.forwarder._move_to = measured  # type: ignore[method-assign]
        began_s = time.monotonic()
        for n in range(60):
            await shard.accept(*(f"p{n}-{i}" for i in range(10)))
            await asyncio.sleep(max(0.0, began_s + (n + 1) * 0.05 - time.monotonic()))
        await aggregator.holds("p59-9")
        behind_s.sort()
        assert len(behind_s) >= 60
        p99_s = behind_s[int(len(behind_s) * 0.99)]
        print(f"behind: p50 {behind_s[len(behind_s) // 2]:.3f} s, p99 {p99_s:.3f} s, barriers {shard.barriers}")
        assert p99_s < 0.5


@pytest.mark.faults
async def test_the_feed_goes_on_though_a_row_comes_in_the_moment_in_which_its_connection_ends(
    shard: ShardDatabase, aggregator: RunningAggregator
) -> None:
    """The barriers of that connection are canceled then. A cancel that gets lost leaves the feed standing for ever."""
    async with running_feed(shard, aggregator.settings) as running:
        await shard.accept("a")
        await aggregator.holds("a")
        feed = running.feed
        for steps in range(10):  # rounds of the loop from the connection's end until the cancel: the row comes in each of them
            await eventually(lambda: feed._stream is not None and bool(feed._wanted._waiters), "the feed reads, and waits")
            stream = feed._stream
            assert stream is not None
            stream.connection.close()
            for _ in range(steps):
                await asyncio.sleep(0)
            feed._wanted.set()
            await eventually(lambda ended=stream: feed._stream not in (None, ended), "the feed reads again")
        await shard.accept("b")
        await aggregator.holds("a", "b")
