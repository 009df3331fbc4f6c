"""The keys that this process may issue: ranges of indexes that it persisted as its own, and keys made ready from them."""

from __future__ import annotations

from collections import deque

from keygen.aside import Aside
from keygen.turns import Turns
from oncepay.keys import MacSecrets, issue, slot


class Range:
    """Indexes `next` to `end - 1` of the block with `seed`: this process's alone, by a watermark in etcd."""

    __slots__ = ("end", "next", "seed")

    def __init__(self, seed: bytes, first: int, end: int) -> None:
        assert 0 <= first <= end
        self.seed = seed
        self.next = first
        self.end = end


class Reserve:
    """Ranges in the order in which they came, keys that wait for their turn, and keys that are ready. Each index leaves it once.

    No I/O and no clock here. Keys are made ahead by `make_ready`, so that a request finds its keys made, and by `make_wait`, so
    that those of one turn follow one another.
    """

    def __init__(self) -> None:
        self._ranges: deque[Range] = deque()
        self._ready: list[str] = []
        self._aside = Aside()
        self._turns = Turns()
        self._left = 0

    @property
    def ready(self) -> int:
        """How many keys are made."""
        return len(self._ready)

    @property
    def aside(self) -> int:
        """How many keys are made that a search for other slots left over."""
        return len(self._aside)

    @property
    def waiting(self) -> int:
        """How many keys are made that wait for their turn."""
        return len(self._turns)

    @property
    def left(self) -> int:
        """How many keys are not made yet."""
        return self._left

    @property
    def available(self) -> int:
        """How many keys can be issued without etcd."""
        return len(self._ready) + len(self._aside) + len(self._turns) + self._left

    def add(self, seed: bytes, first: int, end: int) -> None:
        """Take in indexes `first` to `end - 1`, persisted as this process's own and never added before."""
        if end > first:
            self._ranges.append(Range(seed, first, end))
            self._left += end - first

    def take(self, count: int, secrets: MacSecrets) -> list[str]:
        """The next `count` keys. The caller has made sure that so many are available."""
        assert 0 < count <= self.available
        ready = self._ready
        if count == 1 and ready:
            return [ready.pop()]
        keys = ready[-count:]
        del ready[-count:]
        if len(keys) < count:
            keys += self._more(count - len(keys), secrets)
        return keys

    def make_ready(self, count: int, secrets: MacSecrets) -> None:
        """Make up to `count` keys more ready."""
        count = min(count, self.available - len(self._ready))
        if count > 0:
            # The oldest leave first: they are taken from the end.
            self._ready[:0] = reversed(self._more(count, secrets))

    def make_wait(self, count: int, secrets: MacSecrets) -> None:
        """Make up to `count` keys more that wait for their turn."""
        self._turns.add(self._make(min(count, self._left), secrets))

    def give_up_waiting(self) -> None:
        """Nobody gets the keys that wait for their turn: they were made with a secret that is no longer to be used."""
        self._turns.clear()

    # Keys of some slots

    def take_aside(self, first: int, last: int, count: int) -> list[str]:
        """Up to `count` keys of the slots `first` to `last` from those that earlier searches left over."""
        return self._aside.take_in(first, last, count)

    def search(self, first: int, last: int, count: int, made: int, secrets: MacSecrets) -> list[str]:
        """Make up to `made` keys: up to `count` of the slots `first` to `last`, and all others are put aside."""
        found: list[str] = []
        for key in self._make(min(made, self._left), secrets):
            its_slot = slot(key)
            if first <= its_slot <= last and len(found) < count:
                found.append(key)
            else:
                self._aside.add(key, its_slot)
        return found

    def put_aside(self, keys: list[str]) -> None:
        """Take back keys that were not given out after all."""
        self._aside.put(keys)

    def _more(self, count: int, secrets: MacSecrets) -> list[str]:
        keys = self._aside.take(count)
        if len(keys) < count:
            keys += self._turns.take(count - len(keys))
        return keys + self._make(count - len(keys), secrets) if len(keys) < count else keys

    def _make(self, count: int, secrets: MacSecrets) -> list[str]:
        keys: list[str] = []
        number = secrets.current
        secret = secrets.secrets[number]
        while len(keys) < count:
            current = self._ranges[0]
            first = current.next
            step = min(count - len(keys), current.end - first)
            current.next += step
            self._left -= step
            keys += issue(current.seed, first, step, number, secret)
            if current.next == current.end:
                self._ranges.popleft()
        return keys
