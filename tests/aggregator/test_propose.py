"""What a run pays out of a balance, and that no seller is paid twice or too much, however runs and feeds are late."""

from __future__ import annotations

import datetime as dt
from typing import Any, NamedTuple, NoReturn, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.propose import REASONS, Held, Owed, payable, proposed
from aggregator.runs import Runs, sums_of_inquiries
from aggregator.schedule import Schedule, parse_schedule
from oncepay.cart import Item, Share
from oncepay.errors import SettingsError, ShardUnavailable
from oncepay.payment import Dispute, Key, Payment, Progress, Status, Terms
from oncepay.payout import GIVEN_BACK, PaymentView, Payout, PayoutStatus
from oncepay.payout_hold import PayoutsHeld
from oncepay.payout_moves import PaymentSeen, SubmissionStarted, move
from oncepay.settings import PayoutSettings
from shard.store.payouts import PayoutStore

SETTINGS = PayoutSettings(minimum_minor={"usd": 100}, approval_above_minor={"usd": 10_000})
NONE: dict[tuple[str, str], int] = {}


def owed(balance: int, *, pending: int = 0, sequence: int = 0, held: bool = True) -> Owed:
    return Owed("ann", "usd", balance, pending, sequence, held)


def reason(found: int | Held) -> str:
    assert isinstance(found, Held)
    assert found.reason in REASONS
    return found.reason


def test_what_is_paid_and_what_is_held() -> None:
    assert payable(owed(500), NONE, SETTINGS) == 500
    assert payable(owed(500, pending=300), NONE, SETTINGS) == 200
    assert payable(owed(500, pending=300), {("ann", "usd"): 50, ("bob", "usd"): 500}, SETTINGS) == 150
    assert reason(payable(owed(99), NONE, SETTINGS)) == "minimum"
    assert payable(Owed("ann", "eur", 1, 0, 0, True), NONE, SETTINGS) == 1
    assert payable(Owed("ann", "isk", 97_450, 0, 0, True), NONE, SETTINGS) == 97_400, "a bank takes no fraction of a króna"
    assert reason(payable(Owed("ann", "isk", 50, 0, 0, True), NONE, SETTINGS)) == "minimum"
    assert reason(payable(owed(500, pending=500), NONE, SETTINGS)) == "pending"
    assert reason(payable(owed(500, pending=300), {("ann", "usd"): 900}, SETTINGS)) == "pending"
    assert reason(payable(owed(500, sequence=3, held=False), NONE, SETTINGS)) == "behind"


def test_a_large_payout_waits_for_a_second_operator() -> None:
    def status(amount: int) -> PayoutStatus:
        return proposed(
            owed(amount, sequence=4), amount, "p", SETTINGS, run="r", created_by="ann", positions={"s0": "0/1"}, now_ms=1
        ).status

    assert status(10_000) is PayoutStatus.CREATED
    assert status(10_001) is PayoutStatus.AWAITING_APPROVAL


class Snapshot(NamedTuple):
    """What a run has read of the aggregator: the seller's balance, its last payout that is in it, and one missing before that."""

    balance: int
    sequence: int
    missing: int


