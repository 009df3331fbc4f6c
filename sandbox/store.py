"""Durable state of a stand-in: SQLite under an in-memory working copy, with group commit.

Handlers change objects in memory, within one step of the event loop; what they changed is written as one
transaction at the end of that step, and answers leave only after its commit. So an answered call survives `kill -9`
of the process. (It needn't survive loss of power: `synchronous=OFF`.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from sandbox import ids

LOCK_WAIT_S = 3.0
"""How long to wait for a predecessor that is still letting go of the state file."""
CACHE_MAX = 20_000
"""Objects of one kind that are kept in memory; older ones are read from SQLite again."""
CACHE_SURPLUS = 2_000
"""How many more there may be before the oldest are dropped: dropping goes over all of them."""

log = logging.getLogger("sandbox.store")

VERSION = 1
"""Of the state file's form; raised when a kept struct or table changes in a way that old files can't be read with."""

SqlValue = int | float | str | bytes | None


class StateError(Exception):
    """The state file can't be used: another process has it, or another version of the sandbox wrote it."""


class Row(Protocol):
    """What a table can keep: it has an id made by `ids.make` and a time in whole seconds."""

    id: str
    created: int


R = TypeVar("R", bound=Row)


class Writes(Protocol):
    """Something that holds rows which aren't in SQLite yet."""

    def write(self, connection: sqlite3.Connection) -> None:
        """Write them all, within the transaction that is open."""


class Store:
    """One SQLite file (or memory), exclusively owned, and the transaction that collects a step's writes."""

    def __init__(self, path: Path | None, schema: str) -> None:
        self.connection = sqlite3.connect(
            str(path) if path else ":memory:", isolation_level=None, cached_statements=512, timeout=LOCK_WAIT_S
        )
        try:
            self._open(schema)
        except sqlite3.Error as error:
            raise StateError(f"can't use the state file {path}: {error}") from error
        self._pending: dict[Writes, None] = {}
        self._in_transaction = False
        self._waiters: list[asyncio.Future[None]] = []
        self._scheduled = False
        self._after: list[Callable[[], None]] = []

    def _open(self, schema: str) -> None:
        connection = self.connection
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA wal_autocheckpoint=4000")
        connection.execute("PRAGMA cache_size=-65536")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it has version {version}, this sandbox writes {VERSION}; delete it to start anew")
        connection.executescript(schema)
        connection.execute(f"PRAGMA user_version={VERSION}")

    def touch(self, writes: Writes) -> None:
        """`writes` has something to write; it goes with this step's transaction."""
        self._pending[writes] = None
        if not self._scheduled:
            self._scheduled = True
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # while loading, before the loop runs: the first flush takes it along
                self._scheduled = False

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call `callback` when this step's writes are committed."""
        self._after.append(callback)

    def spill(self) -> None:
        """Write what is pending into the open transaction, so that queries of this connection see it."""
        if not self._pending:
            return
        if not self._in_transaction:
            self.connection.execute("BEGIN")
            self._in_transaction = True
        pending, self._pending = self._pending, {}
        for writes in pending:
            writes.write(self.connection)

    def flush(self) -> None:
        """Commit what is pending, then let the answers go. When that fails the process ends: memory and file have parted."""
        self._scheduled = False
        try:
            self.spill()
            if self._in_transaction:
                self.connection.execute("COMMIT")
                self._in_transaction = False
        except sqlite3.Error:
            log.critical("can't write the state; ending, so that nothing unwritten is answered", exc_info=True)
            os._exit(1)
        after, self._after = self._after, []
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        for callback in after:
            callback()

    async def committed(self) -> None:
        """Return when everything changed so far is committed."""
        if not self._scheduled:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def query(self, sql: str, values: Sequence[SqlValue] = ()) -> list[tuple[Any, ...]]:
        """Rows of `sql`, with this step's writes among them."""
        self.spill()
        return self.connection.execute(sql, values).fetchall()

    def close(self) -> None:
        """Commit and close."""
        self.flush()
        self.connection.close()


