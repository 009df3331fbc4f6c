"""The pending cache: every payment of the shard with open work, in memory, ordered by when it is looked at next.

Filled once from the table, then kept by the change feed alone. Compact: payments with the same state and the same moment
of their next look share a bucket, and the issued keys' 36 characters are kept as 27 bytes.
"""

from __future__ import annotations

import heapq
import time
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import random

import msgspec

from oncepay.feed import PaymentRow
from oncepay.keys import ISSUED_CHARACTERS, ISSUED_PREFIX, slot
from oncepay.payment import WAITING, Key, Status
from oncepay.settings import PollSettings

JITTER = 0.2
"""Looks are spread by this part of their distance, so that what came together doesn't stay together."""
COARSE_S = 5
"""Looks that are further away than a minute are rounded up to this many seconds: fewer, fuller buckets."""
TURN_S = 0.1
"""What changes within so long of each other is looked at first in the same second; then it is spread."""
PARTS_MAX = 8
"""What is due together is spread over so many moments: the next time each of these parts is."""
TRIES_MAX = 63
FAR_S, FAR_GRAIN_S = 21_600, 900
"""Payments whose time is over later than that are kept with it to a quarter of an hour."""

_STATUSES = tuple(Status)
_CODES: dict[str, int] = {status.value: code for code, status in enumerate(_STATUSES)}
"""A status as a small number: hashing an enum's member costs more than all else here."""
_PATIENT_CODES = frozenset(_CODES[status.value] for status in (*WAITING, Status.ATTEMPTED))

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_+/=", b"+/!!!")
_PACKED_BYTES = ISSUED_CHARACTERS * 3 // 4
_PACKED = a2b_base64(ISSUED_PREFIX.encode().translate(_FROM_URL))
"""What every packed key begins with: the prefix is base64 too. No text in UTF-8 begins so."""
_PREFIX_LENGTH = len(ISSUED_PREFIX)
assert _PREFIX_LENGTH % 4 == 0
assert 0x80 <= _PACKED[0] < 0xC0


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A payment with open work. `tries`: looks since its last change. `expires_s` is rounded down, so "maybe past". `late_s`: how
    long ago a look that is due should have been."""

    key: Key
    status: Status
    version: int
    tries: int
    expires_s: int
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
        self._buckets: dict[int, dict[tuple[int, int, int, float], _Bucket]] = {}
        self._due: list[int] = []
        self._settled: dict[bytes, int] | None = None
        self._counts = [0] * len(_STATUSES)
        self._turn_s = self._turn_end_s = self._far_s = 0.0
        self._first_due = 0
        self._first: dict[tuple[int, int, int, float], _Bucket] = {}

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
        return dict(zip(_STATUSES, self._counts, strict=True))

    def get(self, key: str) -> Pending | None:
        """What is known of a pending payment."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        return None if bucket is None else _pending(packed, bucket)

    # Filling

    def begin_fill(self) -> None:
        """Start over: empty, and remembering what gets settled until `end_fill`."""
        self._entries.clear()
        self._buckets.clear()
        self._due.clear()
        self._turn_end_s = 0.0
        self._counts = [0] * len(_STATUSES)
        self._settled = {}

    def begin_load(self) -> None:
        """More is going to be read from the table: from now on remember what gets settled, until `end_fill`."""
        self._settled = {}

    def end_fill(self) -> None:
        """The feed has passed a barrier that was committed after the snapshot: everything is known."""
        self._settled = None

    # Changes

    def changed_all(self, rows: Iterable[PaymentRow]) -> None:
        """The rows of one commit."""
        for row in rows:
            self.changed(row)

    def changed(self, row: PaymentRow) -> None:
        """A row as a commit left it, from the feed."""
        self.put(row.key, row.status, row.version, row.open_work, row.expires_at_us / 1e6)

    def put(self, key: str, status: str, version: int, open_work: bool, expires_s: float, tries: int = 0) -> None:
        """A payment's state, unless a state of the same or a higher version is known. `status` is one of Status. `tries`: looks
        that it has had, as far as anybody can tell."""
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
            code = _CODES[status]
            self._counts[code] += 1
            now_s = self._now()
            if not self._turn_s <= now_s < self._turn_end_s:
                self._turn(now_s)
            far = expires_s > self._far_s
            state = (code, version, tries, expires_s // FAR_GRAIN_S * FAR_GRAIN_S if far else _coarse(expires_s, now_s))
            bucket = self._first.get(state)
            if bucket is None:
                bucket = self._bucket(self._first_due, state)
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
        self._first = self._at(self._first_due)
        self._turn_s, self._turn_end_s, self._far_s = now_s, now_s + TURN_S, now_s + FAR_S

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
        return self._due[0] if self._due else None

    def take_due(self, limit: int) -> list[Pending]:
        """Payments whose look is due, at most about `limit`. Each is put off to its next look at once."""
        now_s = self._now()
        taken: list[Pending] = []
        while self._due and self._due[0] <= now_s and len(taken) < limit:
            self._turn_end_s = 0.0  # its moment may be this one
            for bucket in self._buckets.pop(heapq.heappop(self._due)).values():
                status, version, tries, expires_s = _STATUSES[bucket.status], bucket.version, bucket.tries, bucket.expires_s
                late_s = int(now_s) - bucket.due_s
                due = unpack_all(self._put_off(bucket, now_s))
                taken += [Pending(key, status, version, tries, expires_s, late_s) for key in due]
        return taken

    def _put_off(self, bucket: _Bucket, now_s: float) -> list[bytes]:
        """Spread what is left of a bucket over those of its next look, and return it: the others changed or settled since."""
        entries = self._entries
        known = entries.get
        due = [packed for packed in dict.fromkeys(bucket.keys) if known(packed) is bucket]  # one that left may have come back
        tries = min(bucket.tries + 1, TRIES_MAX)
        distance_s = self.distance_s(_STATUSES[bucket.status], tries)
        first_s, spread_s = now_s + distance_s * (1.0 - JITTER), distance_s * 2 * JITTER
        last_s = bucket.expires_s if now_s < bucket.expires_s else first_s + spread_s
        state = (bucket.status, bucket.version, tries, bucket.expires_s)
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
            self._place(packed, due_s, now_s, bucket.status, bucket.version, bucket.tries, rounded_s)

    def hurry(self, key: str) -> bool:
        """Something happened to the payment: look at it now, unless it has just changed and is looked at soon anyway."""
        packed = pack(key)
        bucket = self._entries.get(packed)
        if bucket is None or not bucket.tries:
            return False
        now_s = self._now()
        self._place(packed, now_s, now_s, bucket.status, bucket.version, bucket.tries, bucket.expires_s)
        return True

    def _place(self, packed: bytes, due_s: float, now_s: float, status: int, version: int, tries: int, expires_s: float) -> None:
        """Put a payment into the bucket of its state and of the first moment not before `due_s`."""
        bucket = self._bucket(_moment(due_s, now_s), (status, version, tries, expires_s))
        bucket.keys.append(packed)
        self._entries[packed] = bucket

    def _bucket(self, due: int, state: tuple[int, int, int, float]) -> _Bucket:
        """The bucket of a state (status, version, tries, when it is over) that is looked at at `due`."""
        buckets = self._at(due)
        bucket = buckets.get(state)
        if bucket is None:
            bucket = buckets[state] = _Bucket(due, *state)
        return bucket

    def _at(self, due: int) -> dict[tuple[int, int, int, float], _Bucket]:
        """The buckets of a moment, by their state."""
        buckets = self._buckets.get(due)
        if buckets is None:
            buckets = self._buckets[due] = {}
            heapq.heappush(self._due, due)
        return buckets


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
