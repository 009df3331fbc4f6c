"""What the sieve lets through: checked against a simulated shard that fails over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from oncepay.feed import LinkRow
from shard.worker.sieve import Sieve
from shard.worker.transactions import Transaction


def transaction(lsn: int, *nonces: str, rows: int = 1) -> Transaction:
    links = [LinkRow(lsn, 0, 0, f"k{lsn}", "e", "t", 0)] * rows
    return Transaction(lsn, lsn, [], [], links, list(nonces), 100)


def test_free_only_when_acknowledged_and_seen() -> None:
    sieve = Sieve()
    sieve.connected(1)
    assert sieve.add(transaction(10)) == []
    sieve.begun("n")
    assert sieve.add(transaction(20)) == []
    assert sieve.acknowledged("n") == []
    freed = sieve.add(transaction(30, "n", rows=0))
    assert [t.end_lsn for t in freed] == [10, 20, 30]
    assert sieve.certain_lsn == 30
    assert not sieve.waits


def test_seen_before_acknowledged() -> None:
    sieve = Sieve()
    sieve.connected(1)
    sieve.begun("n")
    sieve.add(transaction(10))
    assert sieve.add(transaction(20, "n")) == []
    assert sieve.add(transaction(30)) == []
    assert [t.end_lsn for t in sieve.acknowledged("n")] == [10, 20]
    assert sieve.held_rows == 1


def test_an_older_nonce_and_a_failed_barrier_free_nothing() -> None:
    sieve = Sieve()
    sieve.connected(1)
    sieve.begun("old")
    sieve.begun("new")
    assert sieve.acknowledged("old") == []
    assert sieve.add(transaction(10, "old")) == []
    sieve.failed("new")
    assert sieve.acknowledged("new") == []
    assert sieve.add(transaction(20, "new")) == []
    assert sieve.certain_lsn == 0


def test_a_nonce_of_the_connection_before_frees_nothing() -> None:
    """The commit was acknowledged, but this stream is another one: its nonce counts only when it is begun anew."""
    sieve = Sieve()
    sieve.connected(1)
    sieve.begun("n")
    sieve.connected(2)
    assert sieve.acknowledged("n") == []
    assert sieve.add(transaction(10, "n")) == []


def test_what_was_certain_stays_so_on_a_later_timeline_only() -> None:
    sieve = Sieve()
    sieve.connected(2)
    sieve.begun("n")
    sieve.acknowledged("n")
    sieve.add(transaction(10, "n"))
    sieve.connected(3)
    assert sieve.add(transaction(5)) != []
    sieve.connected(1)
    assert sieve.add(transaction(5)) == []


def test_what_another_stream_proved_passes_and_nothing_behind_it() -> None:
    sieve = Sieve(held_bytes_max=250)
    sieve.connected(2)
    sieve.proved(40)
    assert [sieve.add(transaction(lsn)) != [] for lsn in (10, 20, 30, 40, 50)] == [True] * 4 + [False]
    sieve.connected(1)
    assert sieve.add(transaction(10)) == [], "the node was deposed before"


def test_too_much_is_let_go_of_and_nothing_behind_it_passes() -> None:
    sieve = Sieve(held_bytes_max=250)
    sieve.connected(1)
    for lsn in (10, 20, 30):
        sieve.add(transaction(lsn))
    assert sieve.dropped
    sieve.begun("n")
    sieve.acknowledged("n")
    assert sieve.add(transaction(40, "n")) == []
    assert sieve.certain_lsn == 40
    sieve.connected(1)
    assert [sieve.add(transaction(lsn)) != [] for lsn in (10, 20, 30, 40)] == [True] * 4
    assert sieve.add(transaction(50)) == []


class Failovers(RuleBasedStateMachine):
    """A shard whose log may lose its end at a failover, down to what the quorum has, and a reader of it.

    The quorum's part grows by replication alone; a barrier is acknowledged only when the quorum has it. Whatever the
    sieve frees must never be lost, and must come in the order of the log with nothing left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sieve = Sieve(held_bytes_max=350)
        self.log: list[Transaction] = []
        self.quorum = 0
        self.timeline = 1
        self.next_lsn = 10
        self.read = 0
        self.freed: list[int] = []
        self.pending = ""
        self.nonces = 0
        self.sieve.connected(1)

    def _take(self, transactions: list[Transaction]) -> None:
        for item in transactions:
            if not self.freed or item.end_lsn > self.freed[-1]:
                self.freed.append(item.end_lsn)

    def _append(self, *nonces: str) -> None:
        self.log.append(transaction(self.next_lsn, *nonces))
        self.next_lsn += 10

    @rule(count=st.integers(1, 6))
    def commit(self, count: int) -> None:
        for _ in range(count):
            self._append()

    @rule(part=st.sampled_from([0.3, 1.0, 1.0]))
    def replicate(self, part: float) -> None:
        self.quorum += round((len(self.log) - self.quorum) * part)

    @rule(count=st.integers(0, 4))
    def commit_and_make_certain(self, count: int) -> None:
        """What usually happens, in one step."""
        for _ in range(count):
            self._append()
        self.begin_barrier()
        self.quorum = len(self.log)
        self.stream(len(self.log))
        self.acknowledge()

    @rule()
    def begin_barrier(self) -> None:
        self.nonces += 1
        self.pending = f"n{self.nonces}"
        self.sieve.begun(self.pending)
        self._append(self.pending)

    @precondition(lambda self: any(self.pending in t.nonces for t in self.log[: self.quorum]))
    @rule()
    def acknowledge(self) -> None:
        self._take(self.sieve.acknowledged(self.pending))

    @rule(count=st.integers(1, 8))
    def stream(self, count: int) -> None:
        for item in self.log[self.read : self.read + count]:
            self._take(self.sieve.add(item))
            self.read += 1

    @rule(lag=st.integers(0, 5))
    def reconnect(self, lag: int) -> None:
        """From wherever the slot is: at or before what was taken."""
        self.read = max(0, sum(t.end_lsn <= (self.freed[-1] if self.freed else 0) for t in self.log) - lag)
        self.sieve.connected(self.timeline)

    @rule(lag=st.integers(0, 5))
    def reconnect_to_a_backlog(self, lag: int) -> None:
        """A barrier at the log's end is seen in another stream of the node before the slot's own is read."""
        self.reconnect(lag)
        self._append("ahead")
        self.quorum = len(self.log)
        self.sieve.proved(self.log[-1].end_lsn)

    @rule()
    def fail_over(self) -> None:
        """The new leader has what the quorum had; positions go on from there, so they come again with other content."""
        del self.log[self.quorum :]
        self.next_lsn = self.log[-1].end_lsn + 5 if self.log else 5
        self.timeline += 1
        self.pending = ""
        self.reconnect(lag=3)

    @invariant()
    def nothing_freed_can_be_lost(self) -> None:
        assert self.freed == [t.end_lsn for t in self.log[: len(self.freed)]]
        assert len(self.freed) <= self.quorum


TestFailovers = Failovers.TestCase
TestFailovers.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_rows_held_are_counted(rows: list[int]) -> None:
    sieve = Sieve()
    sieve.connected(1)
    for n, count in enumerate(rows):
        sieve.add(transaction(n + 1, rows=count))
    assert sieve.held_rows == sum(rows)
    sieve.begun("n")
    sieve.acknowledged("n")
    sieve.add(transaction(100, "n", rows=0))
    assert sieve.held_rows == 0
    assert sieve.oldest_ms is None
