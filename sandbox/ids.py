"""Ids like Stripe's, that also carry the row's ordinal, so that an object is found by primary key without a second index.

An id is `<prefix>_3<6 base-62 digits: ordinal><10: account><8: random>`: 24 characters after the digit, as in real ids.
"""

from __future__ import annotations

import random

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ACCOUNT = "B7SandboxX"
ORDINAL_MAX = 62**6 - 1

_PAIRS = [a + b for a in DIGITS for b in DIGITS]
_VALUE = {digit: value for value, digit in enumerate(DIGITS)}
_BASE = len(_PAIRS)
_random = random.SystemRandom()
_SEED = random.Random(_random.getrandbits(128))


def text(length: int) -> str:
    """`length` (even) random base-62 digits, unpredictable from run to run."""
    bits = _SEED.getrandbits(16 * length)
    pairs = []
    for _ in range(length // 2):
        bits, rest = divmod(bits, _BASE)
        pairs.append(_PAIRS[rest])
    return "".join(pairs)


def make(prefix: str, ordinal: int) -> str:
    """The id of row `ordinal` (0 to 62**6 - 1) of the kind that `prefix` (with its underscore) names."""
    assert 0 <= ordinal <= ORDINAL_MAX
    high, low = divmod(ordinal, _BASE)
    top, middle = divmod(high, _BASE)
    return f"{prefix}3{_PAIRS[top]}{_PAIRS[middle]}{_PAIRS[low]}{ACCOUNT}{text(8)}"


def ordinal(identifier: str) -> int:
    """The ordinal that an id carries, or -1 when it isn't one of ours."""
    start = identifier.find("_3") + 2
    digits = identifier[start : start + 6]
    if start < 2 or len(identifier) != start + 24:
        return -1
    value = 0
    for digit in digits:
        place = _VALUE.get(digit)
        if place is None:
            return -1
        value = value * 62 + place
    return value
