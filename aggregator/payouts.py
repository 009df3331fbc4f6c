"""Payouts in the aggregator's process: its way to the shards and to Tipalti, the calls, the schedule."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aggregator.fundings import Fundings
from aggregator.payout_api import PayoutCalls
from aggregator.positions import Reader
from aggregator.runs import Runs
from aggregator.schedule import Scheduler, parse_schedule
from oncepay.errors import EtcdUnavailable
from oncepay.payout_hold import check_not_held
from oncepay.service import Service
from oncepay.tipalti_client import TipaltiClient
from shard.store.payouts import PayoutStore
from shard.store.store import Shards

ROLE = "oncepay_aggregator"


@asynccontextmanager
async def payouts(service: Service, reader: Reader) -> AsyncIterator[Shards]:
    """Register the calls and start the schedule. Waits for nothing: what needs a shard or Tipalti says so when it is called."""
    settings = service.settings
    schedule = parse_schedule(settings.payouts.schedule)
    shards = Shards(service.etcd, settings, role=ROLE, password=settings.postgres.aggregator_password, actor=service.name)
    async with TipaltiClient(settings.tipalti) as tipalti:
        store = PayoutStore(shards, service.name)
        runs = Runs(reader, shards, store, tipalti, settings.payouts, lambda: check_not_held(service.etcd))
        PayoutCalls(reader, store, runs, auth=settings.auth).register(service)
        service.spawn(_watch(shards), "shards")
        if tipalti.on:
            service.spawn(Fundings(service.etcd, store, tipalti).work(), "fundings")
        if schedule is not None:
            service.spawn(Scheduler(service.etcd, runs, schedule, service.name).work(), "payouts")
        try:
            yield shards
        finally:
            await shards.stop()


async def _watch(shards: Shards) -> None:
    """Wait for etcd as long as it takes."""
    while True:
        try:
            await shards.start(timeout_s=60)
        except EtcdUnavailable:
            continue
        return
