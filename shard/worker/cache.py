"""The pending cache: every payment of the shard with open work, in memory, ordered by when it is looked at next.

Filled once from the table, then kept by the change feed alone. Compact: payments with the same state and the same moment
of their next look share a bucket, and the issued keys' 36 characters are kept as 27 bytes. What is due stands in three lines, so
that payments that only wait, however many they are, are in the way of none that has to be driven on.
"""

from __future__ import annotations

import heapq
import sys
import time
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import random

import msgspec

from oncepay.feed import PaymentRow
from oncepay.keys import ISSUED_CHARACTERS, ISSUED_PREFIX, slot
from oncepay.payment import WAITING, Key, Status
from oncepay.payment_text import waits_in
from oncepay.settings import PollSettings

JITTER = 0.2
"""Looks are spread by this part of their distance, so that what came together doesn't stay together."""
COARSE_S = 5
"""Looks that are further away than a minute are rounded up to this many seconds: fewer, fuller buckets."""
TURN_S = 0.1
"""What changes within so long of each other is looked at first in the same second; then it is spread."""
PARTS_MAX = 8
"""What is due together is spread over so many moments: the next time each of these parts is."""
LOADED_MAX = 256
"""So many payments of the table that wait, with the same state, are looked at first in the same second."""
OVERDUE_S = 60
"""So often what had to wait for longer than that is looked through for payments whose time is over meanwhile."""
STALE_MIN = 256
"""At least so many keys of a bucket are looked through at once: most may have left it."""
TRIES_MAX = 63
FAR_S, FAR_GRAIN_S = 21_600, 900
"""Payments whose time is over later than that are kept with it to a quarter of an hour."""

AHEAD, OVER, WAITS = range(3)
"""The lines. In the first is what may have to be driven on, and what something has happened to; in the second what waits for
others and may be past its time; in the third what only waits."""
LINES = (AHEAD, OVER, WAITS)
UNBOUNDED = (sys.maxsize,) * len(LINES)
NOT_GIVEN_UP = frozenset({Status.PROCESSING, Status.REQUIRES_CAPTURE, Status.CANCELING, Status.SUCCEEDED})
"""In these the payment's time being over changes nothing."""

