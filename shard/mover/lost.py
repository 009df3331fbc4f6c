"""Ending a move one of whose shards is lost for good: the other one is cleaned up, and keeps what it owns."""

from __future__ import annotations

from oncepay.moves import FENCED, Goal, Move, refusal_without
from shard.mover.changes import Changes
from shard.mover.compare import Comparer
from shard.mover.copy import drop_origin
from shard.mover.errors import MoveRefused
from shard.mover.handover import Handover, claim
from shard.mover.records import Hold
from shard.mover.run import Journey, Mover, OnProgress
from shard.mover.tables import tables_of


async def end_without(mover: Mover, move_id: str, goal: Goal, lost: str, on_progress: OnProgress = lambda _: None) -> Move:
    """Bring the move to `goal`, aborted where the map gives the range to the source, finished where to the target.

    That no node of `lost` lives, nor ever will, is the caller's to know. Raises MoveRefused, MoveTaken; Unavailable when the
    other shard stays away.
    """
    move, _ = await mover.records.get(move_id)
    if move.over or lost not in (move.source, move.target):
        raise MoveRefused(refusal_without(move, goal, lost, move.source))
    hold = await mover.records.take(move_id, None)
    journey = LoneJourney(mover, hold, on_progress, goal, lost)
    try:
        await journey.run()
    finally:
        await journey.close()
        await hold.leave()
    return hold.move


class LoneJourney(Journey):
    """The end of a move, at the shard that lives."""

    def __init__(self, mover: Mover, hold: Hold, on_progress: OnProgress, end: Goal, lost: str) -> None:
        super().__init__(mover, hold, on_progress)
        self._end = end
        self._lost = lost
        self._living = self.target if lost == self.move.source else self.source

    def _arrived(self) -> bool:
        return self.move.state == self._end

    async def _claim(self) -> None:
        await claim(self._living, self._hold)
        self._tables = self._tables or await tables_of(self._living)

    async def _step(self) -> None:
        move, living = self.move, self._living
        if move.state in FENCED:
            await self._unfence()
        owner = (await self._records.change_map(lambda current: current)).range_of(move.first).shard
        if why := refusal_without(move, self._end, self._lost, owner):
            raise MoveRefused(why)
        for back in (True, False):
            stream = self._stream(back=back)
            if stream.taker is living:
                await stream.unsubscribe()
            else:
                await stream.unpublish(Changes(stream, self._tables).slot)
        await drop_origin(living, move.id)
        if living.shard != owner:
            await self._delete(living)
        await self._hold.save(state=self._end, goal=self._end, eta_s=None, problem="")

    async def _unfence(self) -> None:
        """A hand-over was under way. Where the map wasn't told of it, the giver takes back what it had fenced; a taker that has
        the range already is told to the map. No other process can do either any more."""
        move, living = self.move, self._living
        stream = self._stream(back=move.back)
        handover = Handover(self._records, self._hold, stream, Comparer(stream, self._tables), Changes(stream, self._tables))
        known = await self._records.change_map(lambda current: current)
        if living is stream.giver and known.range_of(move.first).shard == living.shard:
            await handover.take_back(self._hold.epoch)
        elif living is stream.taker and await living.owns(move.first, move.last):
            await handover.conclude(None)
