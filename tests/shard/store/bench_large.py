"""What a payment costs Postgres on a shard that holds ten thousand payments, and on one that holds ten million.

    python -m tests.shard.store.bench_large [--rows 10000000] [--count 20000] [--cycle 500000]

One Postgres, its log on disk, sized as a node of production is (`--shared-buffers`), with two databases. Both begin with ten
thousand payments; into one `--rows` settled ones are put by SQL. After a checkpoint the two take turns, since the machine's speed
changes from minute to minute: `--count` payments are accepted, attempted and settled in the store's own batches, each with its
entry, and each step comes LAG payments after the one before, as at some 300 a second. So it goes on for `--cycle` payments: as
many as come between two checkpoints (CHECKPOINT_TIMEOUT) at that rate. The log gets a page whole when it is first touched after a
checkpoint, which the first round has most of and the last one least. After SMALL_MOST payments the small database is replaced by
another one with ten thousand. Keys are issued as two key services do it, or any (`--keys random`).

Processor time is that of all of Postgres' processes; autovacuum's by database, as Postgres logs it. Also what a payment takes on
disk then. Prints one JSON object; exits with 1 when a payment costs more than RATIO_MAX times as much on the large shard, or
takes more than BYTES_MAX. `python -m loadtest.bench large` calls it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg
import psutil
from msgspec.structs import replace

from keygen.pool import TURN_S, WAITING_A_TURN
from keygen.reserve import Reserve
from oncepay.cart import Fee, Item, shares_of
from oncepay.events import AttemptStarted, IntentCreated, IntentSeen
from oncepay.keys import ISSUED_PREFIX, MacSecrets, slot
from oncepay.ledger import BalanceLink, Entry
from oncepay.payment import Charge, IntentView, Key, Payment, Status, Terms
from oncepay.transition import Event, move
from shard.store.batch import _CALL
from shard.store.migrate import migrate
from shard.store.rows import Put, change_arrays, entry_arrays, new_arrays
from tests.postgres_fixture import PostgresServer

SMALL = 10_000
SMALL_MOST = 70_000
BATCH = 64
LAG = 512
"""Payments between one step of a payment and the next: some 1.7 s at 300 a second."""
CHECKPOINT_TIMEOUT = "30min"
BYTES_MAX = 1_200
RATIO_MAX = 1.1
LOADERS = 2
AT_ONCE = 20_000
KEYS_AT_ONCE = 20
"""Keys that a client takes from one service."""
TABLES = ("payments", "entries")
READS = "select coalesce(sum(reads), 0)::bigint from pg_stat_io where backend_type = 'client backend' and object = 'relation'"

VACUUM = re.compile(r'automatic [a-z ]+ of table "([^".]+)\.[^"]+".*?user: ([0-9.]+) s, system: ([0-9.]+) s', re.DOTALL)

GROW = """
with pattern as (
    select p.*, row_number() over () as number, count(*) over () as patterns
    from (select * from oncepay.payments where status = 'succeeded' order by created_at desc limit 64) p
), made as (
    select pattern.*, 'ok1_' || translate(encode(substr(sha256(int8send(n)), 1, 24), 'base64'), '+/', '-_') as new_key, n
    from generate_series($1::bigint, $2::bigint) n join pattern on pattern.number = n % pattern.patterns + 1
), placed as (
    select m.*, oncepay.slot_of(new_key) as new_slot, now() - interval '60 days' + n * interval '1 millisecond' as at,
           to_char(n, 'FM0000000000') || encode(substr(sha256(int8send(-n)), 1, 6), 'hex') as id
    from made m
), payments as (
    insert into oncepay.payments (
        slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent, fingerprint, agreed,
        course, open_work, disputed, event, actor, created_at, updated_at, expires_at)
    select new_slot, new_key, status, version, 'buyer-' || n % 1000003, currency, amount, amount_captured, amount_refunded,
           'pi_3' || id, fingerprint, agreed, replace(course, 'ch_3', 'ch_3' || left(id, 1)), open_work, disputed, event, actor,
           at, at, at + interval '1 day'
    from placed
)
insert into oncepay.entries (
    slot, key, entry_id, kind, currency, source, accounts, amounts, sellers, created_at, balance_transaction, fee)
select new_slot, new_key, e.entry_id, e.kind, e.currency, 'ch_3' || id, e.accounts, e.amounts, e.sellers, at,
       'txn_3' || id, e.fee
