"""The log of a shard whose aggregator was away: payments as they come out of it, for the benchmarks of derived data.

Each payment of two items by two sellers has a row for each version of its life (three, when a card is charged at once:
created, confirming, succeeded), and two entries, its own and Stripe's fee, in one row with the link to their balance transaction,
as a shard keeps what it books at once; or, for comparing, in rows of their own. Keys and ids look like issued keys and Stripe's.
"""

from __future__ import annotations

import asyncio
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import aiohttp
import psutil

from loadtest.bench.own_cluster import Running
from oncepay.cart import Fee, Item, shares_of
from oncepay.entry_rows import EntryRow as StoredEntry
from oncepay.entry_rows import packed
from oncepay.feed import FEED_ROWS_MAX, EntryRow, FeedBatch, LinkRow, PaymentRow, encode_batch
from oncepay.keys import slot
from oncepay.ledger import BalanceLink, payment_entry, stripe_fee_entry
from oncepay.payment import Progress, Terms
from oncepay.payment_text import progress_text, terms_text

DAYS = 90
DAY_US = 86_400_000_000
FIRST_US = 1_760_000_000_000_000
PACE_US = DAYS * DAY_US // 10_000_000
"""Between two payments, so that ten million of them are of three months."""
FEE = Fee(1000)
STRIPE_FEE = 117
START_LSN = 1000
PROGRESS = progress_text(Progress(attempt=1, payment_method="pm_card_visa", charge="{C}", stripe_fee=STRIPE_FEE))
ENTRIES_EACH = 2
STATES = ("created", "confirming", "succeeded")
GROUP = 16
"""So many batches of each shard are made, then posted: making them isn't the aggregator's time."""
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Shape(NamedTuple):
    """How much and of what: `entries` in all shards together, two a payment; `apart`: each in a row of its own."""

    entries: int
    sellers: int
    shards: int = 1
    versions: int = 3
    apart: bool = False

    @property
    def payments(self) -> int:
        """In all shards together."""
        return self.entries // ENTRIES_EACH

    @property
    def names(self) -> list[str]:
        """The shards' names."""
        return [f"s{number}" for number in range(self.shards)]


def transaction_id(number: int) -> str:
    """The balance transaction of a payment, as Stripe's stand-in writes the one of this ordinal."""
    digits = ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = _DIGITS[digit] + digits
    return f"txn_3{digits}B7SandboxXbacklog0"


def key_of(number: int) -> str:
    """A key that looks issued."""
    return "ok1_" + urlsafe_b64encode(blake2b(number.to_bytes(8), digest_size=24).digest()).decode()


def at_us(number: int) -> int:
    """When the payment succeeded."""
    return FIRST_US + number * PACE_US


def gross(number: int) -> int:
    """What the payment came to."""
    return 1499 + 2 * (501 + number % 1000)


class Life(NamedTuple):
    """All that one payment brings."""

    payments: list[PaymentRow]
    entries: list[EntryRow]
    links: list[LinkRow]


@lru_cache(maxsize=2000)
def _booked(price: int, apart: bool) -> tuple[list[StoredEntry], list[BalanceLink]]:
    """The rows of a payment whose second item costs `price`, of sellers A and B, charge C and transaction T."""
    shares = shares_of([Item("{A}", 1499), Item("{B}", price, 2)], {}, FEE)
    entries = payment_entry("usd", "{C}", shares), stripe_fee_entry("usd", "{T}", STRIPE_FEE)
    links = [BalanceLink("{T}", entry.entry_id) for entry in entries]
    if not apart:
        return packed(entries, links)
    rows = [
        StoredEntry(
            *(e.entry_id, e.kind, e.currency, e.source, [p.account for p in e.postings], [p.amount_minor for p in e.postings]),
            *([p.seller for p in e.postings], None, None),
        )
        for e in entries
    ]
    return rows, links


@lru_cache(maxsize=1000)
def _terms_of(price: int) -> str:
    items = (Item("{A}", 1499), Item("{B}", price, 2))
    return terms_text(Terms(items, shares_of(items, {}, FEE), "2026-10-28.endive", payment_method="pm_card_visa"))


def life(number: int, lsn: int, shape: Shape) -> Life:
    """A payment that succeeded at the position `lsn`, and was made a little before."""
    key, time_us, price = key_of(number), at_us(number), 501 + number % 1000
    first, second = _sellers(number, shape.sellers)
    place, part, at_ms = slot(key), key[4:28], time_us // 1000
    terms = _terms_of(price).replace("{A}", first).replace("{B}", second)
    progress = PROGRESS.replace("{C}", f"ch_3{part}")
    amount, buyer = gross(number), f"buyer-{number % (shape.sellers * 2)}"
    rows = [
        PaymentRow(
            lsn - 10 * left, at_ms, place, key, status, shape.versions - left, buyer, "usd", amount, 0 if left else amount, 0,
            None if status == "created" else f"pi_3{part}", terms, "[]" if left else progress, time_us, time_us, time_us + DAY_US,
            left > 0, status, "router-1",
        )
        for left, status in zip(range(shape.versions - 1, -1, -1), STATES[-shape.versions :], strict=True)
    ]  # fmt: skip
    names = {"{A}": first, "{B}": second, "{C}": f"ch_3{part}", "{T}": transaction_id(number + 1)}

    def real(text: str) -> str:
        start = text.find("{")
        return text if start < 0 else text[:start] + names[text[start : start + 3]] + text[start + 3 :]

    booked, links = _booked(price, shape.apart)
    entries = [
        EntryRow(
            lsn, at_ms, place, key, real(row.entry_id), row.kind or row.entry_id.partition(":")[0], "usd",
            None if row.source is None else real(row.source), tuple(map(real, row.accounts)), tuple(row.amounts),
            None if row.sellers is None else tuple(map(real, row.sellers)), time_us,
            None if row.balance_transaction is None else real(row.balance_transaction), row.fee,
        )
        for row in booked
    ]  # fmt: skip
    apart = [
        LinkRow(lsn, at_ms, place, key, real(link.entry_id), real(link.balance_transaction), time_us)
        for link in (links if shape.apart else ())
    ]
    return Life(rows, entries, apart)


