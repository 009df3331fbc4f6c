"""Workers in all weathers: whatever happens meanwhile, in the end cache and table, aggregator and shard, rows and Stripe agree,
and nothing was polled too young, twice in a round, or beyond the account's limits.

Nobody drives the payments but the workers, and no webhook comes. Their limits are low enough to be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest

from deploy.local import Cluster
from deploy.local.faults import FAULTS, Hands, inflict
from deploy.local.ports import free_base
from oncepay.etcd import Etcd
from oncepay.payment import Payment
from oncepay.settings import PollSettings, Settings, dump
from shard.store.store import Shards
from shard.worker.fill import OLD
from shard.worker.lease import Holder
from tests.shard.worker.harness import SHARD, eventually
from tests.shard.worker.test_worker import payment

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(400)]

PARTS = ("etcd", "nodes", "aggregator-db", "stripe", "tipalti", "worker", "aggregator")
POLL = PollSettings(first_s=1.0, max_s=4.0)
LIMIT_PER_S = 30
"""Calls of one kind that Stripe allows in a second."""
SLACK_S = 0.05
"""What the clocks of two processes, and the time of a commit, may differ by."""
SETTLED_S = 150.0
CHANGE_S = 3_000.0
"""Of the stand-in's clock: when Stripe is done with the payments that change."""
SELDOM_S = 75.0
"""Then all have been looked at often enough that they are asked for singly very rarely: more than 8 and less than 32 times
(`SINGLE_AT`), POLL.max_s apart, after two single looks at each as fast as LIMIT_PER_S lets them be."""
WAITING = 400
BEFORE_MAX = 100
TRIES_MAX = 63


@pytest.fixture(scope="module")
def weather_cluster(cluster_folder: Path) -> Iterator[Cluster]:
    """One shard with its workers, and no router. ONCEPAY_TEST_WEATHER_HOME names a running one."""
    from cli.up import hooks

    if running := os.environ.get("ONCEPAY_TEST_WEATHER_HOME"):
        made = Cluster(Path(running))
    else:
        made = Cluster(cluster_folder / "weather", free_base(), shards=(SHARD,), parts=PARTS)
        made.up(hooks=hooks(made))
    try:
        (made.home / "oncepay.toml").write_bytes(dump(settings_of(made)))
        workers = [f"worker-{SHARD}-1", f"worker-{SHARD}-2"]
        made.supervisor().stop(workers)
        made.supervisor().start(workers)
        yield made
    finally:
        if not running:
            made.down(purge=True)


def settings_of(cluster: Cluster) -> Settings:
    stripe = msgspec.structs.replace(cluster.settings.stripe, rate_limits_per_s={}, default_rate_limit_per_s=LIMIT_PER_S)
    return msgspec.structs.replace(cluster.settings, poll=POLL, stripe=stripe, log_level="debug")


