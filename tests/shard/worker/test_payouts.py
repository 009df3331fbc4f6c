"""The payouts' desk against the stand-in for Tipalti: whatever is lost, refused or doubled, each payout is one payment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from oncepay.errors import OncepayError
from oncepay.payout import OVER, Payout, PayoutStatus, new_payout
from oncepay.payout_moves import is_final, move
from oncepay.settings import PayoutSettings, TipaltiSettings
from oncepay.tipalti_client import TipaltiClient, TipaltiUnavailable
from shard.store.batch import EpochOver
from shard.store.payouts import Change, StalePayout
from shard.worker.payout_cache import PayoutCache, PendingPayout
from shard.worker.payouts import SEND_WITHIN_S, PayoutDesk
from tests.sandbox.process import StandIn

SETTINGS = PayoutSettings(poll_first_s=10.0, poll_max_s=1_000.0)


@dataclass
class Rows:
    """The store's rules in memory: compared by version, events through `move`."""

    rows: dict[str, Payout] = field(default_factory=dict)
    entries: list[tuple[str, str]] = field(default_factory=list)
    before_commit: Callable[[str], None] = lambda event: None

    async def get_many(self, keys: Sequence[str]) -> dict[str, Payout]:
        return {key: self.rows[key] for key in keys if key in self.rows}

    async def apply_many(self, changes: Sequence[Change], *, event: str) -> list[Payout | Exception]:
        self.before_commit(event)
        return [self._apply(change) for change in changes]

    def _apply(self, change: Change) -> Payout | Exception:
        row = self.rows[change.payout.key]
        if row.version != change.payout.version and not all(is_final(event) for event in change.events):
            return StalePayout(row)
        after = row
        try:
            for event in change.events:
                moved = move(after, event)
                after = moved.payout
                self.entries += [(row.key, entry.entry_id) for entry in moved.entries]
        except OncepayError as error:
            return error
        if after is not row:
            after = replace(after, version=row.version + 1)
        self.rows[row.key] = after
        return after


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    made = StandIn("tipalti").start()
    yield made
    made.stop()


@pytest.fixture
async def tipalti(stand_in: StandIn) -> AsyncIterator[TipaltiClient]:
    async with TipaltiClient(TipaltiSettings(base_url=stand_in.url, refresh_token="rt_test_1")) as opened:
        yield opened
    stand_in.faults()


class Desk:
    """A desk with the payouts that it looks after."""

    def __init__(self, stand_in: StandIn, tipalti: TipaltiClient) -> None:
        self.stand_in = stand_in
        self.tipalti = tipalti
        self.store = Rows()
        self.desk = PayoutDesk("s0", PayoutCache(SETTINGS), self.store, tipalti, lambda slot: True)

    async def add(self, seller: str, *, payee: bool = True, needs_approval: bool = False) -> str:
        if payee:
            await self.tipalti.create_payee(seller)
            self.stand_in.control("POST", "payee", {"payee": seller, "payable": True})
        made = new_payout(
            seller, "usd", 1, amount=1_000, payee=seller, run="r", created_by="ann", positions={}, needs_approval=needs_approval,
            now_ms=1,
        )  # fmt: skip
        self.store.rows[made.key] = made
        return made.key

    async def look(self) -> None:
        """One round over everything."""
        rows = list(self.store.rows.values())
        await self.desk.look_after([PendingPayout(row.key, row.status, row.version, 0.0) for row in rows])

    def status(self, key: str) -> str:
        return self.store.rows[key].status.value

    async def payments(self, key: str) -> int:
        return len(await self.tipalti.payments([self.store.rows[key].ref_code]))


@pytest.fixture
def desk(stand_in: StandIn, tipalti: TipaltiClient) -> Desk:
    return Desk(stand_in, tipalti)


async def test_a_payout_goes_to_tipalti_once_and_follows_it(desk: Desk) -> None:
    key, waits = await desk.add("w-1"), await desk.add("w-2", needs_approval=True)
    calls = desk.stand_in.control("GET", "counts")["totals"].get("POST /payment-batches", 0)
    await desk.look()
    assert desk.status(key) in ("submitted", "scheduled")
    assert desk.status(waits) == "awaiting_approval"
    assert await desk.payments(waits) == 0
    for _ in range(3):
        await desk.look()
    assert desk.stand_in.control("GET", "counts")["totals"]["POST /payment-batches"] == calls + 1
    for seconds in (2.1, 2.1, 3_601.0):
        desk.stand_in.advance(seconds)
        await desk.look()
    async for _ in _until(lambda: desk.status(key) == "cleared"):
        await desk.look()
    assert [entry for name, entry in desk.store.entries if name == key] == ["payout_fee:100"]


async def _until(condition: Callable[[], bool]) -> AsyncIterator[None]:
    """Again and again until it holds: the stand-in's timers fire within a step of its loop."""
    for _ in range(200):
        if condition():
            return
        yield
    raise AssertionError("it never held")


async def test_a_lost_answer_is_looked_up_and_never_sent_under_another_code(desk: Desk) -> None:
    key = await desk.add("w-lost")
    desk.stand_in.faults(lost_answer=1)
    with pytest.raises(TipaltiUnavailable):
        await desk.look()
    assert desk.status(key) == "submitting"
    desk.stand_in.faults()
    await desk.look()
    assert desk.status(key) in ("submitted", "scheduled")
    assert desk.store.rows[key].progress.sends == 1, "it was found, and not sent again"
    assert await desk.payments(key) == 1


