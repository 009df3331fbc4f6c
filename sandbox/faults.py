"""Faults on demand: a seeded, repeatable choice of which calls and webhooks go wrong.

A choice is a hash of (seed, kind of fault, where, ordinal), where the ordinal counts the calls of one endpoint (or the
events) since the faults were set. So the same seed hits the n-th call of an endpoint every time, however calls of
different endpoints interleave.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import msgspec

from sandbox.counts import Counts

SCALE = float(2**64)


class FaultSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `PUT /_control/faults` takes; the whole is replaced, missing members are 0. Plain numbers are probabilities."""

    seed: int = 0
    latency_ms: tuple[float, float] = (0.0, 0.0)
    error_before: float = 0.0
    error_after: float = 0.0
    lost_answer: float = 0.0
    reset: float = 0.0
    rate_limited: float = 0.0
    processing: float = 0.0
    processing_s: tuple[float, float] = (0.0, 0.0)
    webhook_lost: float = 0.0
    webhook_doubled: float = 0.0
    webhook_delay_s: tuple[float, float] = (0.0, 0.0)
    webhook_reordered: float = 0.0
    down: bool = False

    def __post_init__(self) -> None:
        for name in PROBABILITIES:
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability, from 0 to 1")
        for name in ("latency_ms", "processing_s", "webhook_delay_s"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high:
                raise ValueError(f"{name} is [low, high] with 0 <= low <= high")


PROBABILITIES = (
    "error_before",
    "error_after",
    "lost_answer",
    "reset",
    "rate_limited",
    "processing",
    "webhook_lost",
    "webhook_doubled",
    "webhook_reordered",
)


class Faults:
    """The faults that are on, and the ordinals that they have come to."""

    def __init__(self, counts: Counts) -> None:
        self.settings = FaultSettings()
        self._counts = counts
        self._ordinals: Counter[str] = Counter()

    def replace(self, settings: FaultSettings) -> None:
        """Put `settings` in place of what was there; the ordinals begin again."""
        self.settings = settings
        self._ordinals.clear()

    def hits(self, kind: str, where: str) -> bool:
        """Whether the next thing `where` gets the fault `kind`; counted when it does."""
        probability: float = getattr(self.settings, kind)
        if probability <= 0.0 or self.fraction(kind, where) >= probability:
            return False
        self._counts.faults[kind] += 1
        return True

    def between(self, kind: str, where: str) -> float:
        """A number from the pair of settings `kind`, for the next thing `where`."""
        low, high = getattr(self.settings, kind)
        if high <= 0.0:
            return 0.0
        return float(low + (high - low) * self.fraction(kind, where))

    def fraction(self, kind: str, where: str) -> float:
        """A repeatable number from 0 up to 1, another one at each call."""
        stream = f"{kind}|{where}"
        ordinal = self._ordinals[stream]
        self._ordinals[stream] = ordinal + 1
        digest = hashlib.blake2b(f"{self.settings.seed}|{stream}|{ordinal}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / SCALE
