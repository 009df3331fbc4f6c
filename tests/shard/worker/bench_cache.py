"""What the pending cache costs: bytes a payment with its key, and the time to insert, to settle, and to take the next thousand.

    python -m tests.shard.worker.bench_cache [--payments 1000000] [--rounds 5]

Prints one JSON object. Times are the processor's, so that other work on the machine counts little. Issued keys, eight states,
looks spread over five minutes. `python -m loadtest.bench cache` calls it.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import os
import time
import tracemalloc
from statistics import median

from oncepay.keys import ISSUED_CHARACTERS, ISSUED_PREFIX
from oncepay.settings import PollSettings
from shard.worker.cache import PendingCache

START_S = 1_800_000_000.0
STATES = ("created", "attempted", "confirming", "processing", "requires_action", "requires_capture", "canceling", "succeeded")


def keys(count: int) -> list[str]:
    """Made as the key service's look."""
    size = (ISSUED_CHARACTERS - len(ISSUED_PREFIX)) * 3 // 4
    return [ISSUED_PREFIX + base64.urlsafe_b64encode(os.urandom(size)).decode() for _ in range(count)]


def measure(count: int, rounds: int) -> dict[str, object]:
    """One cache, filled, settled in part, and asked for what is due."""
    made, now_s = keys(count), [START_S]
    tracemalloc.start()
    cache = PendingCache(PollSettings(), lambda: now_s[0])
    _fill(cache, made, now_s)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del cache
    inserts, settles, takes = [], [], []
    for _ in range(rounds):
        insert_s, settle_s, take_s = _round(made)
        inserts.append(insert_s)
        settles.append(settle_s)
        takes.append(take_s)
    return {
        "payments": count,
        "rounds": rounds,
        "bytes_each": round(size / count, 1),
        "insert_us": round(median(inserts) * 1e6, 2),
        "settle_us": round(median(settles) * 1e6, 2),
        "next_1000_due_ms": round(median(takes) * 1e3, 2),
        "load_average": os.getloadavg()[0],
    }


def _round(made: list[str]) -> tuple[float, float, float]:
    """Processor seconds of one insert, of one settlement, and (the median) of the next thousand due."""
    now_s = [START_S]
    cache = PendingCache(PollSettings(), lambda: now_s[0])
    gc.collect()
    began_s = time.process_time()
    _fill(cache, made, now_s)
    insert_s = time.process_time() - began_s
    settled = made[: len(made) // 10]
    began_s = time.process_time()
    for key in settled:
        cache.put(key, "failed", 9, False, now_s[0])
    settle_s = time.process_time() - began_s
    now_s[0] += 600
    takes = []
    for _ in range(50):
        began_s = time.process_time()
        taken = len(cache.take_due(1_000))
        takes.append((time.process_time() - began_s) / max(taken, 1) * 1_000)
    return insert_s / len(made), settle_s / len(settled), median(takes)


def _fill(cache: PendingCache, made: list[str], now_s: list[float]) -> None:
    start_s = now_s[0]
    for number, key in enumerate(made):
        if number % 1_000 == 0:
            now_s[0] = start_s + 300 * number / len(made)
        cache.put(key, STATES[number % len(STATES)], 1 + number % 3, True, now_s[0] + 86_400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payments", type=int, default=1_000_000, help="how many are pending (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often all is done; medians count (default: %(default)s)")
    options = parser.parse_args()
    print(json.dumps(measure(options.payments, options.rounds), indent=2))


if __name__ == "__main__":
    main()
