"""Keys that wait for their turn: those of one sixteenth of the slots leave first, then those of the next.

A shard's indexes are in the order of slots, and of every sixteen slots that follow one another each has a turn of its own. So for
as long as a turn lasts, new rows go to one page in sixteen of an index, and all shards get the same share of them. Those pages
stay in Postgres' cache, and few others go into the log whole after a checkpoint. See docs/decisions/0104-keys-in-turn.md.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from hashlib import sha256

from oncepay.keys import ISSUED_CHARACTERS, ISSUED_PREFIX

TURNS = 16
_PREFIX_LENGTH = len(ISSUED_PREFIX)
_TEXT_LENGTH = ISSUED_CHARACTERS - _PREFIX_LENGTH
_RAW_BYTES = _TEXT_LENGTH * 3 // 4
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


class Turns:
    """Issued keys by their turn, as 24 bytes each. No order within a turn that has to do with slots."""

    __slots__ = ("_count", "_turn", "_waiting")

    def __init__(self) -> None:
        self._waiting = [bytearray() for _ in range(TURNS)]
        self._turn = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, keys: list[str]) -> None:
        """Keep `keys`, some 1 µs each."""
        texts: list[list[str]] = [[] for _ in range(TURNS)]
        for key in keys:
            texts[turn_of(key)].append(key[_PREFIX_LENGTH:])
        for waiting, mine in zip(self._waiting, texts, strict=True):
            waiting += a2b_base64("".join(mine).encode().translate(_FROM_URL))
        self._count += len(keys)

    def take(self, count: int) -> list[str]:
        """Up to `count` keys: what is left of the turn, then the next turns'."""
        keys: list[str] = []
        while self._count and len(keys) < count:
            waiting = self._waiting[self._turn]
            if not waiting:
                self._turn = (self._turn + 1) % TURNS
                continue
            first = max(0, len(waiting) - (count - len(keys)) * _RAW_BYTES)
            text = b2a_base64(waiting[first:], newline=False).translate(_TO_URL).decode()
            del waiting[first:]
            keys += [ISSUED_PREFIX + text[at : at + _TEXT_LENGTH] for at in range(0, len(text), _TEXT_LENGTH)]
            self._count -= len(text) // _TEXT_LENGTH
        return keys

    def clear(self) -> None:
        """Forget all keys: they are never given out."""
        for waiting in self._waiting:
            waiting.clear()
        self._count = 0


def turn_of(key: str) -> int:
    """The turn of the key's slot, 0 to 15: the slot's last four bits."""
    return sha256(key.encode()).digest()[1] % TURNS