from placed m join oncepay.entries e on e.slot = m.slot and e.key = m.key
"""


def keys_at_random() -> Iterator[str]:
    """Keys as clients choose them: any slot after any other."""
    while True:
        yield ISSUED_PREFIX + os.urandom(24).hex()[:32]


def keys_in_turn(per_s: float = 300.0) -> Iterator[str]:
    """Keys as two key services give them out that are asked for `per_s` together, and have been for some hours."""
    secrets = MacSecrets(1, {1: os.urandom(32)})
    services = [Reserve(), Reserve()]
    aim = int(per_s / len(services) * TURN_S * WAITING_A_TURN)
    for service in services:
        service.add(os.urandom(32), 0, 1 << 24)
        service.make_wait(aim, secrets)
        service.take(aim // 2, secrets)
    while True:
        for service in services:
            service.make_wait(aim - service.waiting, secrets)
            yield from service.take(KEYS_AT_ONCE, secrets)


def new_payment(number: int, key: str) -> Payment:
    """Two items of two sellers, as the routers make it."""
    items = (Item(f"seller-{number % 40}", 1499, 1, "A record"), Item(f"seller-{(number + 7) % 40}", 501 + number % 1000, 2))
    shares = shares_of(items, {}, Fee(1000))
    now_ms = int(time.time() * 1000)
    terms = Terms(items, shares, "2026-10-28.endive", payment_method="pm_card_visa", on_decline="fail")
    amount = sum(share.gross for share in shares)
    buyer = f"buyer-{int.from_bytes(os.urandom(3)) % 1_000_003}"
    return Payment(Key(key), Status.CREATED, 1, buyer, "usd", amount, terms, os.urandom(16), now_ms, now_ms, now_ms + 86_400_000)


def put_of(payment: Payment, name: str, *events: Event) -> Put:
    """The change that `events` make."""
    after, entries, links = payment, tuple[Entry, ...](), tuple[BalanceLink, ...]()
    for event in events:
        moved = move(after, event)
        after, entries, links = moved.payment, entries + moved.entries, links + moved.links
    return Put(replace(after, version=payment.version + 1), payment.version, name, entries, links)


def attempted(payment: Payment, number: int) -> Put:
    """The intent's id and the first attempt, in one commit."""
    intent = f"pi_3{number:010d}{os.urandom(6).hex()}"
    return put_of(
        payment, "intent created", IntentCreated(intent, f"{intent}_secret_{'x' * 24}"), AttemptStarted(1, "pm_card_visa")
    )


def settled(payment: Payment, number: int) -> Put:
    """Stripe's answer: paid, with its fee."""
    fee = payment.amount * 29 // 1000 + 30
    mark = f"3{number:010d}{os.urandom(6).hex()}"
    charge = Charge(f"ch_{mark}", "succeeded", f"txn_{mark}", fee, payment.amount - fee, payment.amount, "usd")
    return put_of(payment, "confirm answered", IntentSeen(IntentView(payment.intent, "succeeded", payment.amount, charge=charge)))


async def commit(session: asyncpg.Connection, new: Sequence[Put], changes: Sequence[Put]) -> None:
    """One batch. Raises RuntimeError when a row of it was refused."""
    new, changes = (sorted(puts, key=lambda put: (slot(put.payment.key), put.payment.key)) for puts in (new, changes))
    arrays = (*new_arrays(new), *change_arrays(changes), *entry_arrays(changes))
    if rows := await session.fetch(_CALL, [0], None, "bench", "bench", *arrays, [], [], [], []):
        raise RuntimeError(f"refused: {dict(rows[0])}")


