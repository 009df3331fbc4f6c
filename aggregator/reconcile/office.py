"""When reconciliations run: when asked, and daily by themselves; one at a time, however many aggregators there are.

Stripe, Tipalti and the shards are connected for a run only, so that an aggregator that waits for the next day costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import secrets
import time
from collections.abc import AsyncIterator

import asyncpg

from aggregator import metrics, queries
from aggregator.database import Database
from oncepay.budget import Budget
from oncepay.errors import InvalidField, OncepayError
from oncepay.logs import get_logger
from oncepay.service import Service

SQL = queries.load("reconcile.sql")
ROLE = "oncepay_aggregator"
LOCK = 0x6F6E6365_72636F6E
CHECK_S = 600.0
"""How often an aggregator looks whether the daily run is due."""
DAY = dt.timedelta(days=1)
PERIOD_MAX = dt.timedelta(days=400)

_log = get_logger("reconcile")


class AlreadyReconciling(OncepayError):
    """A reconciliation is running."""

    status = 409
    slug = "already-reconciling"


def due(now: dt.datetime, done_to: dt.datetime | None, daily_at_utc_h: int) -> bool:
    """Whether the daily run up to this day's beginning is due at `now`, where daily runs are done up to `done_to`."""
    if daily_at_utc_h < 0 or now.hour < daily_at_utc_h:
        return False
    return done_to is None or done_to < midnight(now)


def daily_first(until: dt.datetime, done_to: dt.datetime | None, days: int) -> dt.datetime:
    """Where the daily run up to `until` begins: `days` before, or where the last one ended; at most PERIOD_MAX before."""
    first = until - days * DAY
    return max(min(first, done_to or first), until - PERIOD_MAX)


def midnight(now: dt.datetime) -> dt.datetime:
    """When the UTC day of `now` began."""
    return now.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)


class Office:
    """Starts runs and looks after them."""

    def __init__(self, service: Service, database: Database) -> None:
        self._service = service
        self._settings = service.settings
        self._database = database

    async def daily(self) -> None:
        """For ever: run when it is due, and show the last run's result as metrics."""
        settings = self._settings.reconcile
        while True:
            try:
                await self._give_up()
                await self._show()
                now = dt.datetime.now(dt.UTC)
                async with self._database.connection("work") as connection:
                    done_to, anything = await connection.fetchrow(SQL["last_daily"], midnight(now))
                if anything and due(now, done_to, settings.daily_at_utc_h):
                    until = midnight(now)
                    await self.start(daily_first(until, done_to, settings.days), until, "daily", wait=True)
            except AlreadyReconciling:
                pass  # another aggregator has begun it
            except (OncepayError, asyncpg.PostgresError) as error:
                _log.warning("the daily reconciliation has to wait", error=str(error))
            await asyncio.sleep(CHECK_S)

    async def start(
        self, first: dt.datetime, last: dt.datetime, asked_by: str, *, wait: bool = False, grace_s: int | None = None
    ) -> str:
        """Begin a run over [first, last); its name. With `wait` it is over. Raises AlreadyReconciling or InvalidField."""
        grace = dt.timedelta(seconds=self._settings.reconcile.grace_s if grace_s is None else grace_s)
        if not first < last:
            raise InvalidField("the period ends before it begins", field="to")
        if last - first > PERIOD_MAX:
            raise InvalidField(f"a period has at most {PERIOD_MAX.days} days", field="from")
        if last > dt.datetime.now(dt.UTC) + DAY:
            raise InvalidField("the period ends in the future", field="to")
        name = f"rec_{secrets.token_hex(8)}"
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._service.spawn(self._run(name, first, last, asked_by, grace, begun), name)
        await begun
        if wait:
            await asyncio.wait({task})
        return name

    async def _run(
        self, name: str, first: dt.datetime, last: dt.datetime, asked_by: str, grace: dt.timedelta, begun: asyncio.Future[None]
    ) -> None:
        try:
            async with self._alone() as connection:
                await connection.execute(SQL["abandon"], None, "its process ended")
                await connection.execute(SQL["begin"], name, first, last, asked_by)
                begun.set_result(None)
                await self._reconcile(name, first, last, grace, connection)
            await self._show()
        except Exception as error:
            if not begun.done():
                begun.set_exception(error)
                return
            _log.error("reconciliation broken off", run=name, exc_info=error)
            await self._give_up(name, f"it was broken off: {error!r}")

    async def _give_up(self, name: str | None = None, problem: str = "its process ended") -> None:
        """End the run, or with no name all that nobody works on, as failed. Somebody may wait for it to be over."""
        try:
            async with self._database.connection("work") as connection:
                if name is None and not await connection.fetchval(SQL["any_running"]):
                    return
            async with self._alone() as connection:
                await connection.execute(SQL["abandon"], name, problem)
        except AlreadyReconciling:
            pass
        except (OncepayError, asyncpg.PostgresError) as error:
            _log.warning("a run that was broken off is not ended yet", run=name, error=str(error))

    async def _reconcile(
        self, name: str, first: dt.datetime, last: dt.datetime, grace: dt.timedelta, connection: asyncpg.Connection
    ) -> None:
        from aggregator.reconcile.books import ShardBooks
        from aggregator.reconcile.run import Run
        from oncepay.stripe_client import StripeGateway
        from oncepay.tipalti_client import TipaltiClient
        from shard.store.store import Shards

        began_s, run, problem = time.monotonic(), None, None
        settings, actor, etcd = self._settings, f"{self._service.name} reconcile", self._service.etcd
        budget = Budget(etcd, settings.stripe, name=f"{self._service.name}-reconcile", role="aggregator")
        store = Shards(etcd, settings, role=ROLE, password=settings.postgres.aggregator_password, actor=actor)
        try:
            budget.start()
            await store.start()
            async with StripeGateway(settings.stripe, budget) as stripe, TipaltiClient(settings.tipalti) as tipalti:
                run = Run(
                    name, first, last, stripe=stripe, books=ShardBooks(store, actor), connect=self._connect, grace=grace,
                    tipalti=tipalti if tipalti.on else None,
                )  # fmt: skip
                await run.whole()
        except (OncepayError, asyncpg.PostgresError) as error:
            problem = str(error) or type(error).__name__
            _log.warning("reconciliation failed", run=name, error=problem)
        finally:
            await store.stop()
            await budget.stop()
        state, checked = "failed" if problem else "done", dict(run.checked) if run else {}
        await connection.execute(SQL["end"], name, state, json.dumps(checked), problem)
        metrics.RECONCILED.labels(state).inc()
        _log.info("reconciled", run=name, state=state, seconds=round(time.monotonic() - began_s, 1), **checked)

    def _connect(self) -> contextlib.AbstractAsyncContextManager[asyncpg.Connection]:
        return self._database.connection("work")

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[asyncpg.Connection]:
        """A session that holds the lock of the one run. It is the session's: with the process it is gone."""
        async with self._database.connection("work") as connection:
            if not await connection.fetchval("select pg_try_advisory_lock($1)", LOCK):
                raise AlreadyReconciling("wait for its end: GET /v1/reconciliations shows how far it is")
            try:
                yield connection
            finally:
                if not connection.is_closed():
                    await connection.execute("select pg_advisory_unlock($1)", LOCK)

    async def _show(self) -> None:
        """The last whole run's result as metrics."""
        async with self._database.connection("work") as connection:
            row = await connection.fetchrow(SQL["last_done"])
        if row is not None:
            metrics.DIFFERENCES.set(row["differences"] or 0)
            metrics.RECONCILED_AT.set(row["ended_at"].timestamp())
