"""The aggregator's process: it applies the shards' feeds, and serves what is derived from them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aggregator import openapi
from aggregator.api import Api
from aggregator.database import Database
from aggregator.feed import FeedDoor
from aggregator.payouts import payouts
from aggregator.positions import Reader
from aggregator.reconcile.calls import ReconcileCalls
from aggregator.reconcile.office import Office
from oncepay.errors import SettingsError
from oncepay.feed import FEED_BYTES_MAX
from oncepay.service import Service, run


@asynccontextmanager
async def start(service: Service) -> AsyncIterator[None]:
    """Register the API, the feed's door, and the check of the database."""
    settings = service.settings
    if not settings.aggregator_dsn:
        raise SettingsError("the settings name no aggregator_dsn")
    async with Database(settings.aggregator_dsn) as database:
        reader = Reader(database)
        Api(reader, hold_s=settings.payouts.hold_s).register(service)
        FeedDoor(database, reader, settings.internal_token).register(service)
        office = Office(service, database)
        ReconcileCalls(office, database).register(service)
        service.spawn(office.daily(), "reconcile-daily")
        service.check("database", database.check)
        service.openapi(openapi.document())
        async with payouts(service, reader):
            yield


def main() -> None:
    """Run until SIGTERM."""
    run(
        start,
        kind="aggregator",
        description="Derives revenue, balances and orders from the shards' change feeds.",
        body_limit_bytes=FEED_BYTES_MAX,
    )