class Books:
    """One seller's shard rows, in the order of their commits, and an aggregator that has applied the first `applied` of them.

    The rules are those of the real parts: a sequence is inserted once; the aggregator applies commits in order, a payout's
    row together with its entry; what a run pays is `payable` and `proposed` of what it has read, whenever that was.
    """

    def __init__(self) -> None:
        self.commits: list[tuple[int, int]] = []
        """(change of what the seller is owed, the payout that this commit made or 0)."""
        self.payouts: dict[int, Payout] = {}
        self.applied = 0
        self.snapshots: list[Snapshot] = []
        self.earned = 0

    def earn(self, amount: int) -> None:
        self.earned += amount
        self.commits.append((amount, 0))

    def feed(self, part: float) -> None:
        """The feed brings some of what is missing."""
        self.applied += round((len(self.commits) - self.applied) * part)

    def read(self) -> None:
        """A run reads its snapshot; it may be used much later."""
        applied = self.commits[: self.applied]
        made = {n for _, n in applied if n}
        last = max(made, default=0)
        missing = min(set(range(1, last)) - made, default=0)
        self.snapshots.append(Snapshot(sum(change for change, _ in applied), last, missing))

    def run(self, which: int) -> None:
        """A run commits what it has computed from one of the snapshots that were ever taken."""
        if not self.snapshots:
            return
        snapshot = self.snapshots[which % len(self.snapshots)]
        item = owed(snapshot.balance, sequence=snapshot.sequence)._replace(missing=snapshot.missing)
        amount = payable(item, NONE, SETTINGS)
        if isinstance(amount, int):
            payout = proposed(item, amount, "p", SETTINGS, run="r", created_by="schedule", positions={}, now_ms=1)
            if payout.sequence not in self.payouts:
                self.payouts[payout.sequence] = payout
                self.commits.append((-payout.amount, payout.sequence))

    def tipalti(self, which: int, word: str) -> None:
        """Tipalti says something of one of the payouts, or says it again."""
        if not self.payouts:
            return
        number = sorted(self.payouts)[which % len(self.payouts)]
        payout = self.payouts[number]
        if payout.status is PayoutStatus.CREATED:
            payout = move(payout, SubmissionStarted(2)).payout
        if payout.over or payout.status is PayoutStatus.AWAITING_APPROVAL:
            return
        view = PaymentView(f"pay_{number}", payout.ref_code, word, payout.amount, "usd")
        moved = move(payout, PaymentSeen(view))
        self.payouts[number] = moved.payout
        for entry in moved.entries:
            back = -sum(p.amount_minor for p in entry.postings if p.account == "seller:ann:payable")
            self.commits.append((back, 0))

    def restore(self, sequence: int) -> None:
        """A payout's shard is restored to a moment before it, and what is derived of the shard is rebuilt."""
        del self.payouts[sequence]
        self.commits = [(change, made) for change, made in self.commits if made != sequence]
        self.applied = len(self.commits)
        self.snapshots.clear()

    @property
    def taken(self) -> int:
        """What left the seller's balance for good, or is on its way."""
        return sum(payout.amount for payout in self.payouts.values() if payout.status not in GIVEN_BACK)


steps = st.one_of(
    st.tuples(st.just("earn"), st.integers(1, 5_000)),
    st.tuples(st.just("feed"), st.sampled_from([0.3, 0.6, 1.0])),
    st.tuples(st.just("read"), st.none()),
    st.tuples(st.just("run"), st.integers(0, 20)),
    st.tuples(st.just("tipalti"), st.tuples(st.integers(0, 5), st.sampled_from(["Paid", "Cleared", "Rejected", "Deferred"]))),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=60))
def test_no_seller_is_ever_paid_more_than_was_earned(history: list[tuple[str, object]]) -> None:
    books = Books()
    for name, argument in history:
        if name == "read":
            books.read()
        elif name == "tipalti":
            assert isinstance(argument, tuple)
            books.tipalti(*argument)
        else:
            getattr(books, name)(argument)
        assert books.taken <= books.earned
        assert books.earned - books.taken == sum(change for change, _ in books.commits)
    assert sorted(books.payouts) == list(range(1, len(books.payouts) + 1)), "no sequence is left out"


@settings(max_examples=100)
@given(st.lists(st.integers(100, 5_000), min_size=1, max_size=5), st.lists(st.sampled_from(["Cleared", "Rejected"]), max_size=6))
def test_in_the_end_everything_is_paid_once(earnings: list[int], words: list[str]) -> None:
    books = Books()
    for amount in earnings:
        books.earn(amount)
    for word in [*words, "Cleared"]:
        books.feed(1.0)
        books.read()
        books.run(len(books.snapshots) - 1)
        books.tipalti(len(books.payouts) - 1, word)
    waiting = [p for p in books.payouts.values() if p.status is PayoutStatus.AWAITING_APPROVAL]
    assert books.taken == books.earned
    assert len(waiting) <= 1


def test_without_the_sequence_rule_the_model_would_pay_twice() -> None:
    """The history that the rule is for: two runs from the same balance, the second after the first was committed."""
    books = Books()
    books.earn(1_000)
    books.feed(1.0)
    books.read()
    books.read()
    books.run(0)
    books.run(1)
    assert books.taken == 1_000
    next_sequence = proposed(owed(1_000, sequence=1), 1_000, "p", SETTINGS, run="r", created_by="s", positions={}, now_ms=1)
    assert next_sequence.sequence not in books.payouts, "a sequence that is not of the last payout held would have been free"


