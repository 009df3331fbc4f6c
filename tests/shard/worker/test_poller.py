"""The breaker, the lists, and what the poller does with what it finds; the database and Stripe are in test_worker.py."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from oncepay.breaker import Breaker
from oncepay.budget import BudgetShort
from oncepay.errors import StripeUnavailable, WrongState
from oncepay.keys import slot
from oncepay.payment import Charge, IntentView, Key, Payment, Status
from oncepay.settings import PollSettings
from oncepay.stripe_client import StripeRefused, StripeStored
from oncepay.stripe_objects import ErrorObject, IntentList, IntentObject
from shard.store.batch import EpochOver
from shard.worker.bulk import BULK_MIN, CHANGED_MAX, SINGLE_AT, Bulk, decide
from shard.worker.cache import Pending, PendingCache
from shard.worker.errors import StandDown
from shard.worker.poller import PATIENT_MAX, Poller
from tests.shard.worker.harness import new_payment
from tests.shard.worker.test_cache import Clock

FAR_S = 10**10


def pending(status: Status, tries: int = 1, key: str = "k") -> Pending:
    return Pending(Key(key), status, 3, tries, FAR_S)


def test_the_breaker_opens_probes_and_closes() -> None:
    clock = Clock()
    breaker = Breaker(3, clock)
    for _ in range(2):
        breaker.failure()
    breaker.success()
    for _ in range(2):
        breaker.failure()
    assert breaker.allowance(10) == 10
    breaker.failure()
    assert breaker.open
    assert breaker.allowance(10) == 0
    clock.now_s += 1.1
    assert breaker.allowance(10) == 1
    breaker.probing()
    assert breaker.allowance(10) == 0
    breaker.failure()
    clock.now_s += 1.1
    assert breaker.allowance(10) == 0, "the pause has doubled"
    clock.now_s += 1.1
    assert breaker.allowance(10) == 1
    breaker.probing()
    breaker.unanswered()
    assert breaker.allowance(10) == 1
    breaker.probing()
    breaker.success()
    assert not breaker.open
    assert breaker.allowance(10) == 10


def view(status: str, *, fee: int = -1) -> IntentView:
    charge = Charge("ch", "succeeded", "txn" if fee >= 0 else "", fee) if status == "succeeded" else None
    return IntentView("pi", status, charge=charge)


@pytest.mark.parametrize(
    ("status", "tries", "seen", "decision"),
    [
        (Status.PROCESSING, 1, view("processing"), "unchanged"),
        (Status.CONFIRMING, 1, view("processing"), "apply"),
        (Status.CANCELING, 1, view("processing"), "unchanged"),
        (Status.PROCESSING, 1, view("succeeded"), "apply"),
        (Status.SUCCEEDED, 1, view("succeeded"), "unchanged"),
        (Status.SUCCEEDED, 1, view("succeeded", fee=30), "apply"),
        (Status.CANCELING, 1, view("canceled"), "apply"),
        (Status.REQUIRES_ACTION, 0, view("requires_action"), "unchanged"),
        (Status.CONFIRMING, 0, view("requires_action"), "apply"),
        (Status.CANCELING, 0, view("requires_action"), "drive"),
        (Status.CONFIRMING, 0, view("requires_payment_method"), "drive"),
        (Status.CONFIRMING, 5, view("requires_confirmation"), "drive"),
        (Status.ATTEMPTED, 0, view("requires_payment_method"), "drive"),
        (Status.ATTEMPTED, 1, view("requires_payment_method"), "unchanged"),
        (Status.REQUIRES_PAYMENT_METHOD, 0, view("requires_payment_method"), "drive"),
        (Status.REQUIRES_PAYMENT_METHOD, 1, view("requires_payment_method"), "unchanged"),
        (Status.PROCESSING, 1, view("requires_payment_method"), "drive"),
        (Status.REQUIRES_CAPTURE, 0, view("requires_capture"), "drive"),
        (Status.REQUIRES_CAPTURE, 1, view("requires_capture"), "unchanged"),
    ],
)
def test_what_a_listed_view_means(status: Status, tries: int, seen: IntentView, decision: str) -> None:
    assert decide(pending(status, tries), seen) == decision


class Lists:
    """Stripe's list over given intents, newest first, 100 a page, counting calls."""

    def __init__(self) -> None:
        self.intents_made: list[IntentObject] = []
        self.calls = 0
        self.down = False
        self.refused = False

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList:
        self.calls += 1
        if self.down:
            raise StripeUnavailable("down")
        if self.refused:
            raise StripeRefused(ErrorObject("invalid_request_error", message="no such list"))
        upper = FAR_S if created_lte is None else created_lte
        found = [i for i in reversed(self.intents_made) if created_gte <= i.created <= upper]
        start = next((n + 1 for n, i in enumerate(found) if i.id == starting_after), 0)
        return IntentList(found[start : start + 100], has_more=len(found) > start + 100)

    def intent(self, key: str, status: str, created_s: float) -> None:
        number = len(self.intents_made)
        self.intents_made.append(IntentObject(f"pi_{number}", status, created=int(created_s), metadata={"oncepay_key": key}))


