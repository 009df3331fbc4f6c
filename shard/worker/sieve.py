"""What of the stream may be forwarded: only what no failover can erase.

The rule: a position is certain when it is not past a barrier of our own whose commit was acknowledged with evidence *and*
whose nonce came back in a stream. A log is sequential, so a log that holds the barrier holds exactly what the quorum
holds before it; and a nonce is written once, so whichever node's stream shows it has that log.
"""

from __future__ import annotations

from collections import deque

from shard.worker.transactions import Transaction

HELD_BYTES_MAX = 64 << 20
"""Transactions held back beyond this are let go of, to be read again once the barrier behind them is certain."""


class Sieve:
    """Holds transactions back until they are certain. Pure: told of transactions and barriers, it returns what is free.

    What became certain stays so in the next connection, when that one's timeline is the same or a later one: a leader
    that was elected after the barrier has it. With an older timeline the node was deposed before, and nothing is free.
    """

    def __init__(self, held_bytes_max: int = HELD_BYTES_MAX) -> None:
        self.certain_lsn = 0
        self.dropped = False
        """Whether transactions were let go of in this connection: what follows them can't be forwarded."""
        self.held_rows = 0
        self.foreign = 0
        """Transactions of others that came after the last certain barrier."""
        self.certain_timeline = 0
        self._timeline = 0
        self._held: deque[Transaction] = deque()
        self._held_bytes = 0
        self._held_bytes_max = held_bytes_max
        self._nonce = ""
        self._acknowledged = False
        self._seen_lsn = 0

    def connected(self, timeline: int) -> None:
        """A new connection: what the one before held is gone, and so is its barrier."""
        self._timeline = timeline
        self._let_go()
        self.dropped = False
        self._nonce = ""

    def proved(self, lsn: int) -> None:
        """Another stream, of this connection's node and timeline, has shown a barrier that ends at `lsn`, and its commit was
        acknowledged with evidence. Only before anything of this connection was added."""
        assert not self._held
        if lsn > self.certain_lsn:
            self.certain_lsn, self.certain_timeline = lsn, self._timeline

    @property
    def waits(self) -> bool:
        """Whether a barrier was begun and is not certain yet."""
        return bool(self._nonce)

    def begun(self, nonce: str) -> None:
        """A barrier with `nonce` is about to be committed; the one before it, if any, is given up."""
        self._nonce, self._acknowledged, self._seen_lsn = nonce, False, 0

    @property
    def oldest_ms(self) -> int | None:
        """When the oldest transaction that is held back was committed."""
        return self._held[0].committed_at_ms if self._held else None

    def failed(self, nonce: str) -> None:
        """The barrier's outcome is unknown: it proves nothing."""
        if nonce == self._nonce:
            self._nonce = ""

    def acknowledged(self, nonce: str) -> list[Transaction]:
        """The barrier's commit was acknowledged with evidence. Returns what is certain now."""
        if nonce != self._nonce:
            return []
        self._acknowledged = True
        return self._release()

    def add(self, transaction: Transaction) -> list[Transaction]:
        """A transaction came in the stream. Returns what is certain now, in commit order."""
        if transaction.end_lsn <= self.certain_lsn and self._timeline >= self.certain_timeline and not self.dropped:
            return [transaction]
        self._held.append(transaction)
        self._held_bytes += transaction.size_bytes
        self.held_rows += transaction.rows
        if self._nonce and self._nonce in transaction.nonces:
            self._seen_lsn = transaction.end_lsn
            return self._release()
        self.foreign += 1
        if self._held_bytes > self._held_bytes_max:
            self._let_go()
            self.dropped = True
        return []

    def _release(self) -> list[Transaction]:
        if not (self._acknowledged and self._seen_lsn):
            return []
        self.certain_lsn, self.certain_timeline = self._seen_lsn, self._timeline
        self._nonce = ""
        free: list[Transaction] = []
        while self._held and self._held[0].end_lsn <= self.certain_lsn:
            transaction = self._held.popleft()
            self._held_bytes -= transaction.size_bytes
            self.held_rows -= transaction.rows
            free.append(transaction)
        self.foreign = len(self._held)
        return [] if self.dropped else free

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = self.held_rows = self.foreign = 0