def test_a_payout_that_a_restore_lost_is_made_again_under_its_own_code() -> None:
    """Tipalti has paid it, and knows the code. Under the next sequence its amount would be paid once more."""
    books = Books()
    codes: list[str] = []
    for amount in (1_000, 2_000):
        books.earn(amount)
        books.feed(1.0)
        books.read()
        books.run(-1)
        codes.append(books.payouts[len(codes) + 1].ref_code)
        books.tipalti(len(codes) - 1, "Cleared")
    books.restore(1)
    for _ in range(2):
        books.feed(1.0)
        books.read()
        books.run(-1)
    assert sorted(books.payouts) == [1, 2]
    assert [books.payouts[1].ref_code, books.payouts[1].amount] == [codes[0], 1_000]


def disputed(*disputes: Dispute, refunded: int = 0) -> Payment:
    shares = (Share("ann", 3_000, 300), Share("bob", 1_000, 100))
    terms = Terms(tuple(Item(share.seller, share.gross) for share in shares), shares, "v")
    return Payment(
        Key("k"), Status.SUCCEEDED, 3, "b", "usd", 4_000, terms, b"f", 1, 1, 2, intent="pi_1", amount_captured=4_000,
        progress=Progress(disputes=disputes, stripe_fee=1),
    )  # fmt: skip


def test_an_inquiry_holds_its_amount_by_the_sellers_shares() -> None:
    inquiry = Dispute("du_1", "warning_needs_response", 2_000)
    assert sums_of_inquiries([disputed(inquiry)]) == {("ann", "usd"): 1_500, ("bob", "usd"): 500}
    over = [Dispute("du_2", "warning_closed", 2_000), Dispute("du_3", "lost", 2_000, booked=("txn_1",))]
    withdrawn = Dispute("du_4", "needs_response", 2_000, booked=("txn_2",))
    assert sums_of_inquiries([disputed(*over, withdrawn)]) == {}
    assert sums_of_inquiries([disputed(inquiry), disputed(inquiry)])["ann", "usd"] == 3_000


async def test_a_run_that_is_held_reads_and_makes_nothing() -> None:
    async def held() -> None:
        raise PayoutsHeld("s9: 1 refunds are missing")

    nothing: Any = None
    runs = Runs(nothing, nothing, nothing, nothing, SETTINGS, held)
    with pytest.raises(PayoutsHeld, match="refunds"):
        await runs.run("ann")


async def test_inquiries_are_read_before_the_positions() -> None:
    """One that takes the money in between is then held and deducted; the other way round it would be neither."""
    read: list[str] = []

    class Rows:
        async def disputed(self) -> list[Payment]:
            read.append("inquiries")
            return []

        async def moments(self) -> NoReturn:
            read.append("positions")
            raise ShardUnavailable("s0")

    nothing: Any = None
    runs = Runs(nothing, nothing, cast("PayoutStore", Rows()), nothing, SETTINGS)
    with pytest.raises(ShardUnavailable):
        await runs.run("ann")
    assert read == ["inquiries", "positions"]


@pytest.mark.parametrize(
    ("text", "now", "due"),
    [
        ("daily 02:30", "2026-03-04T02:29:59", "2026-03-03T02:30:00"),
        ("daily 02:30", "2026-03-04T02:30:00", "2026-03-04T02:30:00"),
        ("monday 00:00", "2026-03-04T12:00:00", "2026-03-02T00:00:00"),
        ("Wednesday 13:00", "2026-03-04T12:00:00", "2026-02-25T13:00:00"),
    ],
)
def test_what_is_due(text: str, now: str, due: str) -> None:
    schedule = parse_schedule(text)
    assert schedule is not None
    assert schedule.last_due(dt.datetime.fromisoformat(f"{now}+00:00")) == dt.datetime.fromisoformat(f"{due}+00:00")


@given(
    st.builds(Schedule, st.one_of(st.none(), st.integers(0, 6)), st.integers(0, 23), st.integers(0, 59)),
    st.datetimes(dt.datetime(2020, 1, 1), dt.datetime(2040, 1, 1), timezones=st.just(dt.UTC)),
)
def test_a_due_moment_is_the_last_one(schedule: Schedule, now: dt.datetime) -> None:
    due = schedule.last_due(now)
    gap = dt.timedelta(days=1 if schedule.weekday is None else 7)
    assert due <= now < due + gap
    assert (due.hour, due.minute, due.second) == (schedule.hour, schedule.minute, 0)
    assert schedule.weekday in (None, due.weekday())


def test_schedules_that_are_none() -> None:
    assert parse_schedule("") is None
    for text in ("hourly", "daily", "daily 24:00", "daily 2:30", "someday 02:30", "daily 02:60"):
        with pytest.raises(SettingsError):
            parse_schedule(text)