def bulk_for(lists: Lists, clock: Clock, keys: list[str], status: str = "processing") -> tuple[Bulk, PendingCache]:
    cache = PendingCache(PollSettings(), clock)
    for key in keys:
        cache.put(key, status, 3, True, FAR_S)
    return Bulk(lists, cache, "s0", 5.0, clock), cache


async def test_one_list_call_answers_a_hundred() -> None:
    clock, lists = Clock(10_000), Lists()
    keys = [f"k{n}" for n in range(100)]
    bulk, cache = bulk_for(lists, clock, keys)
    for n, key in enumerate(keys):
        lists.intent(key, "succeeded" if n % 2 else "processing", clock.now_s)
    clock.now_s += 7
    result = await bulk.sort(cache.take_due(1_000))
    assert lists.calls == 1
    assert (len(result.apply), len(result.unchanged), len(result.left)) == (50, 50, 0)


async def test_few_are_asked_for_singly_and_hopeless_pages_are_not_read() -> None:
    clock, lists = Clock(10_000), Lists()
    bulk, cache = bulk_for(lists, clock, ["a", "b"])
    clock.now_s += 7
    assert len((await bulk.sort(cache.take_due(10))).left) == 2
    assert lists.calls == 0
    keys = [f"k{n}" for n in range(20)]
    bulk, cache = bulk_for(lists, clock, keys)
    for n in range(1_000):
        lists.intent(f"others{n}", "succeeded", clock.now_s)
    clock.now_s += 7
    assert len((await bulk.sort(cache.take_due(100))).left) == 20
    assert lists.calls == 1


async def test_events_tell_which_old_ones_have_not_changed() -> None:
    clock, lists = Clock(10_000), Lists()
    keys = [f"k{n}" for n in range(20)]
    bulk, _ = bulk_for(lists, clock, keys)
    old = [pending(Status.PROCESSING, 9, key) for key in keys]
    bulk.handed(9_000, 9_990, [])
    clock.now_s += 600
    bulk.handed(9_990, clock.now_s - 10, [Key("k3"), Key("not ours")])
    result = await bulk.sort(old)
    assert [p.key for p in result.left] == ["k3"]
    assert len(result.unchanged) == 19
    assert lists.calls == 0, "the events cost this shard no call"
    assert not (await bulk.sort(old)).left, "what was looked at has no event any more"


@pytest.mark.parametrize("status", [Status.CONFIRMING, Status.CANCELING, Status.SUCCEEDED])
async def test_what_is_to_be_done_here_is_in_no_event(status: Status) -> None:
    """A confirm that Stripe never got: nothing happens there, so nothing tells of it, and the payment must be driven on."""
    clock, lists = Clock(10_000), Lists()
    bulk, _ = bulk_for(lists, clock, ["k"])
    bulk.handed(9_000, 9_990, [])
    clock.now_s += 600
    bulk.handed(9_990, clock.now_s - 10, [])
    for tries in (3, 9, 40):
        result = await bulk.sort([pending(status, tries, "k")])
        assert [each.key for each in result.left] == ["k"]


async def test_ten_thousand_of_which_one_in_a_hundred_changed_cost_a_hundred_calls() -> None:
    """Beside the reader's page or two of events for all shards: under 150 calls for 10,000 pending payments."""
    clock, lists = Clock(10_000), Lists()
    keys = [f"k{n}" for n in range(10_000)]
    bulk, _ = bulk_for(lists, clock, keys)
    old = [pending(Status.PROCESSING, 9, key) for key in keys]
    bulk.handed(9_000, 9_990, [])
    clock.now_s += 600
    bulk.handed(9_990, clock.now_s - 10, [Key(key) for key in keys[::100]])
    result = await bulk.sort(old)
    assert (len(result.left), len(result.unchanged), lists.calls) == (100, 9_900, 0)


