"""What an active worker runs on: its share of the rate budget, the ways to Stripe, to the shards and to the aggregator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp

from oncepay.budget import Budget
from oncepay.driver import Driver
from oncepay.etcd import Etcd
from oncepay.settings import Settings
from oncepay.stripe_client import StripeGateway
from oncepay.tipalti_client import TipaltiClient
from shard.store.store import Shards
from shard.worker.events import EventReader
from shard.worker.guard import Guard
from shard.worker.lease import Seat
from shard.worker.stream import ROLE
from shard.worker.worker import Worker


@asynccontextmanager
async def engine(shard: str, name: str, settings: Settings, etcd: Etcd, seat: Seat) -> AsyncIterator[Worker]:
    """A worker that may begin; all that it used is given back at the end."""
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        budget = Budget(etcd, settings.stripe, name=name, role="worker")
        budget.start()
        stack.push_async_callback(budget.stop)
        stripe = await stack.enter_async_context(StripeGateway(settings.stripe, budget))
        tipalti = await stack.enter_async_context(TipaltiClient(settings.tipalti))
        shards = Shards(etcd, settings, role=ROLE, password=settings.postgres.worker_password, actor=name)
        stack.push_async_callback(shards.stop)
        driver = Driver(shards, stripe, fee_back=settings.fee.refunded)
        reader = EventReader(etcd, stripe, shards, driver, lambda: shards.maps.current, http, settings, name)
        worker = Worker(shard, name, settings, shards, stripe, tipalti, driver, reader, seat, http)
        await stack.enter_async_context(Guard(shard, etcd, shards.leaders, settings, lambda: worker.active))
        yield worker
