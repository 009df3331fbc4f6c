"""How fast a backlog of ledger entries is applied, and how fast the four main answers are afterwards.

    python -m loadtest.bench.derived [--entries 1000000] [--sellers 10000] [--requests 400]

An aggregator with its Postgres, and nothing that feeds it but this: batches of FEED_ROWS_MAX rows, as a worker sends them when it
has fallen behind. Each payment has its row, its entry (two sellers), Stripe's fee and the links. Then revenue by day, balance,
orders and the statement of sellers and buyers at random, one request after the other, over HTTP. Prints one JSON object;
exits with 1 when an answer takes longer at the median than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec

from loadtest.bench.own_cluster import Running, cluster, machine
from oncepay.cart import Fee, Item, shares_of
from oncepay.feed import FEED_ROWS_MAX, EntryRow, FeedBatch, LinkRow, PaymentRow, encode_batch
from oncepay.keys import slot
from oncepay.ledger import Entry, payment_entry, stripe_fee_entry

MEDIAN_MAX_MS = 20.0
DAYS = 90
DAY_US = 86_400_000_000
FIRST_US = 1_760_000_000_000_000
FEE = Fee(1000)
ROWS_A_PAYMENT = 5
SHARD = "s0"


def rows_of(number: int, lsn: int, sellers: int, buyers: int) -> tuple[PaymentRow, list[EntryRow], list[LinkRow]]:
    """A payment that succeeded, at the position `lsn`."""
    key, chance = f"bench-{number}", random.Random(number)
    items = [Item(f"seller-{chance.randrange(sellers)}", 1499), Item(f"seller-{chance.randrange(sellers)}", 501, 2)]
    at_us, shares, place = FIRST_US + number * (DAYS * DAY_US // 10_000_000), shares_of(items, {}, FEE), slot(key)
    total = sum(share.gross for share in shares)
    terms = {
        "items": [{"seller": item.seller, "amount": item.amount, "quantity": item.quantity} for item in items],
        "shares": [{"seller": share.seller, "gross": share.gross, "fee": share.fee} for share in shares],
    }
    payment = PaymentRow(
        lsn, at_us // 1000, place, key, "succeeded", 4, f"buyer-{number % buyers}", "usd", total, total, 0, f"pi_{number}",
        json.dumps(terms), "{}", at_us, at_us, at_us + DAY_US, False,
    )  # fmt: skip
    made = [payment_entry("usd", f"ch_{number}", shares), stripe_fee_entry("usd", f"txn_{number}", 117)]
    links = [LinkRow(lsn, at_us // 1000, place, key, entry.entry_id, f"txn_{number}", at_us) for entry in made]
    return payment, [_row(entry, key, place, lsn, at_us) for entry in made], links


def _row(entry: Entry, key: str, place: int, lsn: int, at_us: int) -> EntryRow:
    postings = entry.postings
    return EntryRow(
        lsn, at_us // 1000, place, key, entry.entry_id, entry.kind, entry.currency, entry.source,
        tuple(p.account for p in postings), tuple(p.amount_minor for p in postings), tuple(p.seller for p in postings), at_us,
    )  # fmt: skip


def batches(entries: int, sellers: int, start: int) -> Iterator[FeedBatch]:
    """A log of `entries` entries (two a payment) from the position `start` on, cut as a worker cuts it."""
    each, lsn = FEED_ROWS_MAX // ROWS_A_PAYMENT, start
    for first in range(0, entries // 2, each):
        payments, found, links = [], list[EntryRow](), list[LinkRow]()
        before = lsn
        for number in range(first, min(first + each, entries // 2)):
            lsn += 100
            payment, of_entries, of_links = rows_of(number, lsn, sellers, sellers * 2)
            payments.append(payment)
            found += of_entries
            links += of_links
        yield FeedBatch(SHARD, "bench", 1, before, lsn, tuple(payments), tuple(found), tuple(links))


async def apply_all(running: Running, entries: int, sellers: int) -> dict[str, Any]:
    """Post the backlog. The time is that of the posts alone: making the batches is the bench's own affair."""
    url = f"http://127.0.0.1:{running.port('aggregator')}/v1/feed"
    headers = {"Authorization": f"Bearer {running.settings.internal_token}"}
    spent_s, applied, slowest_s, took_s = 0.0, 0, 0.0, 0.0
    async with aiohttp.ClientSession(headers=headers) as http:
        for batch in batches(entries, sellers, 1000):
            body = encode_batch(batch)
            began_s = time.perf_counter()
            async with http.post(url, data=body) as answer:
                told = await answer.json()
            took_s = time.perf_counter() - began_s
            if not told.get("applied"):
                raise SystemExit(f"a batch was refused: {told}")
            spent_s, applied, slowest_s = spent_s + took_s, applied + len(batch.entries), max(slowest_s, took_s)
    return {
        "entries": applied,
        "entries_per_s": round(applied / spent_s),
        "slowest_batch_s": round(slowest_s, 2),
        "last_batch_s": round(took_s, 2),
    }


async def ask(running: Running, sellers: int, requests: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each of the main answers, of sellers and buyers at random."""
    status = running.status
    chance, found = random.Random(7), dict[str, dict[str, float]]()
    paths = {
        "revenue": "/v1/sellers/seller-{seller}/revenue?currency=usd&interval=day",
        "balance": "/v1/sellers/seller-{seller}/balance",
        "orders": "/v1/buyers/buyer-{buyer}/orders",
        "statement": "/v1/sellers/seller-{seller}/statement?currency=usd",
    }
    async with aiohttp.ClientSession(
        status["urls"]["aggregator"], headers={"Authorization": f"Bearer {status['api_key']}"}
    ) as http:
        for name, path in paths.items():
            times = []
            for _ in range(requests):
                asked = path.format(seller=chance.randrange(sellers), buyer=chance.randrange(sellers * 2))
                began_s = time.perf_counter()
                async with http.get(asked) as answer:
                    body = await answer.read()
                times.append((time.perf_counter() - began_s) * 1000)
                if answer.status != 200:
                    raise SystemExit(f"{asked}: {answer.status} {msgspec.json.decode(body)}")
            times.sort()
            found[name] = {"median_ms": round(statistics.median(times), 2), "p99_ms": round(times[int(len(times) * 0.99) - 1], 2)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="how many entries (default: %(default)s)")
    parser.add_argument("--sellers", type=int, default=10_000, help="how many sellers (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=400, help="how often each answer is asked for (default: %(default)s)")
    options = parser.parse_args()
    with cluster("bench-derived", "--shards", SHARD, "--only", "etcd,aggregator-db,aggregator") as running:
        applied = asyncio.run(apply_all(running, options.entries, options.sellers))
        answers = asyncio.run(ask(running, options.sellers, options.requests))
    print(json.dumps({"machine": machine(), "sellers": options.sellers, "applied": applied, "answers": answers}, indent=2))
    return 1 if any(each["median_ms"] > MEDIAN_MAX_MS for each in answers.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