async def test_without_all_events_each_is_asked_for_singly() -> None:
    """A gap in what was handed over, or a reader that has stopped, tells nothing of who has not changed."""
    clock, lists = Clock(10_000), Lists()
    keys = [f"k{n}" for n in range(20)]
    bulk, _ = bulk_for(lists, clock, keys)
    old = [pending(Status.PROCESSING, 9, key) for key in keys]
    assert len((await bulk.sort(old)).left) == 20, "nothing was handed over yet"
    bulk.handed(9_000, 9_990, [])
    clock.now_s += 600
    bulk.handed(clock.now_s - 20, clock.now_s - 10, [])
    assert len((await bulk.sort(old)).left) == 20, "ten minutes are missing"
    clock.now_s += 600
    bulk.handed(clock.now_s - 620, clock.now_s - 10, [])
    assert not (await bulk.sort(old)).left
    clock.now_s += 60
    assert len((await bulk.sort(old)).left) == 20, "the reader has stopped"


def test_an_event_hurries_a_look_but_not_that_of_a_young_payment() -> None:
    clock = Clock(10_000)
    cache = PendingCache(PollSettings(), clock)
    cache.put("young", "processing", 3, True, FAR_S)
    cache.put("old", "processing", 3, True, FAR_S)
    clock.now_s += 7
    cache.take_due(10)
    cache.put("young", "processing", 4, True, FAR_S)
    assert cache.hurry("old")
    assert not cache.hurry("young")
    assert not cache.hurry("settled")
    clock.now_s += 2
    assert [item.key for item in cache.take_due(10)] == ["old"]


class Rows:
    """A store and a driver over rows in memory, noting what was asked of them."""

    def __init__(self, *payments: Payment) -> None:
        self.rows = {payment.key: payment for payment in payments}
        self.calls: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.called = asyncio.Event()

    def _note(self, what: str, key: str) -> None:
        self.calls.append((what, key))
        self.called.set()
        if self.error is not None:
            raise self.error

    async def get(self, key: str) -> Payment | None:
        return self.rows.get(Key(key))

    async def drive(self, payment: Payment) -> Payment:
        self._note("drive", payment.key)
        return payment

    async def drive_on(self, key: str) -> Payment | None:
        self._note("drive_on", key)
        return self.rows.get(Key(key))

    async def see(self, payment: Payment, view: IntentView, event: str) -> Payment:
        self._note("see", payment.key)
        return payment


def soon(*keys: str, status: str = "processing", expires_s: float = FAR_S) -> PendingCache:
    """A cache whose payments are due at once."""
    clock = Clock(time.time() - 100)
    cache = PendingCache(PollSettings(first_s=1.0, max_s=2.0), clock)
    for key in keys:
        cache.put(key, status, 1, True, expires_s)
    cache._now = time.time
    return cache


async def until_called(poller: Poller, rows: Rows, count: int) -> None:
    task = asyncio.create_task(poller.run())
    try:
        async with asyncio.timeout(10):
            while len(rows.calls) < count:
                rows.called.clear()
                await rows.called.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_due_is_driven_on() -> None:
    rows = Rows(new_payment("a"), new_payment("b", status=Status.PROCESSING))
    cache = soon("a", "b")
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 1.0), lambda _: True)
    await until_called(poller, rows, 2)
    assert set(rows.calls[:2]) == {("drive_on", "a"), ("drive_on", "b")}


async def test_listed_views_are_applied_to_the_row_as_it_is() -> None:
    keys = [f"k{n}" for n in range(10)]
    rows = Rows(*(new_payment(key, status=Status.PROCESSING) for key in keys))
    rows.rows[Key("k9")] = msgspec.structs.replace(rows.rows[Key("k9")], version=7, status=Status.REQUIRES_ACTION)
    lists, cache = Lists(), soon(*keys)
    for n, key in enumerate(keys):
        lists.intent(key, "succeeded" if n < 5 else "requires_action", time.time() - 3)
    poller = Poller("s0", cache, rows, rows, Bulk(lists, cache, "s0", 1.0), lambda _: True)
    await until_called(poller, rows, 18)
    first = rows.calls[:18]
    assert {key for what, key in first if what == "see"} == set(keys) - {"k9"}, "k9 moved on after the list was read"


