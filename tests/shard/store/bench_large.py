"""What a payment costs Postgres on a shard that holds ten thousand payments, and on one that holds ten million.

    python -m tests.shard.store.bench_large [--rows 10000000] [--count 20000] [--cycle 500000]

One Postgres, its log on disk, sized as a node of production is (`--shared-buffers`). Payments are accepted, attempted and settled
in the store's own batches, each with its entry; processor time is that of all of Postgres' processes, its checkpoints included.
Then `--rows` settled payments are put there by SQL, a checkpoint is made, and the same is measured again over `--cycle` payments:
as many as come between two checkpoints (CHECKPOINT_TIMEOUT) of a shard that settles some 300 a second. The log gets a page whole
when it is first touched after a checkpoint, which the first round has most of and the last one least. Also what a payment takes
on disk then. Prints one JSON object; exits with 1 when a payment costs more than RATIO_MAX times as much on the large shard, or
takes more than BYTES_MAX. `python -m loadtest.bench large` calls it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
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
BATCH = 64
CHECKPOINT_TIMEOUT = "30min"
BYTES_MAX = 1_200
RATIO_MAX = 1.1
LOADERS = 2
AT_ONCE = 20_000
KEYS_AT_ONCE = 20
"""Keys that a client takes from one service."""
TABLES = ("payments", "entries")
READS = "select coalesce(sum(reads), 0)::bigint from pg_stat_io where backend_type = 'client backend' and object = 'relation'"
AUXILIARY = ("autovacuum", "logical replication", "background writer", "io worker")

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
                name = command[0].removeprefix("postgres: ")
                kind = "session" if " " in name.strip() and not name.startswith(AUXILIARY) else name.strip()
                found[kind] += times.user + times.system
        return found

    async def _log_bytes(self) -> int:
        return int(await self._session.fetchval("select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"))

    async def _reads(self) -> int:
        """Pages that the session found in the system's cache or on disk, and not in Postgres' own."""
        return int(await self._session.fetchval(READS))

    async def begin(self) -> None:
        self._began = (self._processor_s(), await self._log_bytes(), await self._reads(), time.monotonic())

    async def per(self, count: int) -> dict[str, float]:
        began_cpu_s, began_bytes, began_reads, began_s = self._began
        now_s = self._processor_s()
        # A worker that was there at the start and has ended since is with those that ended, whole: in the sum it isn't twice.
        spent_s = {kind: now_s.get(kind, 0.0) - began_cpu_s.get(kind, 0.0) for kind in {*now_s, *began_cpu_s}}
        log_bytes = await self._log_bytes() - began_bytes
        self.by_kind = {kind: round(value_s / count * 1e6, 1) for kind, value_s in spent_s.items()}
        each = {
            "cpu_us": sum(spent_s.values()) / count * 1e6, "log_bytes": log_bytes / count,
            "reads": (await self._reads() - began_reads) / count, "per_s": count / (time.monotonic() - began_s),
        }  # fmt: skip
        return {name: round(value, 1) for name, value in each.items()}


async def round_of(
    server: PostgresServer, session: asyncpg.Connection, count: int, numbers: itertools.count[int], keys: Iterator[str]
) -> dict[str, Any]:
    """`count` payments accepted, then settled."""
    meter = Meter(server, session)
    rows = [new_payment(number, key) for number, key in zip(itertools.islice(numbers, count), keys, strict=False)]
    await meter.begin()
    for batch in _batched(rows):
        await commit(session, [Put(row, 0, "accepted 0123456789abcdef-1") for row in batch], [])
    accept = await meter.per(count)
    by_kind = meter.by_kind
    first = [attempted(row, number) for row, number in zip(rows, numbers, strict=False)]
    await meter.begin()
    for puts in _batched(first):
        await commit(session, [], puts)
    last = [settled(put.payment, number) for put, number in zip(first, numbers, strict=False)]
    for puts in _batched(last):
        await commit(session, [], puts)
    settle = await meter.per(count)
    whole = {name: round(accept[name] + settle[name], 1) for name in ("cpu_us", "log_bytes", "reads")}
    kinds = sorted({*by_kind, *meter.by_kind})
    by_kind = {kind: round(by_kind.get(kind, 0.0) + meter.by_kind.get(kind, 0.0), 1) for kind in kinds}
    return {"accept": accept, "settle": settle, "payment": whole, "cpu_us_by_process": by_kind}


def _batched(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def means(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Not medians: what is dearer at first is a part of what all together cost."""
    return {
        step: {name: round(statistics.mean(each[step].get(name, 0) for each in rounds), 1) for name in rounds[0][step]}
        for step in rounds[0]
    }


