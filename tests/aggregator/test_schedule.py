"""Scheduled runs with a real etcd: several processes, one run a moment; one that dies leaves it to the next."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from aggregator.payout_views import RunView
from aggregator.runs import Runs
from aggregator.schedule import LAST_KEY, SEAT_KEY, STARTED_BY, LastRun, Schedule, Scheduler
from oncepay.errors import ShardUnavailable
from oncepay.etcd import Etcd
from tests.etcd_fixture import EtcdCluster

EVERY_DAY = Schedule(None, 0, 0)
LONG_AGO = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class Counted(Runs):
    """Runs that are only counted."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.error: Exception | None = None
        self.begun = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def run(self, created_by: str, **_: object) -> RunView:
        self.started.append(created_by)
        self.begun.set()
        await self.hold.wait()
        if self.error is not None:
            raise self.error
        return RunView(f"run-{len(self.started)}", False, created_by, [], {}, [], [], {})


@pytest.fixture(scope="module")
def etcd_cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture
async def etcd(etcd_cluster: EtcdCluster) -> AsyncIterator[Etcd]:
    async with Etcd(etcd_cluster.settings()) as opened:
        yield opened
        for key in (LAST_KEY, SEAT_KEY):
            await opened.delete(key)


async def last_was(etcd: Etcd, due: dt.datetime) -> None:
    await etcd.put(LAST_KEY, msgspec.json.encode(LastRun(due, "test")))


async def last(etcd: Etcd) -> LastRun:
    found = await etcd.get(LAST_KEY)
    assert found is not None
    return msgspec.json.decode(found.value, type=LastRun)


@asynccontextmanager
async def at_work(*schedulers: Scheduler) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(scheduler.work()) for scheduler in schedulers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_moment_that_is_due_is_run_once_by_one_of_several(etcd: Etcd) -> None:
    runs = Counted()
    await last_was(etcd, LONG_AGO)
    schedulers = [Scheduler(etcd, runs, EVERY_DAY, f"aggregator-{n}") for n in range(3)]
    runs.hold.clear()
    elected = [asyncio.create_task(scheduler._elected()) for scheduler in schedulers]
    async with asyncio.timeout(10):
        await runs.begun.wait()
        while sum(task.done() for task in elected) < 2:
            await asyncio.wait([task for task in elected if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    assert runs.started == [STARTED_BY], "two found the seat taken"
    runs.hold.set()
    await asyncio.gather(*elected)
    assert runs.started == [STARTED_BY]
    assert (await last(etcd)).due == EVERY_DAY.last_due(dt.datetime.now(dt.UTC))
    assert await etcd.get(SEAT_KEY) is None, "the seat was given up"
    await schedulers[1]._elected()
    assert runs.started == [STARTED_BY]


async def test_a_deployment_that_has_never_run_begins_with_the_next_moment(etcd: Etcd) -> None:
    runs = Counted()
    assert not await Scheduler(etcd, runs, EVERY_DAY, "a")._is_due()
    assert (await last(etcd)).due <= dt.datetime.now(dt.UTC)
    assert runs.started == []


async def test_a_run_that_failed_is_made_again(etcd: Etcd) -> None:
    runs = Counted()
    runs.error = ShardUnavailable("s1 has no leader")
    await last_was(etcd, LONG_AGO)
    scheduler = Scheduler(etcd, runs, EVERY_DAY, "a")
    with pytest.raises(ShardUnavailable):
        await scheduler._elected()
    assert (await last(etcd)).due == LONG_AGO
    runs.error = None
    async with at_work(scheduler), asyncio.timeout(10):
        while (await last(etcd)).due == LONG_AGO:
            await asyncio.sleep(0.02)
    assert len(runs.started) == 2