async def test_a_moved_payment_is_dropped() -> None:
    rows = Rows(new_payment("mine", status=Status.PROCESSING))
    cache = soon("mine", "moved")
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 1.0), lambda at: at == slot("mine"))
    await until_called(poller, rows, 1)
    assert rows.calls == [("drive_on", "mine")]
    assert "moved" not in cache


async def test_the_circuit_opens_and_one_probe_goes_at_a_time() -> None:
    rows = Rows(*(new_payment(f"k{n}", status=Status.PROCESSING) for n in range(7)))
    rows.error = StripeUnavailable("down")
    cache = soon(*rows.rows)
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 1.0), lambda _: True)
    await until_called(poller, rows, 8)
    assert poller.breaker.open
    assert len(rows.calls) == 8, "seven that were due, then one probe"


async def test_the_poller_ends_when_the_epoch_is_over() -> None:
    rows = Rows(new_payment("a", status=Status.PROCESSING))
    rows.error = EpochOver("epoch 3 is over")
    cache = soon("a")
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 1.0), lambda _: True)
    with pytest.raises(StandDown):
        await asyncio.wait_for(poller.run(), 10)


async def test_whatever_goes_wrong_with_one_it_is_due_again() -> None:
    rows = Rows(new_payment("a", status=Status.PROCESSING))
    rows.error = RuntimeError("a defect")
    cache = soon("a")
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 1.0), lambda _: True)
    await until_called(poller, rows, 2)
    assert "a" in cache


async def test_when_a_list_is_refused_each_is_asked_for_singly() -> None:
    """A clear no to a call that a worker makes again and again must not end the worker, nor hold anything back."""
    keys = [f"k{n}" for n in range(BULK_MIN + 2)]
    rows, lists, cache = Rows(*(new_payment(key, status=Status.PROCESSING) for key in keys)), Lists(), soon(*keys)
    lists.refused = True
    poller = Poller("s0", cache, rows, rows, Bulk(lists, cache, "s0", 1.0), lambda _: True)
    for _ in range(4):
        poller.breaker.failure()
    await until_called(poller, rows, len(keys))
    assert lists.calls
    assert sorted(rows.calls[: len(keys)]) == sorted(("drive_on", key) for key in keys)
    assert not poller.breaker.open


LONG_S = 3 * PollSettings().max_s
"""After so long the next look is due, whichever it is."""


def looked_at_often(lists: Lists, clock: Clock, *keys: str) -> tuple[Bulk, PendingCache]:
    """Payments that were looked at so often that only an event brings a single look."""
    bulk, cache = bulk_for(lists, clock, list(keys))
    for _ in range(max(SINGLE_AT) + 1):
        clock.now_s += LONG_S
        assert len(cache.take_due(10)) == len(keys)
    bulk.handed(0, clock.now_s, [])
    return bulk, cache


@pytest.mark.parametrize(
    "error", [StripeUnavailable("down"), BudgetShort("no turn"), StripeStored("500"), WrongState("moved"), RuntimeError("ours")]
)
async def test_an_event_is_not_forgotten_with_a_look_that_failed(error: Exception) -> None:
    clock, rows = Clock(10_000), Rows(new_payment("a", status=Status.PROCESSING), new_payment("b", status=Status.PROCESSING))
    bulk, cache = looked_at_often(Lists(), clock, "a", "b")
    poller = Poller("s0", cache, rows, rows, bulk, lambda _: True)
    clock.now_s += LONG_S
    bulk.handed(clock.now_s - LONG_S, clock.now_s, [Key("a")])
    rows.error = error
    await until_called(poller, rows, 1)
    clock.now_s += LONG_S
    bulk.handed(clock.now_s - LONG_S, clock.now_s, [])
    rows.error = None
    await until_called(poller, rows, 2)
    assert rows.calls == [("drive_on", "a")] * 2
    clock.now_s += LONG_S
    bulk.handed(clock.now_s - LONG_S, clock.now_s, [])
    assert not (await bulk.sort(cache.take_due(10))).left, "it was answered"