def _sellers(number: int, sellers: int) -> tuple[str, str]:
    """Two different ones, at random."""
    chance = blake2b(number.to_bytes(8), digest_size=8, salt=b"sellers").digest()
    first = int.from_bytes(chance[:4]) % sellers
    return f"seller-{first}", f"seller-{(first + 1 + int.from_bytes(chance[4:]) % (sellers - 1)) % sellers}"


def batches(shape: Shape, shard: int = 0) -> Iterator[FeedBatch]:
    """One shard's log from START_LSN on, cut as a worker cuts it."""
    numbers = range(shard, shape.payments, shape.shards)
    each = max(1, FEED_ROWS_MAX // (shape.versions + (4 if shape.apart else 1)))
    lsn = START_LSN
    for first in range(0, len(numbers), each):
        before, lives = lsn, []
        for number in numbers[first : first + each]:
            lsn += 100
            lives.append(life(number, lsn, shape))
        yield FeedBatch(
            shape.names[shard], "bench", 1, before, lsn,
            tuple(row for one in lives for row in one.payments),
            tuple(row for one in lives for row in one.entries),
            tuple(row for one in lives for row in one.links),
        )  # fmt: skip


def processor_s(running: Running, *others: str) -> dict[str, float]:
    """Processor time that the aggregator, its Postgres and the processes `others` have used so far. Other work on the machine
    hardly changes it."""
    pids = {each["name"]: each["pid"] for each in running.status["processes"]}
    found = {}
    for name in ("aggregator", "aggregator-db", *others):
        process = psutil.Process(pids[name])
        own = process.cpu_times()
        children = [each.cpu_times() for each in process.children(recursive=True)]
        found[name] = own.children_user + own.children_system + sum(each.user + each.system for each in [own, *children])
    return found


class Applied(NamedTuple):
    """What was measured: seconds while at least one batch was under way, the times of single batches, and the parts'
    processor time."""

    entries: int
    payments: int
    seconds: float
    batches_s: list[float]
    processor_s: dict[str, float]

    def shown(self) -> dict[str, Any]:
        """For a person."""
        times = sorted(self.batches_s)
        return {
            "entries": self.entries,
            "entries_per_s": round(self.entries / self.seconds),
            "payments_per_s": round(self.payments / self.seconds),
            "seconds": round(self.seconds, 1),
            "median_batch_s": round(times[len(times) // 2], 3),
            "slowest_batch_s": round(times[-1], 3),
            "processor_us_an_entry": {name: round(each * 1e6 / self.entries, 1) for name, each in self.processor_s.items()},
        }


def _nothing_more(lsn: int, shard: str) -> bytes:
    return encode_batch(FeedBatch(shard, "bench", 1, lsn, lsn + 1))


async def apply_all(running: Running, shape: Shape) -> Applied:
    """Post the whole backlog, each shard's batches one after the other, the shards beside one another; at the end of each
    an empty one, as a worker does that has caught up: nothing may be left for later then."""
    url = f"http://127.0.0.1:{running.port('aggregator')}/v1/feed"
    headers = {"Authorization": f"Bearer {running.settings.internal_token}"}
    logs = [batches(shape, shard) for shard in range(shape.shards)]
    last = [START_LSN] * shape.shards
    seconds, payments, times, spent = 0.0, 0, list[float](), processor_s(running)

    async def post(http: aiohttp.ClientSession, bodies: list[bytes]) -> None:
        for body in bodies:
            began_s = time.perf_counter()
            async with http.post(url, data=body) as answer:
                told = await answer.json()
            times.append(time.perf_counter() - began_s)
            if not told.get("applied"):
                raise SystemExit(f"a batch was refused: {told}")

    async with aiohttp.ClientSession(headers=headers) as http:
        while groups := [group for log in logs if (group := list(islice(log, GROUP)))]:
            bodies = [[encode_batch(batch) for batch in group] for group in groups]
            for group in groups:
                last[shape.names.index(group[-1].shard)] = group[-1].to_lsn
            payments += sum(len(batch.payments) // shape.versions for group in groups for batch in group)
            groups.clear()
            began_s = time.perf_counter()
            await asyncio.gather(*(post(http, each) for each in bodies))
            seconds += time.perf_counter() - began_s
        ends = [_nothing_more(lsn, shard) for lsn, shard in zip(last, shape.names, strict=True)]
        began_s = time.perf_counter()
        await asyncio.gather(*(post(http, [each]) for each in ends))
        seconds += time.perf_counter() - began_s
    used = {name: now_s - spent[name] for name, now_s in processor_s(running).items()}
    return Applied(payments * ENTRIES_EACH, payments, seconds, times, used)