class Meter:
    """Processor seconds of Postgres, and bytes of its log, from `begin` on."""

    def __init__(self, server: PostgresServer, session: asyncpg.Connection) -> None:
        assert server.process is not None
        self._postmaster = psutil.Process(server.process.pid)
        self._session = session

    def _processor_s(self) -> dict[str, float]:
        """By kind of process. `ended`: those that have, such as autovacuum's workers; their parent knows it."""
        own = self._postmaster.cpu_times()
        found: defaultdict[str, float] = defaultdict(float)
        found |= {"postmaster": own.user + own.system, "ended": own.children_user + own.children_system}
        for process in self._postmaster.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                times, command = process.cpu_times(), process.cmdline() or ["ended"]  # not waited for yet
                name = command[0].removeprefix("postgres: ").strip()
                found["vacuum" if name.startswith("autovacuum worker") else name] += times.user + times.system
        return found

    async def _log_bytes(self) -> int:
        return int(await self._session.fetchval("select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"))

    async def _reads(self) -> int:
        """Pages that the session found in the system's cache or on disk, and not in Postgres' own."""
        return int(await self._session.fetchval(READS))

    async def begin(self) -> None:
        self._began = (self._processor_s(), await self._log_bytes(), await self._reads(), time.monotonic())

    async def per(self, count: int) -> dict[str, float]:
        """What each of `count` payments took: microseconds without vacuum, bytes of log, pages read."""
        began_cpu_s, began_bytes, began_reads, began_s = self._began
        now_s = self._processor_s()
        # A worker that was there at the start and has ended since is with those that ended, whole: in the sum it isn't twice.
        spent_s = {kind: now_s.get(kind, 0.0) - began_cpu_s.get(kind, 0.0) for kind in {*now_s, *began_cpu_s}}
        vacuum_s = spent_s.get("vacuum", 0.0) + spent_s.get("ended", 0.0)
        log_bytes = await self._log_bytes() - began_bytes
        each = {
            "cpu_us": (sum(spent_s.values()) - vacuum_s) / count * 1e6, "log_bytes": log_bytes / count,
            "reads": (await self._reads() - began_reads) / count,
            "per_s": count / (time.monotonic() - began_s),
        }  # fmt: skip
        return {name: round(value, 1) for name, value in each.items()}


async def round_of(
    server: PostgresServer, session: asyncpg.Connection, count: int, numbers: itertools.count[int], keys: Iterator[str]
) -> dict[str, Any]:
    """`count` payments accepted and settled."""
    meter = Meter(server, session)
    rows = [new_payment(number, key) for number, key in zip(itertools.islice(numbers, count), keys, strict=False)]
    accepted = _batched([Put(row, 0, "accepted 0123456789abcdef-1") for row in rows])
    first = _batched([attempted(row, number) for row, number in zip(rows, numbers, strict=False)])
    last = [[settled(put.payment, number) for put, number in zip(puts, numbers, strict=False)] for puts in first]
    lag = LAG // BATCH
    await meter.begin()
    for step in range(len(accepted) + 2 * lag):
        if step < len(accepted):
            await commit(session, accepted[step], [])
        if 0 <= step - lag < len(first):
            await commit(session, [], first[step - lag])
        if 0 <= step - 2 * lag < len(last):
            await commit(session, [], last[step - 2 * lag])
    return await meter.per(count)


