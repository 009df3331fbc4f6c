"""Replacing what is derived from one shard by what its tables hold, in one transaction: readers see the old, then the new.

The body is a stream of frames: a head, batches of rows, what the shard's Postgres copied out of other tables, and an empty frame
once the worker knows that all of it is on the shard's quorum. Nothing is committed without that frame. Postings and sums are made
of the rows in the database, once they are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol, Self

import asyncpg
import msgspec

from aggregator import queries
from aggregator.apply import check
from aggregator.put import SQL as APPLY
from aggregator.put import Copier, put_anew
from oncepay.errors import MalformedBody, OncepayError, Unavailable
from oncepay.feed import COPIED, COPY_TAG, FEED_BYTES_MAX, FeedBatch, FeedPosition, RebuildHead, decode_batch, decode_head
from oncepay.logs import get_logger

SQL = queries.load("rebuild.sql")
_SUMS = ("sum_account_days", "sum_account_totals", "sum_kinds")
_TABLES = ("entry_rows", "link_rows", "payments", "payment_versions")
"""As `check_rebuild` takes their numbers of rows."""
_LEDGER = ("entry_rows", "link_rows")

_log = get_logger("rebuild")


class EpochEnded(OncepayError):
    """Another worker feeds this shard."""

    status = 409
    slug = "epoch-ended"


class Reads(Protocol):
    """What is read of a body: aiohttp's StreamReader."""

    async def readexactly(self, n: int) -> bytes: ...


async def rebuild(connection: asyncpg.Connection, shard: str, body: Reads) -> FeedPosition:
    """Replace what is derived from `shard` by the rows of `body`; its position is the head's then.

    Raises MalformedBody when the body is cut off or isn't one, EpochEnded for a worker that was replaced, Unavailable when
    there is no room for what comes.
    """
    head = _head(await _frame(body), shard)
    try:
        async with Spool(body) as spool, connection.transaction():
            done = await _Rebuild(connection, head).run(spool)
    except asyncpg.DataError as error:
        raise MalformedBody(f"the rebuild's rows can't be taken: {error}") from error
    _log.info("shard rebuilt", shard=shard, lsn=head.lsn, **done)
    return FeedPosition(head.lsn, head.incarnation, head.epoch)


class _Rebuild:
    """One rebuild, in a transaction."""

    def __init__(self, connection: asyncpg.Connection, head: RebuildHead) -> None:
        self._connection = connection
        self._head = head
        self._slots = [asyncpg.Range(first, last, lower_inc=True, upper_inc=True) for first, last in head.slots]
        self._affected: list[str] = []
        self._staged = False
        self._ledger_done = False
        self._changed: dict[str, int] = {}

    async def run(self, body: Spool) -> dict[str, object]:
        """Do it; what is to be said of it."""
        connection, head, slots = self._connection, self._head, self._slots
        await _lock(connection, head)
        self._affected = [row[0] for row in await connection.fetch(SQL["forget_sums"], head.shard, slots)]
        self._staged = await connection.fetchval(SQL["any_rows"], slots)  # the others that brought some wait by now
        await connection.execute(SQL["forget_payouts"], slots)
        await connection.execute(APPLY["sum_in_memory"])
        await connection.execute(SQL["be_patient"])
        if self._staged:
            await connection.execute(SQL["stage"])
        async with Copier(connection, staged=self._staged) as copier:
            await self._bring(copier, body)
            if not self._ledger_done:
                await self._ledger(copier)
            await self._check(copier, "payments", "payment_versions")
        if self._staged:
            self._changed |= dict(await connection.fetch(SQL["take_payments"], slots, head.lsn))
            await connection.execute(SQL["forget_versions"], slots)
        await connection.execute(SQL["set_watermark"], head.shard, head.incarnation, head.epoch, head.lsn)
        return {"rows": copier.rows.total(), "changed": self._changed, "sums_of": self._affected}

    async def _bring(self, copier: Copier, body: Spool) -> None:
        """All rows of the body, up to its end. What is derived of the ledger is made as soon as it is there."""
        head = self._head
        versions = "payment_versions" not in head.copied
        while frame := await body.frame():
            table = _copied(frame, head) if frame[0] == COPY_TAG else ""
            if head.copied and not self._ledger_done and table not in _LEDGER:
                await self._ledger(copier)
            if table:
                if self._ledger_done and table in _LEDGER:
                    raise MalformedBody("rows of the ledger come after others")
                await copier.take(table, _parts(frame, body))
            else:
                batch = _batch(frame, head)
                if self._ledger_done and (batch.entries or batch.links):
                    raise MalformedBody("rows of the ledger come after others")
                await put_anew(copier, batch, versions=versions)

    async def _ledger(self, copier: Copier) -> None:
        """All entries and links are there: what is derived of them."""
        connection, head, slots = await copier.idle(), self._head, self._slots
        await self._check(copier, *_LEDGER)
        if self._staged:
            self._changed |= dict(await connection.fetch(SQL["take_ledger"], slots, head.lsn))
        else:
            await connection.execute(SQL["derive_postings"], slots)
        await connection.execute(SQL["settle_postings"], self._affected, head.shard, head.lsn)
        try:
            for name in _SUMS:
                await connection.execute(SQL[name], self._affected)
        except asyncpg.NotNullViolationError as error:
            raise MalformedBody("an account has a code that this version doesn't know: upgrade the aggregator first") from error
        await connection.execute(APPLY["sum_postings"], self._affected, 0)
        self._ledger_done = True

    async def _check(self, copier: Copier, *tables: str) -> None:
        connection, head = await copier.idle(), self._head
        if {"payments", "payment_versions"} <= {*tables} & {*head.copied}:
            payments, versions = (copier.rows[table] for table in ("payments", "payment_versions"))
            if payments != versions:
                raise MalformedBody(f"{payments} payments came, and versions of {versions}")
        rows = [copier.rows[table] if table in tables else None for table in _TABLES]
        await connection.execute(SQL["check"], self._staged, head.shard, self._slots, head.lsn, rows)