async def test_who_waits_behind_a_probe_is_asked_for_singly_later() -> None:
    """Its look is counted, and events that were missed before it would not be asked about any more."""
    clock, rows = Clock(10_000), Rows(new_payment("a", status=Status.PROCESSING), new_payment("b", status=Status.PROCESSING))
    bulk, cache = looked_at_often(Lists(), clock, "a", "b")
    poller = Poller("s0", cache, rows, rows, bulk, lambda _: True)
    poller.breaker = Breaker(1, clock)
    poller.breaker.failure()
    for key in ("a", "b"):
        cache.hurry(key)
    clock.now_s += LONG_S
    await until_called(poller, rows, 1)
    assert not poller.breaker.open
    [(_, probed)] = rows.calls
    clock.now_s += LONG_S
    bulk.handed(clock.now_s - LONG_S, clock.now_s, [])
    assert {probed, *(pending.key for pending in (await bulk.sort(cache.take_due(10))).left)} == {"a", "b"}


def test_of_what_had_events_and_is_settled_nothing_is_kept() -> None:
    clock = Clock(10_000)
    keys = [f"k{n}" for n in range(CHANGED_MAX + 1)]
    bulk, cache = bulk_for(Lists(), clock, keys)
    for key in keys[1:]:
        bulk.unsure(Key(key))
        cache.put(key, "succeeded", 4, False, FAR_S)
    bulk.unsure(Key("settled long ago"))
    bulk.handed(9_000, 9_990, [Key(keys[0])])
    assert bulk._changed == {keys[0]}


@pytest.mark.parametrize("status", ["requires_capture", "requires_payment_method"])
async def test_what_was_left_behind_is_driven_on_until_a_look_is_answered(status: str) -> None:
    """A capture was accepted, or a payment is to be given up, and its router died: at Stripe nothing tells of it."""
    clock, lists, poll = Clock(10_000), Lists(), PollSettings(first_s=5.0, max_s=20.0)
    keys = [f"k{n}" for n in range(BULK_MIN)]
    rows, cache = Rows(*(new_payment(key, status=Status(status)) for key in keys)), PendingCache(poll, clock)
    for key in keys:
        cache.put(key, status, 3, True, FAR_S)
        lists.intent(key, status, clock.now_s)
    bulk = Bulk(lists, cache, "s0", poll.first_s, clock)
    poller = Poller("s0", cache, rows, rows, bulk, lambda _: True)
    rows.error = WrongState("not now")
    clock.now_s += 7
    await until_called(poller, rows, BULK_MIN)
    rows.error = None
    clock.now_s += 25
    await until_called(poller, rows, 2 * BULK_MIN)
    assert sorted(rows.calls) == sorted([("drive_on", key) for key in keys] * 2)
    assert lists.calls == 2


