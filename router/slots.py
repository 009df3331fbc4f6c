"""A limit per API key and slot: who chooses keys could aim all of them at one slot, which no new shard would relieve."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from oncepay.apikeys import ApiKey
from oncepay.errors import RateLimited
from oncepay.keys import slot

BUCKETS_MAX = 100_000
"""Pairs of API key and slot that are remembered; the one used longest ago is forgotten first, and begins anew."""


class SlotLimits:
    """Token buckets, one for each API key and slot, in this process. Each holds one second's worth, at least one.

    A bucket is kept as the moment at which it will be full again: one that is full needs no memory.
    """

    def __init__(self, default_per_s: float) -> None:
        self._default_per_s = default_per_s
        self._full_at_s: OrderedDict[tuple[str, int], float] = OrderedDict()

    def take(self, who: ApiKey, key: str) -> None:
        """Raises RateLimited when `who` submits too often to the slot of `key`."""
        rate = self._default_per_s if who.slot_rate_limit_per_s is None else who.slot_rate_limit_per_s
        if rate <= 0:
            return
        pair = (who.name, slot(key))
        now_s = time.monotonic()
        full_at_s = max(self._full_at_s.get(pair, 0.0), now_s) + 1.0 / rate
        late_s = full_at_s - now_s - max(1.0, 1.0 / rate)
        if late_s > 1e-9:
            raise RateLimited(
                f"{who.name} may submit {rate:g} payments a second to the slot of this key",
                retry_after_s=max(1, math.ceil(late_s)),
            )
        self._full_at_s[pair] = full_at_s
        self._full_at_s.move_to_end(pair)
        if len(self._full_at_s) > BUCKETS_MAX:
            self._full_at_s.popitem(last=False)
