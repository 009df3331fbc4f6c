"""Replacing what is derived from one shard by what its tables hold, in one transaction: readers see the old, then the new.

The body is a stream of frames: a head, batches of rows, what the shard's Postgres copied out of other tables, and an empty frame
once the worker knows that all of it is on the shard's quorum. Nothing is committed without that frame. Postings and sums are made
of the rows in the database, once they are there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import asyncpg
import msgspec

from aggregator import queries
from aggregator.apply import check
from aggregator.put import SQL as APPLY
from aggregator.put import Copier, put_anew
from oncepay.errors import MalformedBody, OncepayError
from oncepay.feed import COPIED, COPY_TAG, FEED_BYTES_MAX, FeedBatch, FeedPosition, RebuildHead, decode_batch, decode_head
from oncepay.logs import get_logger

SQL = queries.load("rebuild.sql")
_CHECKED = ("entry_rows", "link_rows", "payments", "payment_versions")
_SUMS = ("sum_account_days", "sum_account_totals", "sum_kinds")

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

    Raises MalformedBody when the body is cut off or isn't one, EpochEnded for a worker that was replaced.
    """
    head = _head(await _frame(body), shard)
    slots = _multirange(head.slots)
    try:
        async with connection.transaction():
            changed = await _replace(connection, head, slots, body)
    except asyncpg.DataError as error:
        raise MalformedBody(f"the rebuild's rows can't be taken: {error}") from error
    _log.info("shard rebuilt", shard=shard, lsn=head.lsn, **changed)
    return FeedPosition(head.lsn, head.incarnation, head.epoch)


async def _replace(
    connection: asyncpg.Connection, head: RebuildHead, slots: list[asyncpg.Range], body: Reads
) -> dict[str, object]:
    """Do it; what is to be said of it."""
    await _lock(connection, head)
    affected = [row[0] for row in await connection.fetch(SQL["forget_sums"], head.shard, slots)]
    staged = await connection.fetchval(SQL["any_rows"], slots)  # the others that brought some wait by now
    await connection.execute(SQL["forget_payouts"], slots)
    await connection.execute(APPLY["sum_in_memory"])
    if staged:
        await connection.execute(SQL["stage"])
    async with Copier(connection, staged=staged) as copier:
        await _bring(copier, head, body)
    of_each = [copier.rows[table] for table in _CHECKED]
    await connection.execute(SQL["check"], staged, head.shard, slots, head.lsn, of_each)
    await connection.execute(SQL["derive_postings"], staged, slots)
    changed = dict(await connection.fetch(SQL["take"], slots, head.lsn)) if staged else {}
    await connection.execute(SQL["settle_postings"], affected, head.shard, head.lsn)
    await _sum(connection, affected)
    await connection.execute(SQL["forget_versions"], slots)
    await connection.execute(SQL["set_watermark"], head.shard, head.incarnation, head.epoch, head.lsn)
    return {"rows": copier.rows.total(), "changed": changed, "sums_of": affected}


async def _bring(copier: Copier, head: RebuildHead, body: Reads) -> None:
    """All rows of the body, up to its end."""
    versions = "payment_versions" not in head.copied
    while frame := await _frame(body):
        if frame[0] == COPY_TAG:
            await copier.take(_copied(frame, head), _parts(frame, body))
        else:
            await put_anew(copier, _batch(frame, head), versions=versions)


def _copied(frame: bytes, head: RebuildHead) -> str:
    if len(frame) < 2 or frame[1] >= len(head.copied):
        raise MalformedBody("a frame is of no table that the rebuild's head names")
    return head.copied[frame[1]]


async def _parts(frame: bytes, body: Reads) -> AsyncIterator[bytes]:
    """What one COPY wrote, from its first frame on."""
    tag = frame[:2]
    while len(frame) > 2:
        yield frame[2:]
        frame = await _frame(body)
        if frame[:2] != tag:
            raise MalformedBody("a table's copy was cut off by something else")


async def _sum(connection: asyncpg.Connection, affected: list[str]) -> None:
    """Make the sums of these shards' rows, which were forgotten."""
    try:
        for name in _SUMS:
            await connection.execute(SQL[name], affected)
    except asyncpg.NotNullViolationError as error:
        raise MalformedBody("an account has a code that this version doesn't know: upgrade the aggregator first") from error
    await connection.execute(APPLY["sum_postings"], affected, 0)


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


def _multirange(slots: tuple[tuple[int, int], ...]) -> list[asyncpg.Range]:
    return [asyncpg.Range(first, last, lower_inc=True, upper_inc=True) for first, last in slots]
