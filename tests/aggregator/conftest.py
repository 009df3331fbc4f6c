"""A migrated database for a module's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from aggregator.migrate import migrate
from tests.aggregator.database import empty
from tests.postgres_fixture import PostgresServer, postgres_server

__all__ = ["aggregator_dsn", "connection", "postgres_server"]

PASSWORDS = {"oncepay_aggregator": "a", "oncepay_reader": "r"}


@pytest.fixture(scope="module")
def aggregator_dsn(postgres_server: PostgresServer) -> str:
    """The superuser's dsn of a database with the aggregator's schema."""
    dsn = postgres_server.new_database()
    asyncio.run(migrate(dsn, passwords=PASSWORDS))
    return dsn


@pytest.fixture
async def connection(aggregator_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the service's role to empty tables."""
    owner = await asyncpg.connect(aggregator_dsn)
    await empty(owner)
    await owner.close()
    made = await asyncpg.connect(aggregator_dsn.replace("postgres@", "oncepay_aggregator:a@"))
    yield made
    await made.close()