def _copied(frame: bytes, head: RebuildHead) -> str:
    if len(frame) < 2 or frame[1] >= len(head.copied):
        raise MalformedBody("a frame is of no table that the rebuild's head names")
    return head.copied[frame[1]]


async def _parts(frame: bytes, body: Spool) -> AsyncIterator[bytes]:
    """What one COPY wrote, from its first frame on."""
    tag = frame[:2]
    while len(frame) > 2:
        yield frame[2:]
        frame = await body.frame()
        if frame[:2] != tag:
            raise MalformedBody("a table's copy was cut off by something else")


class Spool:
    """A body's frames, read as they come, also while the one that takes them is busy: the shard's node needn't wait for it. What
    waits is in a file that is gone with it."""

    def __init__(self, body: Reads) -> None:
        self._body = body
        try:
            self._file = tempfile.TemporaryFile(prefix="oncepay-rebuild-")  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error
        self._sizes: deque[int] = deque()
        self._read_at = 0
        self._more = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._filling = asyncio.create_task(self._fill())
        self._filling.add_done_callback(lambda _: self._more.set())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._filling is not None
        self._filling.cancel()
        await asyncio.gather(self._filling, return_exceptions=True)
        with contextlib.suppress(OSError):  # what a full disk didn't take is tried once more
            self._file.close()

    async def frame(self) -> bytes:
        """The next frame. Raises MalformedBody as soon as the body was cut off before its end, Unavailable for lack of room."""
        assert self._filling is not None
        while True:
            if self._filling.done():
                self._filling.result()
            if self._sizes:
                break
            if self._filling.done():
                raise MalformedBody("the rebuild has ended")
            self._more.clear()
            await self._more.wait()
        size = self._sizes.popleft()
        frame = os.pread(self._file.fileno(), size, self._read_at)
        self._read_at += size
        if not self._sizes:
            self._read_at = 0
            self._file.seek(0)
            self._file.truncate()
        return frame

    async def _fill(self) -> None:
        """All frames, with the empty one at the end."""
        frame = b"head"
        while frame:
            frame = await _frame(self._body)
            try:
                self._file.write(frame)
                self._file.flush()
            except OSError as error:
                raise _no_room(error) from error
            self._sizes.append(len(frame))
            self._more.set()


async def _lock(connection: asyncpg.Connection, head: RebuildHead) -> None:
    """Wait out the shard's batches, and keep new ones away until the end."""
    known = await connection.fetchrow(APPLY["lock_watermark"], head.shard)
    if known is not None and known["epoch"] > head.epoch:
        raise EpochEnded(f"epoch {head.epoch} of shard {head.shard} is over: {known['epoch']} is known")


async def _frame(body: Reads) -> bytes:
    try:
        size = int.from_bytes(await body.readexactly(4), "big")
        if size > FEED_BYTES_MAX:
            raise MalformedBody(f"a frame of {size} bytes; {FEED_BYTES_MAX} is the most")
        return await body.readexactly(size)
    except EOFError as error:  # asyncio.IncompleteReadError is one
        raise MalformedBody("the rebuild was cut off: nothing has changed") from error


def _head(frame: bytes, shard: str) -> RebuildHead:
    try:
        head = decode_head(frame)
    except msgspec.DecodeError as error:
        raise MalformedBody(f"the rebuild's head can't be read: {error}") from None
    if head.shard != shard or not head.incarnation or not 0 < head.lsn < 1 << 64:
        raise MalformedBody(f"the rebuild's head is not of shard {shard}, or names no position")
    if not all(0 <= first <= last <= 65_535 for first, last in head.slots):
        raise MalformedBody(f"these are no slots: {head.slots}")
    if unknown := [table for table in head.copied if table not in COPIED]:
        raise MalformedBody(
            f"tables come copied that this version doesn't know: {', '.join(unknown)}; upgrade the aggregator first"
        )
    return head


def _batch(frame: bytes, head: RebuildHead) -> FeedBatch:
    try:
        batch = decode_batch(frame)
    except msgspec.DecodeError as error:
        raise MalformedBody(f"a frame is no batch: {error}") from None
    check(batch)
    if (batch.shard, batch.incarnation, batch.to_lsn) != (head.shard, head.incarnation, head.lsn):
        raise MalformedBody("a batch of another rebuild")
    return batch


def _no_room(error: OSError) -> Unavailable:
    return Unavailable(f"what comes can't be kept in the temporary directory (TMPDIR): {error}; nothing has changed")
