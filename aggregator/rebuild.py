"""Replacing what is derived from one shard by what its tables hold, in one transaction: readers see the old, then the new.

The body is a stream of frames: a head, batches of rows, and an empty frame once the worker knows that all of it is on the
shard's quorum. Nothing is committed without that frame.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import asyncpg
import msgspec

from aggregator import queries
from aggregator.apply import check
from aggregator.fold import Sums
from aggregator.put import SQL as APPLY
from aggregator.put import Copier, add_sums, put_anew
from oncepay.errors import MalformedBody, OncepayError
from oncepay.feed import FEED_BYTES_MAX, FeedBatch, FeedPosition, RebuildHead, decode_batch, decode_head
from oncepay.logs import get_logger

SQL = queries.load("rebuild.sql")
_SUMS = ("sum_account_totals", "sum_account_days", "sum_kinds")

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
    async with connection.transaction():
        await _lock(connection, head)
        affected = [row[0] for row in await connection.fetch(SQL["forget_sums"], shard, slots)]
        staged = await connection.fetchval(SQL["any_rows"], slots)  # the others that brought some wait by now
        await connection.execute(SQL["forget_payouts"], slots)
        await connection.execute(APPLY["sum_in_memory"])
        for name in _SUMS:
            await connection.execute(SQL[name], affected, slots)
        if staged:
            await connection.execute(SQL["stage"])
        rows, sums = 0, Sums()
        async with Copier(connection, staged=staged) as copier:
            async for frame in _frames(body):
                batch = _batch(frame, head)
                sums.add(await put_anew(copier, batch))
                rows += batch.rows
        changed = dict(await connection.fetch(SQL["take"], slots, head.lsn)) if staged else {}
        await connection.execute(SQL["settle_postings"], affected, shard, head.lsn)
        await add_sums(connection, shard, sums)
        await connection.execute(APPLY["sum_postings"], affected, 0)
        await connection.execute(SQL["forget_versions"], slots)
        await connection.execute(SQL["set_watermark"], shard, head.incarnation, head.epoch, head.lsn)
    _log.info("shard rebuilt", shard=shard, rows=rows, changed=changed, lsn=head.lsn, sums_of=affected)
    return FeedPosition(head.lsn, head.incarnation, head.epoch)


async def _lock(connection: asyncpg.Connection, head: RebuildHead) -> None:
    """Wait out the shard's batches, and keep new ones away until the end."""
    known = await connection.fetchrow(APPLY["lock_watermark"], head.shard)
    if known is not None and known["epoch"] > head.epoch:
        raise EpochEnded(f"epoch {head.epoch} of shard {head.shard} is over: {known['epoch']} is known")


async def _frames(body: Reads) -> AsyncIterator[bytes]:
    """All frames up to the empty one."""
    while frame := await _frame(body):
        yield frame


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
