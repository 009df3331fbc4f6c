"""Payout runs by schedule: the moment that is due, and one process among several that runs it.

Who runs is elected through etcd, so that one run is made and not several. It needs no more than that: two runs at once make
nothing twice (see `aggregator.runs`). The moment that was run last is kept in etcd; a process that dies in a run leaves it to
the next one, which makes what is missing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re

import msgspec
from prometheus_client import Gauge

from aggregator.runs import Runs
from oncepay.errors import OncepayError, SettingsError
from oncepay.etcd import Etcd
from oncepay.logs import get_logger

SEAT_KEY = "payouts/seat"
LAST_KEY = "payouts/last"
TTL_S = 10
LOOK_S = 5.0
"""How late a moment may be noticed to be due."""
RETRY_S = 60.0
"""After a run that failed."""
STARTED_BY = "schedule"
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_FORM = re.compile(r"(?P<day>daily|" + "|".join(DAYS) + r") (?P<hour>[01]\d|2[0-3]):(?P<minute>[0-5]\d)")

LAST_RUN = Gauge("oncepay_payouts_last_run_timestamp_seconds", "When the last scheduled payout run that succeeded was due.")
_log = get_logger("payouts")


class Schedule(msgspec.Struct, frozen=True):
    """Every day, or one day of the week (0 is Monday), at a time of the day in UTC."""

    weekday: int | None
    hour: int
    minute: int

    def last_due(self, now: dt.datetime) -> dt.datetime:
        """The latest moment of the schedule that is not after `now` (in UTC)."""
        due = now.replace(hour=self.hour, minute=self.minute, second=0, microsecond=0)
        if self.weekday is not None:
            due -= dt.timedelta(days=(due.weekday() - self.weekday) % 7)
        if due > now:
            due -= dt.timedelta(days=1 if self.weekday is None else 7)
        return due


def parse_schedule(text: str) -> Schedule | None:
    """The schedule that a setting says; None for none. Raises SettingsError."""
    if not text:
        return None
    match = _FORM.fullmatch(text.strip().lower())
    if match is None:
        raise SettingsError(f"payouts.schedule is {text!r}; it is `daily HH:MM` or a day of the week and `HH:MM`, in UTC")
    weekday = None if match["day"] == "daily" else DAYS.index(match["day"])
    return Schedule(weekday, int(match["hour"]), int(match["minute"]))


class LastRun(msgspec.Struct, frozen=True):
    """The moment that was run last, by whom, as which run."""

    due: dt.datetime
    by: str
    run: str = ""


class Scheduler:
    """Runs what is due, in the process that was elected. `name` is the process's."""

    def __init__(self, etcd: Etcd, runs: Runs, schedule: Schedule, name: str) -> None:
        self._etcd = etcd
        self._runs = runs
        self._schedule = schedule
        self._name = name

    async def work(self) -> None:
        """Run until canceled."""
        while True:
            pause_s = LOOK_S
            try:
                if await self._is_due():
                    await self._elected()
            except OncepayError as error:
                pause_s = RETRY_S
                _log.warning("scheduled payout run failed", error=str(error), slug=error.slug)
            await asyncio.sleep(pause_s)

    async def _is_due(self) -> bool:
        return await self._last() < self._schedule.last_due(dt.datetime.now(dt.UTC))

    async def _last(self) -> dt.datetime:
        """The moment that was run last. A deployment that has never run begins with the next one."""
        found = await self._etcd.get(LAST_KEY)
        if found is None:
            now = dt.datetime.now(dt.UTC)
            await self._etcd.compare_and_put(LAST_KEY, msgspec.json.encode(LastRun(now, self._name)), 0)
            return now
        return msgspec.json.decode(found.value, type=LastRun).due

    async def _elected(self) -> None:
        """Take the seat, and run what is due if it still is. Whoever finds the seat taken looks again later."""
        lease = await self._etcd.grant_lease(TTL_S)
        try:
            if await self._etcd.compare_and_put(SEAT_KEY, self._name.encode(), 0, lease.id) is None:
                return
            due = self._schedule.last_due(dt.datetime.now(dt.UTC))
            if await self._last() >= due:
                return
            view = await self._runs.run(STARTED_BY)
            await self._etcd.put(LAST_KEY, msgspec.json.encode(LastRun(due, self._name, view.run)))
            LAST_RUN.set(due.timestamp())
            _log.info("scheduled payout run", run=view.run, due=due.isoformat(), held=view.held_by_reason)
        finally:
            await lease.revoke()
