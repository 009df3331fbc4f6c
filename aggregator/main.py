"""The aggregator's process: it applies the shards' feeds, and serves what is derived from them."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aggregator import openapi
from aggregator.api import Api
from aggregator.audit import Audit
from aggregator.database import Database
from aggregator.events.calls import EventCalls
from aggregator.events.deliver import Sender
from aggregator.events.endpoints import Endpoints
from aggregator.feed import FeedDoor
from aggregator.payouts import payouts
from aggregator.positions import Reader
from aggregator.reconcile.calls import ReconcileCalls
from aggregator.reconcile.office import Office
from aggregator.status import StatusCall
from oncepay.errors import SettingsError
from oncepay.feed import FEED_BYTES_MAX
from oncepay.service import Service, run

GARBAGE_AFTER = 100_000
"""Python looks for cycles after so many new objects. A batch is tens of thousands of them and has none: by default a quarter of
the time of applying it would go there."""


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Register the API, the feed's door, and the check of the database."""
    settings = service.settings
    if not settings.aggregator_dsn:
        raise SettingsError("the settings name no aggregator_dsn")
    async with Database(settings.aggregator_dsn) as database:
        reader = Reader(database)
        Api(reader, hold_s=settings.payouts.hold_s).register(service)
        endpoints = Endpoints(service.etcd)
        allow_private = settings.events.allow_private_networks
        sender = Sender(database, endpoints, allow_private=allow_private)
        FeedDoor(database, reader, settings.internal_token, recording=endpoints.recording, applied=sender.poke).register(service)
        EventCalls(endpoints, database, sender, allow_private=allow_private).register(service)
        endpoints.start()
        service.spawn(sender.work(), "events")
        office = Office(service, database)
        ReconcileCalls(office, database).register(service)
        service.spawn(office.daily(), "reconcile-daily")
        service.check("database", database.check)
        service.openapi(openapi.document())
        try:
            async with payouts(service, reader) as shards:
                audit = Audit(reader, shards, settings.audit_s)
                if settings.audit_s > 0:
                    service.spawn(audit.work(), "audit")
                StatusCall(reader, audit).register(service)
                yield
        finally:
            await endpoints.stop()


def main() -> None:
    """Run until SIGTERM."""
    gc.set_threshold(GARBAGE_AFTER, 10, 10)
    run(
        start,
        kind="aggregator",
        description="Derives revenue, balances and orders from the shards' change feeds.",
        body_limit_bytes=FEED_BYTES_MAX,
    )
