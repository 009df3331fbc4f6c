"""The hand-over of a range: fence at the giver, drain, tail verified, range in at the taker, map.

At every moment at most one shard owns the range. The order makes it so: the fence is on the giver's quorum before the drain
position is read; the taker's transaction checks that the stream was replayed up to it; the map comes last, and tells what is.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from oncepay.errors import ShardUnavailable, Unavailable
from oncepay.feed import lsn_text
from oncepay.logs import get_logger
from oncepay.moves import given
from shard.mover.changes import Changes
from shard.mover.compare import Comparer
from shard.mover.copy import COPY_NAME
from shard.mover.errors import MoveError, MoveStopped, PauseTooLong, RangeBusy, StreamLost
from shard.mover.records import Hold, Records
from shard.mover.side import Side
from shard.mover.stream import Stream, stream_names

LOCK_MS = 150
"""How long the fence waits for the range's lock before it lets those behind it go first."""
LOCK_PAUSE_S = 0.1
LOCK_TRIES = 100
RETREAT_S = 120.0
"""How long the giver is asked to take the range back: a failover passes meanwhile."""
RETREAT_PAUSE_S = 0.5
APPLIED_S = 30.0

_END_COPIES = """
select pg_terminate_backend(pid, 2000) from pg_stat_activity where application_name = $1 and pid <> pg_backend_pid()
"""
_CLAIM = "select oncepay.claim_move($1, $2, $3, $4::text[]) as epoch"
_FENCE = "select oncepay.fence_range($1, $2, $3, $4, $5) as gone"
_TAKE = "select oncepay.take_range($1, $2, $3, $4, $5, $6, $7::text::pg_lsn) as taken"

_log = get_logger("mover")


async def claim(side: Side, hold: Hold) -> None:
    """`side` listens to this epoch of this process, and to none before it: waits out what those have begun.

    But not a copy: its session waits for rows, for ever where the process stands still or its machine is gone.
    """
    move = hold.move
    async with side.session() as session:
        await session.execute(_END_COPIES, f"{COPY_NAME}{move.id}")
    await side.commit(_CLAIM, move.id, hold.epoch, hold.name, list(stream_names(move.id)))


class Handover:
    """One hand-over, of the range of `hold`'s move from `stream.giver` to `stream.taker`."""

    def __init__(self, records: Records, hold: Hold, stream: Stream, comparer: Comparer, changes: Changes) -> None:
        self._records = records
        self._hold = hold
        self._stream = stream
        self._comparer = comparer
        self._changes = changes
        self._take_sent = True
        """Whether a taker may have the range: another process may have asked it to."""
        self.taken = False
        """Whether the taker is known to have the range. It may have to be told to the map still."""

    async def run(self) -> float:
        """Hand the range over; seconds for which it was held. When that fails or takes too long, the giver has it back.

        Raises PauseTooLong, MoveStopped when the tail differs, or what stood in the way.
        """
        move = self._hold.move
        version = (await self._records.change_map(lambda current: current)).version + 1
        await self._hold.save(state="fence", map_version=version, drain_lsn="")
        began_s: float | None = None
        self._take_sent = False
        try:
            began_s = await self._fence()
            async with asyncio.timeout(move.pause_limit_s - (time.monotonic() - began_s)):
                await self._drain()
        except BaseException as error:
            if await asyncio.shield(self.retreat()):
                return await self.conclude(began_s)
            if isinstance(error, TimeoutError):
                raise PauseTooLong(
                    f"the range would have been held for more than {move.pause_limit_s:g} s; it is on {move.giver} as before"
                ) from error
            raise
        return await self.conclude(began_s)

    async def _fence(self) -> float:
        """The range leaves the giver; when that began."""
        move = self._hold.move
        for _ in range(LOCK_TRIES):
            began_s = time.monotonic()
            try:
                row = await self._stream.giver.commit(_FENCE, move.id, self._hold.epoch, move.first, move.last, LOCK_MS)
                if not row["gone"]:
                    self._take_sent = True
                    raise ShardUnavailable(f"slots {move.first}-{move.last} had left {move.giver} before")
                return began_s
            except RangeBusy:
                await asyncio.sleep(LOCK_PAUSE_S)
        raise MoveStopped("the range's lock was never free: a transaction on the giver holds it for long")

    async def _drain(self) -> None:
        """Until the taker has all, and has the range."""
        move, stream = self._hold.move, self._stream
        position = await stream.giver.position()
        await self._hold.save(state="drain", drain_lsn=lsn_text(position))
        await stream.applied(position, APPLIED_S)
        _, found = await self._changes.compare(self._comparer)
        if found:
            await self._hold.save(differences=tuple(found))
            raise MoveStopped(f"what changed last differs: {found[0]}")
        await self._hold.save(state="switch")
        origin = await stream.origin()
        if origin is None:
            raise StreamLost(f"shard {stream.taker.shard} has no subscription {stream.name}")
        await self._no_failover_since()
        self._take_sent = True
        await stream.taker.commit(
            _TAKE, move.id, self._hold.epoch, move.first, move.last, move.map_version, origin, lsn_text(position)
        )

    async def _no_failover_since(self) -> None:
        """Raises StreamLost when either leader is another one than at the verification: what the taker has replayed may be
        more than the giver's quorum ever had."""
        move, sides = self._hold.move, (self._stream.giver, self._stream.taker)
        source, target = reversed(sides) if move.back else sides
        now = await source.timeline(), await target.timeline()
        verified = move.verified
        if verified is None or (verified.source_timeline, verified.target_timeline) != now:
            raise StreamLost("a failover since the verification: all is compared once more")

    async def retreat(self) -> bool:
        """The giver takes the range back, unless the taker has it already; whether the taker has it.

        What this process has sent may still be under way, in a commit that waits for its quorum or in a socket that nobody has
        read. So a higher epoch is claimed first: the claim waits out a take that has begun, and a later one is refused. Only then
        is the taker asked, in a statement of its own. The giver's claim does the same with a fence.
        """
        move, stream = self._hold.move, self._stream
        deadline_s = time.monotonic() + RETREAT_S
        while True:
            try:
                epoch = self._hold.claim_anew()
                if self._take_sent:
                    await claim(stream.taker, self._hold)
                    if await stream.taker.owns(move.first, move.last):
                        return True
                await claim(stream.giver, self._hold)
                await self.take_back(epoch)
                return False
            except Unavailable as error:
                if time.monotonic() > deadline_s:
                    raise MoveError(
                        f"whether slots {move.first}-{move.last} are on {stream.giver.shard} again is not known ({error}):"
                        f" run `oncepay reshard resume {move.id}`"
                    ) from error
                await asyncio.sleep(RETREAT_PAUSE_S)

    async def take_back(self, epoch: int) -> None:
        """The giver has what it had fenced. Only where the taker is known not to have it, or never will be told to the map."""
        move, giver = self._hold.move, self._stream.giver
        await giver.commit(_TAKE, move.id, epoch, move.first, move.last, max(move.map_version, 1), None, None)
        _log.warning("range back at the giver", move=move.id, shard=giver.shard)

    async def conclude(self, began_s: float | None) -> float:
        """The taker has the range: tell the map, and keep the record; seconds since the fence."""
        self.taken = True
        move = self._hold.move
        to = partial(given, first=move.first, last=move.last, shard=self._stream.taker.shard, version=move.map_version)
        await self._hold.change_map(to)
        return time.monotonic() - began_s if began_s is not None else 0.0