_COUNT = len(Status)
_STATUSES = tuple(Status) * 3
_CALLED, _RESTING = _COUNT, 2 * _COUNT
"""Added to a status's number where the payment only waits: something has happened to it, so that it goes ahead; nothing has."""
_CODES: dict[str, int] = {status.value: code for code, status in enumerate(Status)}
"""A status as a small number: hashing an enum's member costs more than all else here."""
_RESTING_CODES: dict[str, int] = {value: _RESTING + code for value, code in _CODES.items()}
_PATIENT = frozenset(status.value for status in (*WAITING, Status.ATTEMPTED))
_PATIENT_CODES = frozenset(_CODES[value] for value in _PATIENT)
_GIVEN_UP_CODES = frozenset(_RESTING_CODES[status.value] for status in Status if status not in NOT_GIVEN_UP)

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_+/=", b"+/!!!")
_PACKED_BYTES = ISSUED_CHARACTERS * 3 // 4
_PACKED = a2b_base64(ISSUED_PREFIX.encode().translate(_FROM_URL))
"""What every packed key begins with: the prefix is base64 too. No text in UTF-8 begins so."""
_PREFIX_LENGTH = len(ISSUED_PREFIX)
assert _PREFIX_LENGTH % 4 == 0
assert 0x80 <= _PACKED[0] < 0xC0


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A payment with open work. `tries`: looks since its last change. `expires_s` is rounded down, so "maybe past". It was taken
    from `line`, `late_s` after it was due."""

    key: Key
    status: Status
    version: int
    tries: int
    expires_s: int
    line: int = AHEAD
    late_s: int = 0


class _Bucket:
    """Payments in the same state that are looked at in the same second."""

    __slots__ = ("due_s", "expires_s", "keys", "status", "tries", "version")

    def __init__(self, due_s: int, status: int, version: int, tries: int, expires_s: float) -> None:
        self.due_s = due_s
        self.status = status
        self.version = version
        self.tries = tries
        self.expires_s = int(expires_s)
        self.keys: list[bytes] = []


_State = tuple[int, int, int, float]
"""Status (with what is added to it), version, tries, when the payment is over."""


class _Line:
    """Buckets by moment and state, and the moments in order."""

    __slots__ = ("buckets", "moments")

    def __init__(self) -> None:
        self.buckets: dict[int, dict[_State, _Bucket]] = {}
        self.moments: list[int] = []

    def at(self, due: int) -> dict[_State, _Bucket]:
        """The buckets of a moment, by their state."""
        buckets = self.buckets.get(due)
        if buckets is None:
            buckets = self.buckets[due] = {}
            heapq.heappush(self.moments, due)
        return buckets


class PendingCache:
    """Not for threads. `now` is the clock in seconds since 1970.

    The rule of versions: a state never replaces one with the same or a higher version. While the cache is being filled
    (`begin_fill` to `end_fill`) it also remembers the versions of what was settled, so that an older snapshot can't
    bring it back; afterwards changes come in order and need no memory.
    """

    def __init__(self, poll: PollSettings, now: Callable[[], float] = time.time) -> None:
        self._first_s = poll.first_s
        self._max_s = poll.max_s
        self._now = now
        self._entries: dict[bytes, _Bucket] = {}
        self._lines = tuple(_Line() for _ in LINES)
        self._settled: dict[bytes, int] | None = None
        self._counts = [0] * len(_STATUSES)
        self._turn_s = self._turn_end_s = self._far_s = self._overdue_s = 0.0
        self._first_due = 0
        self._first: dict[_State, _Bucket] = {}
        self._loaded: dict[_State, _Bucket] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return pack(key) in self._entries

    def __iter__(self) -> Iterator[Pending]:
        """All that is pending, in no order. The cache must not change meanwhile."""
        for packed, bucket in self._entries.items():
            yield _pending(packed, bucket)

    @property
    def counts(self) -> dict[Status, int]:
        """How many are pending, by status."""
        return {status: sum(self._counts[code::_COUNT]) for code, status in enumerate(Status)}

    def get(self, key: str) -> Pending | None:
        """What is known of a pending payment."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        return None if bucket is None else _pending(packed, bucket)

    # Filling

    def begin_fill(self) -> None:
        """Start over: empty, and remembering what gets settled until `end_fill`."""
        self._entries.clear()
        self._lines = tuple(_Line() for _ in LINES)
        self._forget_open()
        self._counts = [0] * len(_STATUSES)
        self._settled = {}

    def begin_load(self) -> None:
        """More is going to be read from the table: from now on remember what gets settled, until `end_fill`."""
        self._settled = {}

    def end_fill(self) -> None:
        """The feed has passed a barrier that was committed after the snapshot: everything is known."""
        self._settled = None
        self._loaded.clear()

    # Changes

    def changed_all(self, rows: Iterable[PaymentRow]) -> None:
        """The rows of one commit."""
        for row in rows:
            self.changed(row)

    def changed(self, row: PaymentRow) -> None:
        """A row as a commit left it, from the feed."""
        waits = row.status in _PATIENT and waits_in(row.status, row.terms, row.progress)
        self.put(row.key, row.status, row.version, row.open_work, row.expires_at_us / 1e6, waits)

    def load(self, key: str, status: str, version: int, expires_s: float, waits: bool, changed_s: float) -> None:
        """A row of the table with open work, made at `changed_s`. `waits`: the next move is somebody else's. Such a payment, and
        one that Stripe has worked on for long, has its first look some time within the longest distance."""
        rests = waits or (status == Status.PROCESSING.value and self._now() - changed_s > self._max_s)
        self.put(key, status, version, True, expires_s, rests, rests)

    def put(
        self, key: str, status: str, version: int, open_work: bool, expires_s: float, waits: bool = False, spread: bool = False
    ) -> None:
        """A payment's state, unless a state of the same or a higher version is known. `status` is one of Status. Looks at what
        `waits` come after all others; with `spread` the first one is some time within the longest distance."""
        packed = pack(key)
        before = self._entries.get(packed)
        settled = self._settled
        if before is not None:
            if before.version >= version:
                return
            self._counts[before.status] -= 1
        elif settled is not None and settled.get(packed, 0) >= version:
            return
        if open_work:
            code = (_RESTING_CODES if waits else _CODES)[status]
            self._counts[code] += 1
            now_s = self._now()
            if not self._turn_s <= now_s < self._turn_end_s:
                self._turn(now_s)
            far = expires_s > self._far_s
            state = (code, version, 0, expires_s // FAR_GRAIN_S * FAR_GRAIN_S if far else _coarse(expires_s, now_s))
            bucket = self._spread(state, now_s) if spread else self._first.get(state)
            if bucket is None:
                bucket = self._first[state] = self._bucket(self._first_due, state)
            bucket.keys.append(packed)
            self._entries[packed] = bucket
        else:
            if before is not None:
                del self._entries[packed]
            if settled is not None:
                settled[packed] = version

    def _turn(self, now_s: float) -> None:
        """Choose the moment of the first look for what changes from now on, for TURN_S."""
        due_s = now_s + self._first_s * (1.0 + JITTER * random())
        self._first_due = _moment(due_s, now_s)
        self._first = {}
        self._turn_s, self._turn_end_s, self._far_s = now_s, now_s + TURN_S, now_s + FAR_S

    def _spread(self, state: _State, now_s: float) -> _Bucket:
        """A bucket for the first look at a payment of the table that waits: each state has a moment of its own, at random."""
        bucket = self._loaded.get(state)
        if bucket is None or len(bucket.keys) >= LOADED_MAX:
            due_s = now_s + self._first_s + (self._max_s - self._first_s) * random()
            if state[0] in _GIVEN_UP_CODES:
                due_s = min(due_s, max(state[3], now_s + self._first_s))
            bucket = self._loaded[state] = self._bucket(_moment(due_s, now_s), state)
        return bucket

    def _forget_open(self) -> None:
        """Nothing more is put into the buckets that were chosen: they may be taken, or gone."""
        self._turn_end_s = 0.0
        self._loaded.clear()

    def forget(self, key: str) -> None:
        """The payment is another shard's now."""
        bucket = self._entries.pop(pack(key), None)
        if bucket is not None:
            self._counts[bucket.status] -= 1

    def forget_slots(self, first: int, last: int) -> int:
        """Payments of these slots are another shard's now; how many there were."""
        gone = [packed for packed in self._entries if first <= slot(unpack(packed)) <= last]
        for packed in gone:
            self._counts[self._entries.pop(packed).status] -= 1
        return len(gone)

    # Looking

    def next_due_s(self) -> int | None:
        """When the next look is due; it may have settled meanwhile."""
        return min((line.moments[0] for line in self._lines if line.moments), default=None)

    def take_due(self, limit: int, limits: Sequence[int] = UNBOUNDED) -> list[Pending]:
        """Payments whose look is due, at most `limit`, and at most so many of each line as `limits` says; the rest stays due. The
        first line comes first. Each that is taken is put off to its next look at once."""
        now_s = self._now()
        if now_s >= self._overdue_s:
            self._overdue_s = now_s + OVERDUE_S
            self._find_over(now_s)
        taken: list[Pending] = []
        for number, line in enumerate(self._lines):
            left = min(limit - len(taken), limits[number])
            while left > 0 and line.moments and line.moments[0] <= now_s:
                self._forget_open()  # their moment may be this one
                buckets = line.buckets[line.moments[0]]
                while buckets and left > 0:
                    state, bucket = buckets.popitem()
                    code, version, tries, _ = state
                    status, expires_s, late_s = _STATUSES[code], bucket.expires_s, int(now_s) - bucket.due_s
                    due = unpack_all(self._put_off(bucket, now_s, left))
                    taken += [Pending(key, status, version, tries, expires_s, number, late_s) for key in due]
                    left -= len(due)
                    if bucket.keys:
                        buckets[state] = bucket
                if not buckets:
                    del line.buckets[heapq.heappop(line.moments)]
        return taken

    def _find_over(self, now_s: float) -> None:
        """Move what only waited when it became due, had to, and may be past its time meanwhile, to the line of its like."""
        waits, over = self._lines[WAITS], self._lines[OVER]
        for due in [moment for moment in waits.moments if moment <= now_s - OVERDUE_S]:
            buckets, there = waits.buckets[due], over.at(due)
            for state in [state for state in buckets if state[0] in _GIVEN_UP_CODES and state[3] <= now_s]:
                if state not in there:
                    there[state] = buckets.pop(state)

    def _put_off(self, bucket: _Bucket, now_s: float, limit: int) -> list[bytes]:
        """Take up to `limit` of a bucket, spread them over those of their next look, and return them. The others stay, where they
        have not changed or settled since."""
        entries = self._entries
        known = entries.get
        some = bucket.keys[-max(limit, STALE_MIN) :]
        del bucket.keys[-len(some) :]
        due = [packed for packed in dict.fromkeys(some) if known(packed) is bucket]  # one that left may have come back
        bucket.keys += due[limit:]
        del due[limit:]
        tries = min(bucket.tries + 1, TRIES_MAX)
        distance_s = self.distance_s(_STATUSES[bucket.status], tries)
        first_s, spread_s = now_s + distance_s * (1.0 - JITTER), distance_s * 2 * JITTER
        last_s = bucket.expires_s if now_s < bucket.expires_s else first_s + spread_s
        code = bucket.status + _COUNT if _CALLED <= bucket.status < _RESTING else bucket.status
        state = (code, bucket.version, tries, bucket.expires_s)
        parts = min(len(due), PARTS_MAX)
        for part in range(parts):
            due_s = first_s + spread_s * (part + random()) / parts
            target = self._bucket(_moment(min(due_s, last_s), now_s), state)
            mine = due[part::parts]
            target.keys += mine
            entries.update(dict.fromkeys(mine, target))
        return due

    def distance_s(self, status: Status, tries: int) -> float:
        """Seconds between looks: doubled with each, up to the maximum; where people have the next move the maximum."""
        if _CODES[status.value] in _PATIENT_CODES:
            return self._max_s
        return min(self._max_s, self._first_s * 2.0 ** min(tries, 30))

    def expires(self, key: str, expires_s: float) -> None:
        """The payment's exact time, as its row has it: `expires_s` of what was taken may have been too early."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        now_s = self._now()
        if bucket is not None and expires_s > now_s:
            rounded_s = _coarse(expires_s, now_s)
            due_s = min(bucket.due_s, rounded_s)
            self._put(packed, _moment(due_s, now_s), (bucket.status, bucket.version, bucket.tries, rounded_s))

    def hurry(self, key: str) -> bool:
        """Something happened to the payment: look at it now, before those that only wait. One that was not looked at yet may have
        just changed, and is given the usual time. Whether the look is earlier than it would have been."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        if bucket is None:
            return False
        now_s = self._now()
        due = _moment(now_s if bucket.tries else now_s + self._first_s * (1.0 + JITTER), now_s)
        sooner = bool(bucket.tries) or due < bucket.due_s
        self._go_ahead(packed, bucket, due if sooner else bucket.due_s)
        return sooner

    def ahead(self, key: str) -> None:
        """The next look at the payment, whenever it is, goes before those at payments that only wait."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        if bucket is not None:
            self._go_ahead(packed, bucket, bucket.due_s)

    def _go_ahead(self, packed: bytes, bucket: _Bucket, due: int) -> None:
        """Put a payment into the first line, at `due`."""
        code = bucket.status - _COUNT if bucket.status >= _RESTING else bucket.status
        if (code, due) != (bucket.status, bucket.due_s):
            self._put(packed, due, (code, bucket.version, bucket.tries, bucket.expires_s))

    def _put(self, packed: bytes, due: int, state: _State) -> None:
        bucket = self._bucket(due, state)
        bucket.keys.append(packed)
        self._entries[packed] = bucket

    def _bucket(self, due: int, state: _State) -> _Bucket:
        """The bucket of a state that is looked at at `due`."""
        code = state[0]
        line = AHEAD if code < _RESTING else OVER if due >= state[3] and code in _GIVEN_UP_CODES else WAITS
        buckets = self._lines[line].at(due)
        bucket = buckets.get(state)
        if bucket is None:
            bucket = buckets[state] = _Bucket(due, *state)
        return bucket


def _pending(packed: bytes, bucket: _Bucket) -> Pending:
    return Pending(unpack(packed), _STATUSES[bucket.status], bucket.version, bucket.tries, bucket.expires_s)


def _moment(due_s: float, now_s: float) -> int:
    """The first moment not before `due_s` for which there are buckets."""
    return int(due_s) + 1 if due_s - now_s < 60 else (int(due_s) // COARSE_S + 1) * COARSE_S


def _coarse(expires_s: float, now_s: float) -> float:
    """Rounded down, the more the further it is away: at most a second, a minute, a quarter of an hour too early."""
    left_s = expires_s - now_s
    grain_s = FAR_GRAIN_S if left_s > FAR_S else 60 if left_s > 600 else 1
    return expires_s // grain_s * grain_s


def pack(key: str) -> bytes:
    """The key in fewer bytes, where it is one that the platform issued; `unpack` gives it back exactly."""
    raw = key.encode()
    if len(raw) == ISSUED_CHARACTERS and key[:_PREFIX_LENGTH] == ISSUED_PREFIX:
        try:
            packed = a2b_base64(raw.translate(_FROM_URL))
        except Base64Error:
            return raw
        if len(packed) == _PACKED_BYTES:  # else some characters were no base64, and left out
            return packed
    return raw


def unpack(packed: bytes) -> Key:
    """The key that `pack` was given."""
    if packed[0] == _PACKED[0]:
        return Key(b2a_base64(packed, newline=False).translate(_TO_URL).decode())
    return Key(packed.decode())


def unpack_all(packed: Sequence[bytes]) -> list[Key]:
    """The keys that `pack` was given, in their order."""
    joined = b"".join(packed)
    if joined[::_PACKED_BYTES] != _PACKED[:1] * len(packed):  # the first one that isn't packed begins with something else
        return [unpack(one) for one in packed]
    text = b2a_base64(joined, newline=False).translate(_TO_URL).decode()
    return [text[at : at + ISSUED_CHARACTERS] for at in range(0, len(text), ISSUED_CHARACTERS)]  # type: ignore[misc]