class Sky:
    """The cluster, its payments, and what happens to them."""

    def __init__(self, cluster: Cluster, store: Shards, http: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.accepted: list[str] = []
        self.began_s = time.time()
        self._store = store
        self._http = http
        self._stripe = cluster.settings.stripe.base_url

    # What happens

    async def control(self, method: str, path: str, body: object = None) -> Any:
        async with self._http.request(method, f"{self._stripe}/_control/{path}", json=body) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def pays(self, count: int) -> None:
        made: list[Payment] = [payment(f"p{n}", "pm_card_visa") for n in range(count)]
        await asyncio.gather(*(self._store.accept(each) for each in made))
        self.accepted += [each.key for each in made]

    @asynccontextmanager
    async def buyers(self) -> AsyncIterator[None]:
        """Some payments a second come meanwhile."""

        async def come() -> None:
            while True:
                await self.pays(4)
                await asyncio.sleep(0.5)

        coming = asyncio.create_task(come())
        try:
            yield
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def active_pid(self) -> int:
        """The active worker's process."""
        async with Etcd(self.cluster.settings.etcd) as etcd:
            record = await etcd.get(f"workers/{SHARD}")
        assert record is not None
        name = msgspec.json.decode(record.value, type=Holder).name
        status = await asyncio.to_thread(self.cluster.status)
        return next(process.pid for process in status.processes if process.name == name and process.pid)

    async def suffer(self, fault: str, hold_s: float | None = None) -> None:
        """One of the faults of `oncepay chaos`, from its beginning until all is whole again."""
        from cli.up import hooks

        await asyncio.to_thread(inflict, FAULTS[fault](Hands(self.cluster, SHARD, hooks(self.cluster))), hold_s=hold_s)

    async def in_progress(self, count: int, seconds: float) -> list[str]:
        """So many payments on which Stripe works for so long, by its clock."""
        await self.control("PUT", "faults", {"processing": 1.0, "processing_s": [seconds, seconds]})
        before = len(self.accepted)
        await self.pays(count)
        made = self.accepted[before:]
        query = "select count(*) from oncepay.payments where key = any ($1) and status = 'processing'"

        async def all_there() -> bool:
            return bool(await self._read(self._shard_dsn, query, made) == [(count,)])

        await eventually(all_there, "Stripe works on all of them", 60 + 0.1 * count)
        return made

    async def calls(self) -> dict[str, int]:
        """Calls of the stand-in so far, by endpoint."""
        totals: dict[str, int] = (await self.control("GET", "counts"))["totals"]
        return {name: count for name, count in totals.items() if "/_control" not in name}

    async def calls_for_changes(self, changed: list[str]) -> dict[str, int]:
        """Let Stripe be done with these, and count its calls until they are settled."""
        before = await self.calls()
        await self.control("POST", "clock", {"advance_s": 2 * CHANGE_S})
        await eventually(lambda: self.are_settled(changed), "what changed is settled", 60)
        return {name: count - before.get(name, 0) for name, count in (await self.calls()).items() if count > before.get(name, 0)}

    # What must hold in the end

    async def clears(self) -> None:
        """All is settled, and everything agrees."""
        await self.control("PUT", "faults", {})
        await eventually(lambda: self.are_settled(self.accepted), "all payments are settled", SETTLED_S)
        cache = await self._oncepay("shards", "check-cache")
        assert cache["ok"], cache
        found = await self._oncepay("verify")
        assert found["ok"], found
        assert found["open"] == 0
        await self._within_limits()
        polls = self.polls()
        assert polls, "something was polled"
        twice = [poll for poll, count in Counter(polls_of(polls)).items() if count > 1 and poll[-1] < TRIES_MAX]
        assert twice == [], "none is polled twice in a round"
        assert await self._too_young(polls) == []

    async def are_settled(self, keys: list[str]) -> bool:
        """Whether nothing is left to do of these."""
        query = "select count(*) from oncepay.payments where key = any ($1) and not open_work"
        return bool(await self._read(self._shard_dsn, query, keys) == [(len(keys),)])

    def _shard_dsn(self) -> str:
        return self.cluster.status().shards[0].dsn or ""

    async def _read(self, dsn: Callable[[], str], query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Rows; none while nothing can be read."""
        try:
            connection = await asyncpg.connect(await asyncio.to_thread(dsn))
            try:
                return [tuple(row) for row in await connection.fetch(query, *arguments)]
            finally:
                await connection.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return []

    async def _oncepay(self, *words: str) -> Any:
        command = [sys.executable, "-m", "cli.main", *words, "--output", "json"]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, env=os.environ | {"ONCEPAY_HOME": str(self.cluster.home)}
        )
        output, _ = await process.communicate()
        return json.loads(output)

    async def _within_limits(self) -> None:
        """No more calls of one kind than the limit, in any two seconds: calls that left evenly may arrive in heaps."""
        calls: dict[str, dict[str, int]] = (await self.control("GET", "counts"))["calls"]
        most = {}
        for name, by_second in calls.items():
            counts = {int(second): count for second, count in by_second.items() if int(second) > self.began_s}
            most[name] = max((count + counts.get(second + 1, 0) for second, count in counts.items()), default=0)
        print(f"most calls in two seconds: {most}")
        assert max(count for name, count in most.items() if "/_control" not in name) <= 2 * LIMIT_PER_S, most

    # Polls, as the workers' logs tell them

    def polls(self) -> list[dict[str, Any]]:
        """Each look at a payment since the test began: when, whose, of which version, and by which worker's epoch."""
        found = []
        for number in (1, 2):
            lines = self.cluster.layout.log(f"worker-{SHARD}-{number}").read_bytes().splitlines()
            epoch = 0
            for line in lines:
                with contextlib.suppress(msgspec.DecodeError):
                    told = msgspec.json.decode(line)
                    at_s = datetime.fromisoformat(told["timestamp"]).timestamp()
                    if told["event"] == "epoch taken":
                        epoch = told["epoch"]
                    elif told["event"] == "polled" and at_s > self.began_s:
                        found.append(told | {"at_s": at_s, "epoch": epoch})
        return found

    async def _too_young(self, polls: list[dict[str, Any]]) -> list[object]:
        """Looks at a payment that had changed less than `first_s` before."""
        query = "select key, version, extract(epoch from committed_at)::float8 from oncepay.payment_history"
        rows = await self._read(lambda: self.cluster.settings.aggregator_dsn, query)
        committed = {(key, version): at_s for key, version, at_s in rows}
        assert committed
        known = [(poll, committed[poll["key"], poll["version"]]) for poll in polls if (poll["key"], poll["version"]) in committed]
        return [(poll, at_s) for poll, at_s in known if poll["at_s"] - at_s < POLL.first_s - SLACK_S]


def polls_of(polls: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a look must be the only one of: a worker's time, a payment's version, and the number of the look."""
    return [(poll["epoch"], poll["key"], poll["version"], poll["tries"]) for poll in polls]


@pytest.fixture
async def sky(weather_cluster: Cluster) -> AsyncIterator[Sky]:
    settings = weather_cluster.settings
    async with Etcd(settings.etcd) as etcd, aiohttp.ClientSession() as http:
        shards = Shards(etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor="router")
        await shards.start()
        try:
            made = Sky(weather_cluster, shards, http)
            await made.control("PUT", "faults", {"processing": 0.6, "processing_s": [2, 9]})
            yield made
        finally:
            await made.control("PUT", "faults", {})
            await shards.stop()


async def test_fair_weather(sky: Sky) -> None:
    """More at once than the limits allow in a second."""
    await sky.pays(90)
    async with sky.buyers():
        await asyncio.sleep(5)  # some come while the others are looked after
    await sky.clears()


async def test_the_worker_is_killed(sky: Sky) -> None:
    await sky.pays(40)
    async with sky.buyers():
        await asyncio.sleep(2)
        os.kill(await sky.active_pid(), signal.SIGKILL)
        await asyncio.sleep(8)
        os.kill(await sky.active_pid(), signal.SIGKILL)
        await asyncio.sleep(3)
    await sky.clears()


async def test_the_worker_freezes_and_thaws_when_another_is_active(sky: Sky) -> None:
    await sky.pays(40)
    async with sky.buyers():
        await asyncio.sleep(2)
        frozen = await sky.active_pid()
        os.kill(frozen, signal.SIGSTOP)
        try:

            async def replaced() -> bool:
                return await sky.active_pid() != frozen

            await eventually(replaced, "another worker is active", 30)
            await asyncio.sleep(4)
        finally:
            os.kill(frozen, signal.SIGCONT)
        await asyncio.sleep(4)
    await sky.clears()


async def test_the_shard_fails_over(sky: Sky) -> None:
    await sky.pays(40)
    async with sky.buyers():
        await sky.suffer("kill-postgres")
    await sky.clears()


async def test_the_aggregator_is_down_and_comes_back(sky: Sky) -> None:
    """The cache goes on by the feed alone; then the aggregator gets what it missed, once."""
    await sky.pays(40)
    async with sky.buyers():
        supervisor = sky.cluster.supervisor()
        await asyncio.to_thread(supervisor.stop, ["aggregator"])
        await asyncio.sleep(10)
        assert await sky._oncepay("shards", "check-cache", "--wait", "5")
        await asyncio.to_thread(supervisor.start, ["aggregator"])
    await sky.clears()


async def test_etcd_is_away_for_longer_than_a_lease(sky: Sky) -> None:
    """Shares of the budget stand still at what they were, and so does whose turn it is."""
    await sky.pays(40)
    async with sky.buyers():
        await sky.suffer("kill-etcd")
    await sky.clears()


async def test_stripe_is_down_for_ten_minutes(sky: Sky) -> None:
    """Looks cost little meanwhile, and nothing is given up."""
    await sky.pays(40)
    async with sky.buyers():
        await asyncio.sleep(2)
        await sky.control("PUT", "faults", {"down": True})
        before = sum((await sky.calls()).values())
        await asyncio.sleep(8)
        await sky.control("POST", "clock", {"advance_s": 600})
        await asyncio.sleep(8)
        refused = sum((await sky.calls()).values()) - before
        await sky.control("PUT", "faults", {"processing": 0.6, "processing_s": [2, 9]})
    print(f"calls while Stripe was down: {refused}")
    assert refused < 150, "the circuit was open"
    await sky.clears()


async def test_few_that_changed_among_many_cost_few_calls(sky: Sky) -> None:
    """Payments on which Stripe works for days: the events tell which have changed. No webhook comes.

    `python -m loadtest.bench polls` has the figures of ten thousand.
    """
    await sky.in_progress(392, 1_000_000)
    changed = await sky.in_progress(8, CHANGE_S)
    await asyncio.sleep(SELDOM_S)
    calls = await sky.calls_for_changes(changed)
    print(f"calls for 8 of 400: {calls}")
    assert sum(calls.values()) < 60
    await sky.control("POST", "clock", {"advance_s": 1_000_000})
    await sky.clears()


async def test_what_was_left_behind_goes_before_what_waits_at_a_take_over(sky: Sky) -> None:
    """All are due at once then, and asked for singly: what Stripe works on for days must not be in the way."""
    await sky.in_progress(WAITING, 1_000_000)
    await asyncio.sleep(OLD.total_seconds() + 1)
    await sky.control("PUT", "faults", {})
    before = max(poll["epoch"] for poll in sky.polls())
    os.kill(await sky.active_pid(), signal.SIGKILL)

    def looked_at() -> list[str]:
        return [poll["key"] for poll in sky.polls() if poll["epoch"] > before and poll["how"] == "single"]

    async def at_work() -> bool:
        return len(looked_at()) > 20

    await eventually(at_work, "the next worker asks for them", 60)
    first = len(sky.accepted)
    await sky.pays(5)
    left = set(sky.accepted[first:])
    await eventually(lambda: sky.are_settled([*left]), "what was left behind is settled", 60)
    await asyncio.sleep(WAITING / LIMIT_PER_S)
    singles = looked_at()
    last = max(singles.index(key) for key in left)
    print(f"single looks before the last of them: {last}, in all: {len(singles)}")
    assert len(singles) > WAITING / 2, "each is asked for"
    assert last < BEFORE_MAX
    await sky.control("POST", "clock", {"advance_s": 1_000_000})
    await sky.clears()