async def cost(
    server: PostgresServer,
    session: asyncpg.Connection,
    options: Any,
    numbers: itertools.count[int],
    payments: int,
    keys: Iterator[str],
) -> list[dict[str, Any]]:
    """Rounds of `payments` together, the first of which begins right after a checkpoint."""
    await session.execute("checkpoint")
    return [await round_of(server, session, options.count, numbers, keys) for _ in range(max(1, payments // options.count))]


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


async def measure(options: Any) -> dict[str, Any]:
    parameters = {
        "shared_buffers": options.shared_buffers, "max_wal_size": "16GB", "checkpoint_timeout": CHECKPOINT_TIMEOUT,
        "max_connections": "20", "autovacuum_naptime": "15s", "autovacuum_vacuum_cost_delay": "10ms",
        "maintenance_work_mem": "256MB", "wal_log_hints": "on", "full_page_writes": options.full_pages,
    }  # fmt: skip
    with PostgresServer(fsync=True, parameters=parameters) as server:
        dsn = server.new_database()
        await migrate(dsn, shard="s0", ranges=[(0, 65_535)], passwords={})
        session = await asyncpg.connect(dsn, server_settings={
            "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off",
            "jit": "off",
        })  # fmt: skip
        numbers = itertools.count(10_000_000_000 - 10 * (options.cycle + options.small) - 10 * SMALL)
        for _ in range(SMALL // 2_000):
            await round_of(server, session, 2_000, numbers, keys_at_random())
        for table in TABLES:
            await session.execute(f"vacuum (analyze) oncepay.{table}")
        small = await cost(server, session, options, numbers, options.small, keys_at_random())
        disk_small = await on_disk(session)
        took_s = await grow(dsn, options.rows)
        for table in TABLES:
            await session.execute(f"vacuum (analyze) oncepay.{table}")
        large = await cost(server, session, options, numbers, options.cycle, keys_at_random())
        for table in TABLES:
            await session.execute(f"vacuum (analyze) oncepay.{table}")
        large_in_turn = await cost(server, session, options, numbers, options.cycle, keys_in_turn())
        disk = await on_disk(session)
        await session.close()
    at_first, at_last, small_mean, large_mean = large[0], large[-1], means(small), means(large)
    ratios = {
        step: {name: round(large_mean[step][name] / small_mean[step][name], 2) for name in ("cpu_us", "log_bytes")}
        for step in ("accept", "settle", "payment")
    }
    turn_mean = means(large_in_turn)
    return {
        "in_turn": turn_mean, "in_turn_rounds_cpu_us": [each["payment"]["cpu_us"] for each in large_in_turn],
        "in_turn_rounds_reads": [each["payment"]["reads"] for each in large_in_turn],
        "in_turn_rounds_log": [each["payment"]["log_bytes"] for each in large_in_turn],
        "in_turn_by_process": [each["cpu_us_by_process"] for each in large_in_turn],
        "rows_added": options.rows, "rows_added_in_s": round(took_s), "small": small_mean, "large": large_mean, "ratios": ratios,
        "large_at_first": at_first, "large_at_last": at_last, "payments_a_cycle": len(large) * options.count,
        "large_rounds_cpu_us": [each["payment"]["cpu_us"] for each in large],
        "large_rounds_reads": [each["payment"]["reads"] for each in large],
        "large_rounds_by_process": [each["cpu_us_by_process"] for each in large],
        "disk_small": disk_small, "disk": disk, "shared_buffers": options.shared_buffers,
        "load_average": [round(each, 1) for each in os.getloadavg()],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="settled payments put there by SQL (default: %(default)s)")
    parser.add_argument("--count", type=int, default=20_000, help="payments a round (default: %(default)s)")
    parser.add_argument("--small", type=int, default=60_000, help="payments measured on the small shard (default: %(default)s)")
    parser.add_argument("--cycle", type=int, default=500_000, help="payments measured on the large one (default: %(default)s)")
    parser.add_argument("--full-pages", choices=("on", "off"), default="on", help="off: what they cost (default: %(default)s)")
    parser.add_argument("--shared-buffers", default="4GB", help="Postgres' own cache (default: %(default)s)")
    found = asyncio.run(measure(parser.parse_args()))
    print(json.dumps(found, indent=2))
    if found["ratios"]["payment"]["cpu_us"] > RATIO_MAX or found["disk"]["bytes_each"] > BYTES_MAX:
        raise SystemExit(f"more than {RATIO_MAX} times the processor time, or more than {BYTES_MAX} bytes")


if __name__ == "__main__":
    main()