async def test_what_never_arrived_is_sent_again_under_its_own_code(desk: Desk) -> None:
    key = await desk.add("w-never")
    desk.stand_in.faults(error_before=1)
    with pytest.raises(TipaltiUnavailable):
        await desk.look()
    desk.stand_in.faults()
    await desk.look()
    assert desk.status(key) in ("submitted", "scheduled")
    assert desk.store.rows[key].progress.sends == 2
    assert await desk.payments(key) == 1


async def test_a_worker_that_died_before_it_sent_leaves_it_to_the_next(desk: Desk) -> None:
    key = await desk.add("w-died")

    class Died(Exception):
        pass

    async def die(payouts: Sequence[Payout]) -> dict[str, object]:
        raise Died

    desk.desk._send = die  # type: ignore[assignment, method-assign]
    with pytest.raises(Died):
        await desk.look()
    assert (desk.status(key), await desk.payments(key)) == ("submitting", 0)
    other = PayoutDesk("s0", PayoutCache(SETTINGS), desk.store, desk.tipalti, lambda slot: True)
    await other.look_after([PendingPayout(key, PayoutStatus.SUBMITTING, 2, 0.0)])
    assert await desk.payments(key) == 1


async def test_one_that_was_sent_already_is_found_and_not_paid_again(desk: Desk) -> None:
    """A row that came back from a backup as it was before: its code is the same, so Tipalti says that it knows it."""
    key = await desk.add("w-restored")
    old = desk.store.rows[key]
    await desk.look()
    desk.store.rows[key] = old
    await desk.look()
    assert desk.status(key) in ("submitted", "scheduled")
    assert await desk.payments(key) == 1


async def test_a_line_that_is_refused_fails_alone_and_is_booked_back(desk: Desk) -> None:
    fine, unknown = await desk.add("w-fine"), await desk.add("w-unknown", payee=False)
    await desk.look()
    assert desk.status(fine) in ("submitted", "scheduled")
    assert desk.status(unknown) == "refused"
    assert desk.store.entries == [(unknown, "payout_returned")]
    assert "UnknownPayee" in desk.store.rows[unknown].progress.reason
    await desk.look()
    assert desk.store.entries == [(unknown, "payout_returned")]


async def test_an_unpayable_payee_is_deferred_and_booked_back(desk: Desk) -> None:
    key = await desk.add("w-late")
    desk.stand_in.control("POST", "payee", {"payee": "w-late", "payable": False})
    await desk.look()
    assert (desk.status(key), desk.store.entries) == ("deferred", [(key, "payout_returned")])


async def test_a_frozen_worker_looks_before_it_sends(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await desk.add("w-frozen")
    now_s = [0.0]
    monkeypatch.setattr("shard.worker.payouts.time.monotonic", lambda: now_s[0])

    def freeze(event: str) -> None:
        now_s[0] += SEND_WITHIN_S + 1

    desk.store.before_commit = freeze
    await desk.look()
    assert (desk.status(key), await desk.payments(key)) == ("submitting", 0)


async def test_the_desk_ends_with_its_epoch(desk: Desk) -> None:
    await desk.add("w-epoch")

    def over(event: str) -> None:
        raise EpochOver("epoch 1 is over")

    desk.store.before_commit = over
    with pytest.raises(EpochOver):
        await desk.look()


states = st.tuples(st.sampled_from(sorted(PayoutStatus)), st.integers(1, 6))


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), states), max_size=20))
def test_the_cache_holds_what_is_open_in_its_highest_version(changes: list[tuple[str, tuple[str, int]]]) -> None:
    cache = PayoutCache(SETTINGS, now=lambda: 1_000.0)
    cache.begin_fill()
    highest: dict[str, tuple[int, str]] = {}
    for key, (status, version) in changes:
        if key not in highest or highest[key][0] < version:
            highest[key] = version, status
        cache.put(key, status, version, PayoutStatus(status) not in OVER)
    held = {pending.key: (pending.version, pending.status.value) for pending in cache}
    assert held == {key: state for key, state in highest.items() if PayoutStatus(state[1]) not in OVER}


def test_looks_grow_apart_and_a_new_payout_is_due_at_once() -> None:
    now_s = [1_000.0]
    cache = PayoutCache(SETTINGS, now=lambda: now_s[0])
    cache.put("a", "created", 1, True)
    cache.put("b", "submitted", 2, True)
    assert [pending.key for pending in cache.take_due(10)] == ["a"]
    now_s[0] += SETTINGS.poll_first_s * 1.3
    assert "b" in [pending.key for pending in cache.take_due(10)]
    gaps = []
    for _ in range(9):
        due_s = next(pending for pending in cache if pending.key == "b").due_s
        gaps.append(due_s - now_s[0])
        now_s[0] = due_s
        cache.take_due(10)
    assert gaps[-1] > 10 * gaps[0]
    assert max(gaps) <= SETTINGS.poll_max_s * 1.2
    cache.put("b", "cleared", 3, False)
    assert cache.get("b") is None
    cache.forget("a")
    assert len(cache) == 0
