"""Connections to the aggregator's Postgres: a few for feeds, others for readers, others for work in the background, so that
none starves another."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Literal, Self

import asyncpg

from aggregator import migrate
from oncepay.errors import TooBusy, Unavailable

Use = Literal["feed", "read", "work"]

CONNECTIONS: dict[Use, int] = {"feed": 6, "read": 10, "work": 6}
ACQUIRE_S = 5.0
"""How long a request waits for a connection before it is told that too much is waiting."""
READ_STATEMENT_S = 10
"""A reader's statement may run this long. A feed's has no limit: it is never cut off in its commit. Nor has one of `work`."""
IDLE_S = 60.0


class DatabaseUnavailable(Unavailable):
    """The aggregator's database can't be reached."""

    slug = "database-unavailable"


_TRANSIENT = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.DeadlockDetectedError,
)


class Database:
    """Pools that connect when they are first used.

    async with Database(dsn) as database:
        async with database.snapshot() as connection:
            ...
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._pools: dict[Use, asyncpg.Pool] = {}

    async def __aenter__(self) -> Self:
        for use, size in CONNECTIONS.items():
            limit_ms = READ_STATEMENT_S * 1000 if use == "read" else 0
            server = {"application_name": f"aggregator {use}", "timezone": "UTC", "statement_timeout": str(limit_ms)}
            self._pools[use] = await asyncpg.create_pool(
                self._dsn, min_size=0, max_size=size, max_inactive_connection_lifetime=IDLE_S, server_settings=server, timeout=5.0
            )
        return self

    async def __aexit__(self, *exc: object) -> None:
        for pool in self._pools.values():
            pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self, use: Use) -> AsyncIterator[asyncpg.Connection]:
        """A connection for `use`. Raises DatabaseUnavailable or TooBusy, also for what goes wrong while it's used."""
        try:
            async with self._pools[use].acquire(timeout=ACQUIRE_S) as connection:
                yield connection
        except TimeoutError as error:
            raise TooBusy(f"no connection to the database was free within {ACQUIRE_S:g} s") from error
        except asyncpg.QueryCanceledError as error:
            raise TooBusy(f"the answer took longer than {READ_STATEMENT_S} s") from error
        except _TRANSIENT as error:
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error

    @contextlib.asynccontextmanager
    async def snapshot(self, use: Use = "read") -> AsyncIterator[asyncpg.Connection]:
        """A connection whose statements all see the same moment: data and positions agree."""
        async with self.connection(use) as connection:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                yield connection

    async def check(self) -> None:
        """Raises Unavailable when the database can't be reached or its schema is older than this code's."""
        async with self.connection("read") as connection:
            version = await migrate.version(connection)
        if version < migrate.LATEST:
            raise Unavailable(f"the schema is at migration {version}, this code needs {migrate.LATEST}")
