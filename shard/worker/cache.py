"""The pending cache: every payment of the shard with open work, in memory, ordered by when it is looked at next.

Filled once from the table, then kept by the change feed alone. Compact: payments with the same state and the same moment
of their next look share a bucket, and the issued keys' 36 characters are kept as 25 bytes.
"""

from __future__ import annotations

import heapq
import time
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Iterator
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
TRIES_MAX = 63

_STATUSES = tuple(Status)
_CODES: dict[str, int] = {status.value: code for code, status in enumerate(_STATUSES)}
"""A status as a small number: hashing an enum's member costs more than all else here."""
_PATIENT_CODES = frozenset(_CODES[status.value] for status in (*WAITING, Status.ATTEMPTED))

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_+/=", b"+/!!!")
_PREFIX = ISSUED_PREFIX.encode()
_PREFIX_LENGTH = len(_PREFIX)
_PACKED_BYTES = (ISSUED_CHARACTERS - _PREFIX_LENGTH) * 3 // 4
_PACKED = 0
"""The first byte of a packed key; no key begins with it otherwise."""


class Pending(msgspec.Struct, frozen=True):
    """A payment with open work. `tries`: looks since its last change. `expires_s` is rounded down, so "maybe past"."""

    key: Key
    status: Status
    version: int
    tries: int
    expires_s: int


class _Bucket:
    """Payments in the same state that are looked at in the same second."""

    __slots__ = ("due_s", "expires_s", "keys", "status", "tries", "version")

    def __init__(self, due_s: int, status: int, version: int, tries: int, expires_s: int) -> None:
        self.due_s = due_s
        self.status = status
        self.version = version
        self.tries = tries
        self.expires_s = expires_s
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
        self._buckets: dict[int, dict[tuple[int, int, int, int], _Bucket]] = {}
        self._due: list[int] = []
        self._settled: dict[bytes, int] | None = None
        self._counts = [0] * len(_STATUSES)

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

    def put(self, key: str, status: str, version: int, open_work: bool, expires_s: float) -> None:
        """A payment's state, unless a state of the same or a higher version is known. `status` is one of Status."""
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
            due_s = now_s + self._first_s * (1.0 + JITTER * random())
            left_s = expires_s - now_s
            self._place(packed, due_s, now_s, code, version, 0, _coarse(expires_s, left_s))
        else:
            if before is not None:
                del self._entries[packed]
            if settled is not None:
                settled[packed] = version

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
            for bucket in self._buckets.pop(heapq.heappop(self._due)).values():
                for packed in bucket.keys:
                    if self._entries.get(packed) is bucket:  # else it changed or settled since
                        taken.append(_pending(packed, bucket))
                        self._put_off(packed, bucket, now_s)
        return taken

    def _put_off(self, packed: bytes, bucket: _Bucket, now_s: float) -> None:
        tries = min(bucket.tries + 1, TRIES_MAX)
        due_s = now_s + self.distance_s(_STATUSES[bucket.status], tries) * (1.0 - JITTER + 2 * JITTER * random())
        if now_s < bucket.expires_s < due_s:
            due_s = bucket.expires_s
        self._place(packed, due_s, now_s, bucket.status, bucket.version, tries, bucket.expires_s)

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
            rounded_s = _coarse(expires_s, expires_s - now_s)
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

    def _place(self, packed: bytes, due_s: float, now_s: float, status: int, version: int, tries: int, expires_s: int) -> None:
        """Put a payment into the bucket of its state and of the first moment not before `due_s`."""
        due = int(due_s) + 1 if due_s - now_s < 60 else (int(due_s) // COARSE_S + 1) * COARSE_S
        buckets = self._buckets.get(due)
        if buckets is None:
            buckets = self._buckets[due] = {}
            heapq.heappush(self._due, due)
        state = (status, version, tries, expires_s)
        bucket = buckets.get(state)
        if bucket is None:
            bucket = buckets[state] = _Bucket(due, status, version, tries, expires_s)
        bucket.keys.append(packed)
        self._entries[packed] = bucket


def _pending(packed: bytes, bucket: _Bucket) -> Pending:
    return Pending(unpack(packed), _STATUSES[bucket.status], bucket.version, bucket.tries, bucket.expires_s)


def _coarse(expires_s: float, left_s: float) -> int:
    """Rounded down, the more the further it is away: at most a second, a minute, a quarter of an hour too early."""
    grain_s = 900 if left_s > 21_600 else 60 if left_s > 600 else 1
    return int(expires_s) // grain_s * grain_s


def pack(key: str) -> bytes:
    """The key in fewer bytes, where it is one that the platform issued; `unpack` gives it back exactly."""
    raw = key.encode()
    if len(raw) == ISSUED_CHARACTERS and raw[:_PREFIX_LENGTH] == _PREFIX:
        try:
            packed = a2b_base64(raw[_PREFIX_LENGTH:].translate(_FROM_URL))
        except Base64Error:
            return raw
        if len(packed) == _PACKED_BYTES:  # else some characters were no base64, and left out
            return b"\0" + packed
    return raw


def unpack(packed: bytes) -> Key:
    """The key that `pack` was given."""
    if packed[0] == _PACKED:
        return Key(ISSUED_PREFIX + b2a_base64(packed[1:], newline=False).translate(_TO_URL).decode())
    return Key(packed.decode())
