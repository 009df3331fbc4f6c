"""Sending events: in order per key, again with growing gaps for three days, then a dead letter.

One aggregator sends, whichever holds the lock. For each endpoint it takes the next events of each shard's feed and sends
those of different keys side by side, those of one key one after the other. What isn't answered 2xx is parked, and with it
everything later of the same key; then the endpoint's cursor moves on, in one transaction. So nothing is sent out of order
within a key, one slow key holds up no other, and what was sent just before a crash is sent again: at least once.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import msgspec

from aggregator import metrics, queries
from aggregator.database import Database
from aggregator.events.endpoints import Endpoint, Endpoints
from aggregator.events.guard import PrivateAddress, PublicResolver, may_reach
from aggregator.events.signing import headers
from oncepay.errors import OncepayError
from oncepay.logs import get_logger

SQL = queries.load("events.sql")
LOCK = 0x6F6E6365_65766E74
GAPS_S = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 64_800, 79_200)
"""From one try to the next; together three days."""
JITTER = 0.1
PAGE = 200
AT_ONCE = 16
"""Deliveries to one endpoint at the same time."""
PARKED_MAX = 10_000
"""So many parked events, and an endpoint gets no new ones until some are delivered or dead."""
TIMEOUT_S = 15.0
IDLE_S = 5.0
"""How often an endpoint is looked after when nothing was heard: another aggregator may have applied a batch."""
LOCK_EVERY_S = 5.0
KEEP_DAYS = 30.0
PRUNE_EVERY_S = 3_600.0
PROBLEM_CHARACTERS = 200
GONE = 410

_log = get_logger("events")


class Outcome(msgspec.Struct, frozen=True):
    """What became of one delivery; `problem` is empty when it was answered 2xx."""

    status: int | None
    problem: str


class _Lost(Exception):
    """The session that holds the lock is gone."""


def gap_s(attempts: int) -> float | None:
    """How long to wait after so many tries that failed; None: that was the last one."""
    if attempts > len(GAPS_S):
        return None
    return GAPS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)


class Sender:
    """Sends to all endpoints while this process holds the lock. `poke` says that there are new events."""

    def __init__(self, database: Database, endpoints: Endpoints, *, allow_private: bool) -> None:
        self._database = database
        self._endpoints = endpoints
        self._allow_private = allow_private
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        endpoints.on_change(self._changed.set)

    def poke(self) -> None:
        """A batch was applied here, or something was asked to be sent again."""
        self._news.set()
        self._news = asyncio.Event()

    async def work(self) -> None:
        """For ever. Without an endpoint nothing is connected."""
        while True:
            while not self._endpoints.all():
                self._changed.clear()
                await self._changed.wait()
            try:
                await self._lead()
            except (OncepayError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, _Lost) as error:
                _log.info("events wait", reason=str(error) or type(error).__name__)
            await asyncio.sleep(LOCK_EVERY_S)

    async def _lead(self) -> None:
        """Send while the lock is ours."""
        async with self._database.connection("work") as connection:
            if not await connection.fetchval("select pg_try_advisory_lock($1)", LOCK):
                return
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            connector = aiohttp.TCPConnector(
                limit=0, limit_per_host=AT_ONCE, resolver=None if self._allow_private else PublicResolver(), ttl_dns_cache=10
            )
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            try:
                async with aiohttp.ClientSession(
                    connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
                ) as http:
                    await self._serve(http, lost)
            finally:
                if not connection.is_closed():
                    await connection.execute("select pg_advisory_unlock($1)", LOCK)

    async def _serve(self, http: aiohttp.ClientSession, lost: asyncio.Event) -> None:
        """A task for each endpoint that is enabled, until there is none, or the lock is lost."""
        tasks: dict[str, asyncio.Task[None]] = {}
        pruning = asyncio.create_task(self._prune(), name="events-prune")
        ending = asyncio.create_task(lost.wait())
        try:
            while self._endpoints.all():
                wanted = {endpoint.id for endpoint in self._endpoints.all() if endpoint.enabled}
                for name in tasks.keys() - wanted:
                    tasks.pop(name).cancel()
                for name in wanted:
                    if name not in tasks or tasks[name].done():
                        tasks[name] = asyncio.create_task(self._look_after(http, name), name=f"events-{name}")
                self._changed.clear()
                changing = asyncio.create_task(self._changed.wait())
                await asyncio.wait({changing, ending, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
                changing.cancel()
                if lost.is_set():
                    raise _Lost("the lock's session has ended")
        finally:
            everything = [*tasks.values(), pruning, ending]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    async def _look_after(self, http: aiohttp.ClientSession, name: str) -> None:
        """Send to one endpoint as long as it is there."""
        while True:
            news = self._news
            endpoint = self._endpoints.find(name)
            if endpoint is None or not endpoint.enabled:
                return
            wait_s = IDLE_S
            try:
                sent = await self._round(http, endpoint)
                if sent:
                    continue
                wait_s = await self._until_due(name)
            except (OncepayError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                _log.warning("events can't be read", endpoint=name, error=str(error) or type(error).__name__)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await news.wait()

    async def _until_due(self, name: str) -> float:
        async with self._database.connection("work") as connection:
            row = await connection.fetchrow(SQL["next_due"], name)
        metrics.EVENTS_PARKED.labels(name).set(row["open"])
        if row["next_at"] is None:
            return IDLE_S
        left_s: float = (row["next_at"] - dt.datetime.now(dt.UTC)).total_seconds()
        return min(IDLE_S, max(0.05, left_s))

    async def _round(self, http: aiohttp.ClientSession, endpoint: Endpoint) -> int:
        """Due retries, then a page of each shard; how many events were dealt with."""
        async with self._database.connection("work") as connection:
            due = await connection.fetch(SQL["due"], endpoint.id, PAGE)
            parked = (await connection.fetchrow(SQL["next_due"], endpoint.id))["open"]
            shards = await connection.fetch(SQL["shards"], endpoint.id)
        count = await self._again(http, endpoint, due)
        if parked > PARKED_MAX:
            return count
        for shard, lsn, ordinal in shards:
            count += await self._fresh(http, endpoint, shard, lsn, ordinal)
        return count

    async def _again(self, http: aiohttp.ClientSession, endpoint: Endpoint, due: Sequence[asyncpg.Record]) -> int:
        """Retries: the first of each key, side by side."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(row: asyncpg.Record) -> None:
            async with gate:
                outcome = await self._send(http, endpoint, row)
            async with self._database.connection("work") as connection:
                if not outcome.problem:
                    await connection.execute(SQL["retry_done"], endpoint.id, row["id"])
                    return
                attempts = row["attempts"] + 1
                gap = gap_s(attempts)
                if gap is None:
                    metrics.EVENTS_DEAD.labels(endpoint.id).inc()
                    _log.error(
                        "event given up", endpoint=endpoint.id, event_id=row["id"], key=row["key"], problem=outcome.problem
                    )
                await connection.execute(
                    SQL["retry_later"], endpoint.id, row["id"], attempts, gap or 0.0, gap is None, outcome.problem
                )

        await asyncio.gather(*(one(row) for row in due))
        return len(due)

    async def _fresh(self, http: aiohttp.ClientSession, endpoint: Endpoint, shard: str, lsn: int, ordinal: int) -> int:
        """The next page of a shard's events: sent, or parked; then the cursor moves, unless a replay has moved it."""
        async with self._database.connection("work") as connection:
            rows = await connection.fetch(SQL["fresh"], shard, lsn, ordinal, PAGE)
            wanted = [row for row in rows if endpoint.wants(row["type"])]
            keys = list({row["key"] for row in wanted})
            blocked = {row["key"] for row in await connection.fetch(SQL["blocked"], endpoint.id, keys)}
        if not rows:
            return 0
        gate = asyncio.Semaphore(AT_ONCE)

        async def of_key(events: list[asyncpg.Record]) -> list[tuple[asyncpg.Record, int, float, str]]:
            """Those that have to be parked: the event, its tries, its gap in seconds, what went wrong."""
            if events[0]["key"] in blocked:
                return [(event, 0, 0.0, "") for event in events]
            for n, event in enumerate(events):
                async with gate:
                    outcome = await self._send(http, endpoint, event)
                if outcome.problem:
                    return [(event, 1, gap_s(1) or 0.0, outcome.problem), *((each, 0, 0.0, "") for each in events[n + 1 :])]
            return []

        ordered = sorted(wanted, key=itemgetter("key"))  # stable: within a key as in the log
        groups = [list(group) for _, group in groupby(ordered, key=itemgetter("key"))]
        parked = [each for found in await asyncio.gather(*map(of_key, groups)) for each in found]
        async with self._database.connection("work") as connection, connection.transaction():
            if parked:
                columns = [[event[name] for event, *_ in parked] for name in ("id", "shard", "lsn", "ordinal", "key")]
                rest = [[each[n] for each in parked] for n in (1, 2, 3)]
                await connection.execute(SQL["park"], endpoint.id, *columns, *rest)
            end = rows[-1]["lsn"], rows[-1]["ordinal"]
            await connection.execute(SQL["move_cursor"], endpoint.id, shard, *end, lsn, ordinal)
        return len(rows)

    async def _send(self, http: aiohttp.ClientSession, endpoint: Endpoint, event: asyncpg.Record) -> Outcome:
        """One delivery, and its line in the log."""
        body = await self._body(event)
        now_s, began_s = int(time.time()), time.monotonic()
        signed = headers(endpoint.current_secrets(now_s * 1000), event["id"], now_s, body)
        outcome = await self._post(http, endpoint.url, body, {**signed, "Content-Type": "application/json"})
        duration_ms = round((time.monotonic() - began_s) * 1000)
        async with self._database.connection("work") as connection:
            await connection.execute(
                SQL["log"], endpoint.id, event["id"], event["type"], event["key"], event["attempts"] + 1, outcome.status,
                outcome.problem, duration_ms,
            )  # fmt: skip
        metrics.EVENTS_SENT.labels(endpoint.id, "failed" if outcome.problem else "delivered").inc()
        if outcome.status == GONE:
            await self._endpoints.change(
                endpoint.id, lambda each: msgspec.structs.replace(each, enabled=False, reason="it answered 410 Gone")
            )
        return outcome

    async def _body(self, event: asyncpg.Record) -> bytes:
        """`{"type", "timestamp", "data"}`; a payment's items, which the log doesn't repeat, come from the table."""
        data = msgspec.json.decode(event["data"], type=dict[str, msgspec.Raw])
        if event["type"].startswith("payment."):
            async with self._database.connection("work") as connection:
                row = await connection.fetchrow(SQL["items"], [event["key"]])
            if row is not None and row["items"] is not None:
                data["items"] = msgspec.Raw(row["items"].encode())
                data["platform_fee"] = msgspec.Raw(str(row["platform_fee"]).encode())
        at = event["at"].astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return msgspec.json.encode({"type": event["type"], "timestamp": at, "data": data})

    async def _post(self, http: aiohttp.ClientSession, url: str, body: bytes, sent: dict[str, str]) -> Outcome:
        host = urlsplit(url).hostname or ""
        if not self._allow_private and not may_reach(host):
            return Outcome(None, f"{host} is in a private network")
        try:
            async with http.post(url, data=body, headers=sent, allow_redirects=False) as answer:
                good = 200 <= answer.status < 300
                return Outcome(answer.status, "" if good else f"answered {answer.status}")
        except PrivateAddress as error:
            return Outcome(None, str(error))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return Outcome(None, (str(error) or type(error).__name__)[:PROBLEM_CHARACTERS])

    async def _prune(self) -> None:
        """Forget what is older than KEEP_DAYS, once in a while."""
        while True:
            try:
                async with self._database.connection("work") as connection:
                    for name in ("prune_events", "prune_deliveries"):
                        await connection.execute(SQL[name], KEEP_DAYS)
                    await connection.execute(SQL["prune_dead"])
            except (OncepayError, asyncpg.PostgresError) as error:
                _log.info("nothing pruned", reason=str(error))
            await asyncio.sleep(PRUNE_EVERY_S)
