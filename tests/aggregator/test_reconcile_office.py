"""A reconciliation that is broken off ends as failed: somebody waits for its end."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from aggregator import queries
from aggregator.database import Database
from aggregator.reconcile.office import LOCK, Office
from oncepay.settings import Settings

pytestmark = pytest.mark.cluster

SQL = queries.load("reconcile.sql")
FIRST, LAST = dt.datetime(2026, 11, 1, tzinfo=dt.UTC), dt.datetime(2026, 11, 2, tzinfo=dt.UTC)


@pytest.fixture
async def database(aggregator_dsn: str) -> AsyncIterator[Database]:
    owner = await asyncpg.connect(aggregator_dsn)
    await owner.execute("truncate oncepay.reconciliations, oncepay.reconciliation_differences")
    await owner.close()
    async with Database(aggregator_dsn.replace("postgres@", "oncepay_aggregator:a@")) as made:
        yield made


@pytest.fixture
def office(database: Database) -> Office:
    def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        return asyncio.create_task(work, name=name)

    service: Any = SimpleNamespace(settings=Settings(), spawn=spawn, name="aggregator", etcd=None)
    return Office(service, database)


async def ends(database: Database) -> dict[str, tuple[str, str | None]]:
    async with database.connection("work") as connection:
        rows = await connection.fetch("select id, state, problem from oncepay.reconciliations")
    return {row["id"]: (row["state"], row["problem"]) for row in rows}


async def test_a_run_whose_session_was_lost_has_failed(
    office: Office, database: Database, aggregator_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_it(*arguments: Any) -> None:
        session: asyncpg.Connection = arguments[-1]
        owner = await asyncpg.connect(aggregator_dsn)
        await owner.fetchval("select pg_terminate_backend($1, 5000)", session.get_server_pid())
        await owner.close()
        await session.execute(SQL["end"], arguments[0], "done", "{}", None)

    monkeypatch.setattr(office, "_reconcile", lose_it)
    name = await office.start(FIRST, LAST, "me", wait=True)
    state, problem = (await ends(database))[name]
    assert state == "failed"
    assert "broken off" in str(problem)


async def test_a_run_whose_process_has_ended_has_failed_when_an_aggregator_looks(office: Office, database: Database) -> None:
    async with database.connection("work") as connection:
        await connection.execute(SQL["begin"], "rec_left", FIRST, LAST, "me")
    async with database.connection("work") as another:
        await another.fetchval("select pg_advisory_lock($1)", LOCK)
        await office._give_up()
        assert (await ends(database))["rec_left"][0] == "running"
        await another.fetchval("select pg_advisory_unlock($1)", LOCK)
    await office._give_up()
    assert (await ends(database))["rec_left"] == ("failed", "its process ended")