def _batched(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def means(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Not medians: what is dearer at first is a part of what all together cost."""
    return {name: round(statistics.mean(each[name] for each in rounds), 1) for name in rounds[0]}


async def grow(dsn: str, rows: int) -> float:
    """Put settled payments there, by several sessions; how many seconds it took."""
    began_s, left = time.monotonic(), iter(range(0, rows, AT_ONCE))
    done = 0

    async def load() -> None:
        nonlocal done
        session = await asyncpg.connect(dsn)
        await session.execute("set synchronous_commit = off")
        for first in left:
            await session.execute(GROW.replace("$1", str(first + 1)).replace("$2", str(min(first + AT_ONCE, rows))))
            done += AT_ONCE
            if done % (50 * AT_ONCE) == 0:
                left_s = (time.monotonic() - began_s) / done * max(0, rows - done)
                print(f"{done:,} of {rows:,} payments, {left_s:.0f} s left", file=sys.stderr, flush=True)
        await session.close()

    await asyncio.gather(*(load() for _ in range(LOADERS)))
    return time.monotonic() - began_s


async def on_disk(session: asyncpg.Connection) -> dict[str, Any]:
    """Bytes of a settled payment, in all and by table and index."""
    count = int(await session.fetchval("select count(*) from oncepay.payments"))
    rows = await session.fetch(
        "select relname as name, pg_table_size(oid) as bytes from pg_class"
        " where relnamespace = 'oncepay'::regnamespace and relkind in ('r', 'i') order by 2 desc"
    )
    each = {row["name"]: round(row["bytes"] / count, 1) for row in rows if row["bytes"] > count / 2}
    return {"payments": count, "bytes_each": round(sum(row["bytes"] for row in rows) / count, 1), "by_relation": each}


async def connected(dsn: str) -> asyncpg.Connection:
    """As the store connects."""
    return await asyncpg.connect(dsn, server_settings={
        "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
        "jit": "off",
    })  # fmt: skip


async def begun(server: PostgresServer, numbers: itertools.count[int]) -> str:
    """The dsn of a database with ten thousand payments."""
    dsn = server.new_database()
    await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={})
    session = await connected(dsn)
    for _ in range(SMALL // 2_000):
        await round_of(server, session, 2_000, numbers, keys_at_random())
    await vacuumed(session)
    await session.close()
    return dsn


async def vacuumed(session: asyncpg.Connection) -> None:
    for table in TABLES:
        await session.execute(f"vacuum (analyze) oncepay.{table}")


def vacuums(log: str, large: str, payments: int) -> dict[str, float]:
    """Microseconds of autovacuum for each payment, in the database `large` and in all others."""
    spent_s = {True: 0.0, False: 0.0}
    for database, user_s, system_s in VACUUM.findall(log):
        spent_s[database == large] += float(user_s) + float(system_s)
    return {name: round(spent_s[name == "large"] / payments * 1e6, 1) for name in ("small", "large")}


async def measure(options: Any) -> dict[str, Any]:
    parameters = {
        "shared_buffers": options.shared_buffers, "max_wal_size": "16GB", "checkpoint_timeout": CHECKPOINT_TIMEOUT,
        "max_connections": "20", "autovacuum_naptime": "15s", "autovacuum_vacuum_cost_delay": "10ms",
        "maintenance_work_mem": "256MB", "wal_log_hints": "on", "full_page_writes": options.full_pages,
    }  # fmt: skip
    parameters |= {"log_autovacuum_min_duration": "0", "huge_pages": "try"}
    rounds = max(1, options.cycle // options.count)
    numbers = itertools.count(10_000_000_000 - 10 * options.cycle - 10 * SMALL * (rounds + 1))
    keys = keys_in_turn() if options.keys == "issued" else keys_at_random()
    with PostgresServer(fsync=True, parameters=parameters) as server:
        a_small_one = max(1, (SMALL_MOST - SMALL) // options.count)
        smalls = [await begun(server, numbers) for _ in range(-(-rounds // a_small_one))]
        dsn = await begun(server, numbers)
        took_s = await grow(dsn, options.rows)
        session = await connected(dsn)
        await vacuumed(session)
        await session.execute("checkpoint")
        huge_pages = await session.fetchval("show huge_pages_status")
        logged = (server.folder / "log").stat().st_size
        small, large, besides = [], [], []  # none of the sessions ends: what ends counts as vacuum
        for number in range(rounds):
            large.append(await round_of(server, session, options.count, numbers, keys))
            if number % a_small_one == 0:
                besides.append(await connected(smalls[number // a_small_one]))
            small.append(await round_of(server, besides[-1], options.count, numbers, keys_at_random()))
            print(f"round {number + 1} of {rounds}: {large[-1]} and {small[-1]}", file=sys.stderr, flush=True)
        disk = await on_disk(session)
        vacuum_us = vacuums((server.folder / "log").read_text()[logged:], dsn.rpartition("/")[2], rounds * options.count)
        for each in (session, *besides):
            await each.close()
    small_mean, large_mean = means(small), means(large)
    ratios = {name: round(large_mean[name] / small_mean[name], 2) for name in ("cpu_us", "log_bytes")}
    with_vacuum = [small_mean["cpu_us"] + vacuum_us["small"], large_mean["cpu_us"] + vacuum_us["large"]]
    ratios["cpu_us_with_vacuum"] = round(with_vacuum[1] / with_vacuum[0], 2)
    return {
        "rows_added": options.rows, "rows_added_in_s": round(took_s), "keys": options.keys,
        "payments_a_cycle": rounds * options.count, "shared_buffers": options.shared_buffers,
        "huge_pages": huge_pages,
        "small": small_mean, "large": large_mean, "vacuum_us": vacuum_us, "ratios": ratios,
        "small_rounds": small, "large_rounds": large, "disk": disk,
        "load_average": [round(each, 1) for each in os.getloadavg()],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="settled payments put there by SQL (default: %(default)s)")
    parser.add_argument("--count", type=int, default=20_000, help="payments a round (default: %(default)s)")
    parser.add_argument("--cycle", type=int, default=500_000, help="payments measured on each (default: %(default)s)")
    parser.add_argument("--keys", choices=("issued", "random"), default="issued", help="whose keys (default: %(default)s)")
    parser.add_argument("--full-pages", choices=("on", "off"), default="on", help="off: what they cost (default: %(default)s)")
    parser.add_argument("--shared-buffers", default="4GB", help="Postgres' own cache (default: %(default)s)")
    found = asyncio.run(measure(parser.parse_args()))
    print(json.dumps(found, indent=2))
    if found["ratios"]["cpu_us_with_vacuum"] > RATIO_MAX or found["disk"]["bytes_each"] > BYTES_MAX:
        raise SystemExit(f"more than {RATIO_MAX} times the processor time, or more than {BYTES_MAX} bytes")


if __name__ == "__main__":
    main()