async def test_a_look_that_is_due_during_another_is_made_up_for() -> None:
    """The one under way may have read the row before it changed, and what changed may be no event."""
    clock, lists = Clock(10_000), Lists()
    rows = Rows(new_payment("a", status=Status.REQUIRES_CAPTURE))
    bulk, cache = bulk_for(lists, clock, ["a"], "requires_capture")
    go = asyncio.Event()

    async def slow(key: str) -> Payment | None:
        rows._note("drive_on", key)
        await go.wait()
        return rows.rows[Key(key)]

    rows.drive_on = slow  # type: ignore[method-assign]
    poller = Poller("s0", cache, rows, rows, bulk, lambda _: True)
    clock.now_s += 7
    task = asyncio.create_task(poller.run())
    try:
        await asyncio.wait_for(rows.called.wait(), 10)
        cache.put("a", "requires_capture", 4, True, FAR_S)
        clock.now_s += 7
        async with asyncio.timeout(10):
            while (known := cache.get("a")) is None or not known.tries:
                await asyncio.sleep(0.01)  # the poller tells of nothing that it leaves out
        assert Key("a") in bulk._changed
        assert rows.calls == [("drive_on", "a")]
    finally:
        go.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_has_to_be_driven_on_goes_before_thousands_that_wait() -> None:
    """Carts that nobody pays: a worker that takes over has them all due at once, and meanwhile a router dies."""
    clock, lists = Clock(10_000), Lists()
    carts = [f"cart{n}" for n in range(2_000)]
    rows = Rows(*(new_payment(key, status=Status.ATTEMPTED) for key in carts), new_payment("left", status=Status.CONFIRMING))
    cache = PendingCache(PollSettings(), clock)
    for key in carts:
        cache.put(key, "attempted", 3, True, FAR_S, 1)
    one_more = asyncio.Semaphore(0)

    async def slow(key: str) -> Payment | None:
        rows._note("drive_on", key)
        await one_more.acquire()
        return rows.rows[Key(key)]

    rows.drive_on = slow  # type: ignore[method-assign]
    poller = Poller("s0", cache, rows, rows, Bulk(lists, cache, "s0", 2.0, clock), lambda _: True)
    clock.now_s += 7
    task = asyncio.create_task(poller.run())
    try:
        async with asyncio.timeout(10):
            while len(rows.calls) < PATIENT_MAX:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(rows.calls) == PATIENT_MAX, "some places are kept for others"
        cache.put("left", "confirming", 3, True, FAR_S)
        clock.now_s += 7
        async with asyncio.timeout(10):
            while ("drive_on", "left") not in rows.calls:
                await asyncio.sleep(0.01)
        assert len(rows.calls) == PATIENT_MAX + 1
        for _ in carts:
            one_more.release()
        async with asyncio.timeout(20):
            while len(rows.calls) <= len(carts):
                await asyncio.sleep(0.01)
        assert sorted(key for _, key in rows.calls) == sorted([*carts, "left"]), "each once"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_waits_and_has_an_event_goes_first() -> None:
    clock, lists = Clock(10_000), Lists()
    carts = [f"cart{n}" for n in range(100)]
    rows = Rows(*(new_payment(key, status=Status.ATTEMPTED) for key in carts))
    cache = PendingCache(PollSettings(), clock)
    for key in carts:
        cache.put(key, "attempted", 3, True, FAR_S, 1)
    bulk = Bulk(lists, cache, "s0", 2.0, clock)

    async def never(key: str) -> Payment | None:
        rows._note("drive_on", key)
        await asyncio.Event().wait()
        return None

    rows.drive_on = never  # type: ignore[method-assign]
    poller = Poller("s0", cache, rows, rows, bulk, lambda _: True)
    clock.now_s += 7
    task = asyncio.create_task(poller.run())
    try:
        async with asyncio.timeout(10):
            while len(rows.calls) < PATIENT_MAX:
                await asyncio.sleep(0.01)
        [paid, *_] = {*carts} - {key for _, key in rows.calls}
        bulk.unsure(Key(paid))
        assert cache.hurry(paid)
        clock.now_s += 2
        async with asyncio.timeout(10):
            while len(rows.calls) == PATIENT_MAX:
                await asyncio.sleep(0.01)
        assert rows.calls[PATIENT_MAX:] == [("drive_on", paid)]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def lined_up(payments: int, status: Status = Status.ATTEMPTED) -> tuple[Poller, PendingCache, Clock]:
    """A poller whose places are taken, and that many of `status` wait in the second line."""
    clock, keys = Clock(10_000), [f"k{n}" for n in range(payments)]
    rows, cache = Rows(*(new_payment(key, status=status) for key in keys)), PendingCache(PollSettings(), clock)
    for key in keys:
        cache.put(key, status.value, 3, True, FAR_S, 1)
    poller = Poller("s0", cache, rows, rows, Bulk(Lists(), cache, "s0", 2.0, clock), lambda _: True)
    poller._patient = PATIENT_MAX
    clock.now_s += 7
    await poller._look_after(cache.take_due(payments))
    return poller, cache, clock


async def test_a_look_at_what_has_changed_replaces_one_that_still_waits() -> None:
    """The old one is left out when it is its turn, and the new one must not have been left out before."""
    poller, cache, clock = await lined_up(1)
    cache.put("k0", "attempted", 4, True, FAR_S, 1)
    clock.now_s += 7
    await poller._look_after(cache.take_due(1))
    assert poller._waiting[Key("k0")].pending.version == 4
    poller._patient = 0
    poller._start_some()
    assert list(poller._tasks) == ["k0"]
    await asyncio.gather(*poller._tasks.values())


async def test_the_second_line_stays_while_stripe_is_down() -> None:
    """Or all of it would come back in the first one."""
    poller, _, _ = await lined_up(50)
    for _ in range(5):
        poller.breaker.failure()
    assert poller.breaker.open
    poller._patient = 0
    poller._start_some()
    assert len(poller._waiting) == 50
    assert not any(poller._bulk.is_unsure(Key(f"k{n}")) for n in range(50))
    poller.breaker.success()
    poller._start_some()
    assert len(poller._tasks) == PATIENT_MAX
    for _ in range(20):
        await asyncio.gather(*poller._tasks.values())
        await asyncio.sleep(0)
    assert not poller._waiting