class Table(Generic[R]):
    """All objects of one kind, by id. `get` and `save` are the working copy; `page` and `scan` ask SQLite.

    `columns` gives, for an object, the values of the table's further columns (those that lists filter by).
    Objects got in one step of the loop must not be kept for the next: they may have left the cache.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        prefix: str,
        row_type: type[R],
        columns: dict[str, Callable[[R], SqlValue]] | None = None,
    ) -> None:
        self._store = store
        self.name = name
        self.prefix = prefix
        self._columns = columns or {}
        self._decoder = msgspec.msgpack.Decoder(row_type)
        self._encoder = msgspec.msgpack.Encoder()
        self._cache: dict[str, R] = {}
        self._dirty: dict[str, R] = {}
        names = ["ord", "created", "data", *self._columns]
        marks = ", ".join("?" * len(names))
        self._upsert = f"INSERT OR REPLACE INTO {name} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608 - own names
        self._select = f"SELECT data FROM {name} WHERE ord = ?"  # noqa: S608
        row = store.connection.execute(f"SELECT max(ord) FROM {name}").fetchone()  # noqa: S608
        self._next = (row[0] or 0) + 1

    @property
    def newest(self) -> int:
        """The highest ordinal given out."""
        return self._next - 1

    def new_id(self) -> str:
        """The id of the next object."""
        identifier = ids.make(self.prefix, self._next)
        self._next += 1
        return identifier

    def save(self, row: R) -> R:
        """Take `row` as it is now; it is committed with this step."""
        self._cache[row.id] = row
        self._dirty[row.id] = row
        self._store.touch(self)
        return row

    def delete(self, row: R) -> None:
        """Forget `row`."""
        self._cache.pop(row.id, None)
        self._dirty.pop(row.id, None)
        self._store.query(f"DELETE FROM {self.name} WHERE ord = ?", (ids.ordinal(row.id),))  # noqa: S608

    def get(self, identifier: str) -> R | None:
        """The object of that id, or None."""
        row = self._cache.get(identifier)
        if row is not None:
            return row
        if not identifier.startswith(self.prefix):
            return None
        ordinal = ids.ordinal(identifier)
        if ordinal < 0:
            return None
        found = self._store.connection.execute(self._select, (ordinal,)).fetchone()
        if found is None:
            return None
        row = self._decoder.decode(found[0])
        if row.id != identifier:
            return None
        self._cache[identifier] = row
        return row

    def pack(self, row: R) -> bytes:
        """`row` as it is kept."""
        return self._encoder.encode(row)

    def unpack(self, data: bytes) -> R:
        """The object that `pack` made `data` of."""
        return self._decoder.decode(data)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write the changed objects; see `Writes`."""
        encode = self._encoder.encode
        getters = list(self._columns.values())
        connection.executemany(
            self._upsert,
            [
                (ids.ordinal(row.id), row.created, encode(row), *[getter(row) for getter in getters])
                for row in self._dirty.values()
            ],
        )
        self._dirty.clear()
        surplus = len(self._cache) - CACHE_MAX
        if surplus > CACHE_SURPLUS:
            for identifier in list(self._cache)[:surplus]:
                del self._cache[identifier]

    def first_since(self, created: int) -> int:
        """The lowest ordinal whose object was created at `created` or later (ordinals and times grow together)."""
        self._store.spill()
        low, high = 1, self._next
        probe = f"SELECT created FROM {self.name} WHERE ord <= ? ORDER BY ord DESC LIMIT 1"  # noqa: S608
        while low < high:
            middle = (low + high) // 2
            row = self._store.connection.execute(probe, (middle,)).fetchone()
            if row is not None and row[0] >= created:
                high = middle
            else:
                low = middle + 1
        return low

    def page(
        self,
        limit: int,
        *,
        low: int = 0,
        high: int | None = None,
        ascending: bool = False,
        filters: Iterable[tuple[str, SqlValue]] = (),
    ) -> list[R]:
        """At most `limit` objects with `low < ordinal < high` whose columns equal `filters`, newest first unless `ascending`."""
        where = ["ord > ?", "ord < ?"]
        values: list[SqlValue] = [low, self._next if high is None else high]
        for column, value in filters:
            assert column in self._columns
            where.append(f"{column} = ?")
            values.append(value)
        order = "ASC" if ascending else "DESC"
        sql = f"SELECT data FROM {self.name} WHERE {' AND '.join(where)} ORDER BY ord {order} LIMIT ?"  # noqa: S608
        rows = self._store.query(sql, [*values, limit])
        return [self._decoder.decode(row[0]) for row in rows]

    def sql(self, sql: str, values: Sequence[SqlValue] = ()) -> list[R]:
        """Objects from a query whose first column is `data`."""
        return [self._decoder.decode(row[0]) for row in self._store.query(sql, values)]


class KeyedRows:
    """A plain table with a one-column key, whose newest value of a step wins; None deletes."""

    def __init__(self, store: Store, name: str, columns: Sequence[str]) -> None:
        self._store = store
        self._pending: dict[SqlValue, tuple[SqlValue, ...] | None] = {}
        marks = ", ".join("?" * len(columns))
        self._upsert = f"INSERT OR REPLACE INTO {name} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608
        self._delete = f"DELETE FROM {name} WHERE {columns[0]} = ?"  # noqa: S608

    def put(self, *values: SqlValue) -> None:
        """Insert or replace the row whose key is the first value."""
        self._pending[values[0]] = values
        self._store.touch(self)

    def remove(self, key: SqlValue) -> None:
        """Delete the row of `key`."""
        self._pending[key] = None
        self._store.touch(self)

    def write(self, connection: sqlite3.Connection) -> None:
        """Write the changed rows; see `Writes`."""
        connection.executemany(self._upsert, [values for values in self._pending.values() if values is not None])
        gone = [(key,) for key, values in self._pending.items() if values is None]
        if gone:
            connection.executemany(self._delete, gone)
        self._pending.clear()
