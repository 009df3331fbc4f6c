"""Carrying a move on, from wherever it stands to where the operator wants it.

Each step is written to the move's record before it begins, and may be done again from its start: so any operator process can
carry a move on that another one left at any point.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import NoReturn

from msgspec.structs import replace

from oncepay.errors import Unavailable
from oncepay.etcd import Etcd
from oncepay.logs import get_logger
from oncepay.moves import BUSY, FENCED, Goal, Move, Verified, split
from oncepay.settings import Settings
from shard.mover.changes import Changes
from shard.mover.compare import Comparer
from shard.mover.copy import Copied, Copier, drop_origin
from shard.mover.errors import MovePaused, MoveStopped, NotDrained, PauseTooLong, StreamLost
from shard.mover.gate import Gate, Marks
from shard.mover.handover import Handover, claim
from shard.mover.records import Hold, Records, now_ms
from shard.mover.remove import Remover
from shard.mover.side import Side
from shard.mover.stream import Stream, drop_stale, stream_names
from shard.mover.tables import Table, same_tables
from shard.store.leader import Leaders

NEAR_BYTES = 256 << 10
"""A stream that is no further behind than this has caught up."""
CATCH_UP_PAUSE_S = 0.25
APPLIED_S = 60.0
AWAY_S = 180.0
"""How long a step is tried again while a shard or etcd is away."""
AWAY_PAUSE_S = 1.0
SAVE_S = 1.0
"""How often progress is written to the record."""
TURN_PAUSE_S = 1.0
NEAR_KEYS = 200
NEAR_ROUNDS = 10

UNSWITCHED: frozenset[Goal] = frozenset({"ready", "reversible", "aborted"})
"""Goals of moves whose range is the source's still."""
SWITCHED: frozenset[Goal] = frozenset({"finished", "rolled_back"})
"""Goals of moves whose range is the target's by now."""

OnProgress = Callable[[Move], None]

_SPLIT = "select oncepay.split_range($1, $2, $3, $4, $5, $6) as cuts"

_log = get_logger("mover")


@asynccontextmanager
async def mover(etcd: Etcd, settings: Settings, on_progress: OnProgress = lambda _: None) -> AsyncIterator[Mover]:
    """`async with mover(etcd, settings) as m: await m.run(move_id, "ready")`"""
    leaders = Leaders(etcd)
    await leaders.start(10.0)
    try:
        yield Mover(Records(etcd), leaders, settings, on_progress)
    finally:
        await leaders.stop()


class Mover:
    """Carries moves on."""

    def __init__(self, records: Records, leaders: Leaders, settings: Settings, on_progress: OnProgress) -> None:
        self.records = records
        self.leaders = leaders
        self.settings = settings
        self._on_progress = on_progress

    async def run(self, move_id: str, goal: Goal | None) -> Move:
        """Bring the move to `goal` (None: the one that it had), and return it.

        Raises MoveRefused, MoveTaken, MovePaused, MoveStopped, PauseTooLong; Unavailable when a part stays away.
        """
        hold = await self.records.take(move_id, goal)
        journey = Journey(self, hold, self._on_progress)
        try:
            await journey.run()
        except MovePaused:
            raise
        except (MoveStopped, PauseTooLong) as problem:
            await hold.save(problem=str(problem))
            raise
        finally:
            await journey.close()
            await hold.leave()
        return hold.move

    async def rescue(self, move_id: str) -> Move:
        """Make a range whole that a process which is gone left fenced: it goes back to its giver, or is told to be the taker's.

        The move is not carried on. Raises MoveTaken when a process has it.
        """
        hold = await self.records.take(move_id, None, wait_s=0.0)
        journey = Journey(self, hold, self._on_progress)
        try:
            await journey.rescue()
        finally:
            await journey.close()
            await hold.leave()
        return hold.move


class Journey:
    """One process's part of a move."""

    def __init__(self, mover: Mover, hold: Hold, on_progress: OnProgress) -> None:
        self._records = mover.records
        self._hold = hold
        self._on_progress = on_progress
        name = f"oncepay-mover {hold.move.id}"
        self._sides = {shard: Side(shard, mover.leaders, mover.settings, name) for shard in (hold.move.source, hold.move.target)}
        self._tables: tuple[Table, ...] = ()
        self._stream_ended = False
        """Whether the stream to the target is known to be gone."""
        self._saved_s = 0.0
        self._pace: list[tuple[float, int]] = []

    @property
    def move(self) -> Move:
        return self._hold.move

    @property
    def source(self) -> Side:
        return self._sides[self.move.source]

    @property
    def target(self) -> Side:
        return self._sides[self.move.target]

    def _stream(self, *, back: bool) -> Stream:
        move = self.move
        there, home = stream_names(move.id)
        giver, taker = (self.target, self.source) if back else (self.source, self.target)
        return Stream(home if back else there, move.id, self._hold.epoch, giver, taker, move.first, move.last)

    async def close(self) -> None:
        """Drop the sessions."""
        for side in self._sides.values():
            await side.close()

    async def run(self) -> None:
        """Step by step to the goal. While a part is away, the step is begun again; after AWAY_S the error is told."""
        away_since_s: float | None = None
        told = ""
        while not self._arrived():
            before = (self.move.state, self.move.back)
            try:
                await self._claim()
                await self._step()
            except (NotDrained, Unavailable) as error:
                if (self.move.state, self.move.back) != before:
                    away_since_s = None
                away_since_s = away_since_s or time.monotonic()
                if time.monotonic() - away_since_s > AWAY_S:
                    raise
                self._hold.claim_anew()  # what was sent and not answered must not be done later
                if str(error) != told:  # each second the same would be no news
                    _log.warning("step begun again", move=self.move.id, state=self.move.state, error=str(error))
                told = str(error)
                await asyncio.sleep(AWAY_PAUSE_S)
            else:
                away_since_s, told = None, ""

    async def rescue(self) -> None:
        """Only what a fence left undone."""
        if self.move.state in FENCED:
            await self._claim()
            await self._after_a_fence()
            gone = "the operator process ended while the range was fenced"
            await self._hold.save(problem=f"{gone}: `oncepay reshard resume {self.move.id}` carries the move on")

    def _arrived(self) -> bool:
        move = self.move
        wanted = {"planned": "plan"}.get(move.goal, move.goal)
        if move.goal == "reversible":
            return move.state == "reversible" and self._stream_ended
        return move.state == wanted

    async def _claim(self) -> None:
        """Both sides listen to this process, and to none before it."""
        for side in self._sides.values():
            await claim(side, self._hold)
        if not self._tables:
            self._tables = await same_tables(self.source, self.target)

    async def _step(self) -> None:
        """The next step, by the state and the goal alone."""
        move = self.move
        if move.state in FENCED:
            await self._after_a_fence()
        elif move.goal == move.state == "reversible":
            await self._end_stream()  # the switch was through, but cut off before this
        elif move.goal == "aborted" and move.state == "reversible":
            await self._switched_before()
        elif move.goal in UNSWITCHED and await self.target.owns(move.first, move.last):
            await self._switched_before()  # the record is of a restored etcd: the stream back is of after the switch
        elif move.goal in SWITCHED and await self.source.owns(move.first, move.last):
            await self._rolled_back_before()  # of a restored etcd, too
        elif move.goal == "aborted":
            await self._abort()
        elif move.goal == "finished":
            await self._finish()
        elif move.goal == "rolled_back":
            await self._roll_back()
        elif move.state == "plan":
            await self._turn()
            await self._hold.save(state="copy", started_at_ms=move.started_at_ms or now_ms(), problem="")
        elif move.state == "copy":
            await self._copy(self._stream(back=False))
            await self._hold.save(state="catch_up", eta_s=None, rows_per_s=0.0)
        elif move.state == "catch_up":
            await self._catch_up(self._stream(back=False))
            await self._hold.save(state="verify", rows_verified=0)
        elif move.state == "verify":
            await self._need(self._stream(back=False))
            await self._verify(self._stream(back=False))
            await self._hold.save(state="ready", eta_s=None)
        else:
            await self._switch()

    async def _switched_before(self) -> NoReturn:
        """The target has the range: what would come before the switch must not be done any more."""
        move = self.move
        await self._end_stream()
        await self._hold.save(state="reversible", goal="reversible", eta_s=None)
        raise MoveStopped(
            f"the switch was through already: `oncepay reshard rollback {move.id}` brings the range back, "
            f"`oncepay reshard finish {move.id}` leaves it on {move.target}"
        )

    async def _rolled_back_before(self) -> None:
        """The source has the range back: nothing of it must be deleted there, and nothing is left to be brought."""
        move = self.move
        await self._clean_up_at_target()
        if move.goal == "finished":
            raise MoveStopped(f"the rollback was through already: the range is on {move.source}, and the move is over")

    async def _progress(self, fields: dict[str, object], *, force: bool = False) -> None:
        """Keep progress in the record now and then, and tell who watches. An operator's pause is noticed here."""
        now_s = time.monotonic()
        if force or now_s - self._saved_s > SAVE_S:
            self._saved_s = now_s
            await self._hold.save(**fields)
            self._on_progress(self._hold.move)
        else:
            self._on_progress(replace(self._hold.move, **fields))

    def _estimate(self, done: int, total: int) -> dict[str, object]:
        """Rows a second over the last while, and how long the rest takes at that rate."""
        now_s = time.monotonic()
        if self._pace and done < self._pace[-1][1]:
            self._pace.clear()
        self._pace = [*self._pace[-200:], (now_s, done)]
        (then_s, before), passed_s = self._pace[0], now_s - self._pace[0][0]
        rate = (done - before) / passed_s if passed_s > 0.2 and then_s else 0.0
        return {"rows_per_s": round(rate, 1), "eta_s": round(max(0, total - done) / rate, 1) if rate else None}

    async def _turn(self) -> None:
        """Wait while another move loads one of the two shards: the older one goes first."""
        while True:
            mine = {self.move.source, self.move.target}
            ahead = [
                other for other in await self._records.all()
                if other.id != self.move.id and not other.paused and not other.problem and other.state in BUSY
                and mine & {other.source, other.target}
            ]  # fmt: skip
            if not ahead:
                return
            await self._progress({"problem": f"waits for move {ahead[0].id} ({ahead[0].state})"}, force=True)
            await asyncio.sleep(TURN_PAUSE_S)

    # To the target

    async def _copy(self, stream: Stream) -> None:
        """Everything that is there now, into the taker; the stream keeps what changes meanwhile."""
        move = self.move
        await self._split()
        await stream.publish(self._tables)
        copier = Copier(
            move.id, self._hold.epoch, stream.giver, stream.taker, move.first, move.last, self._tables,
            rows_total=max(move.rows_total, 1), limit_rows_per_s=move.rate_rows_per_s, lag_max_bytes=move.lag_max_bytes,
        )  # fmt: skip
        if not await self._has_slot(stream):
            # The first time, or it was lost: what was copied before would miss what changed since. The slot comes last, so that
            # whoever finds one has nothing of this left to do.
            await stream.unsubscribe()  # one of an earlier slot knows a progress that this one doesn't begin at
            await self._delete(stream.taker)
            await copier.begin()
            timelines = await self.source.timeline(), await self.target.timeline()
            await self._hold.save(
                attempt=move.attempt + 1, copied_on=timelines, rows_copied=0, bytes_copied=0, verified=None, rows_deleted=0
            )
            await stream.make_slot()
        await stream.subscribe()

        marks = Marks(stream)

        async def on_chunk(done: Copied) -> None:
            if move.rate_rows_per_s:
                await marks.put()
            figures = self._estimate(done.rows, self.move.rows_total)
            await self._progress({"rows_copied": done.rows, "bytes_copied": done.bytes} | figures)

        done = await copier.run(on_chunk)
        await self._progress({"rows_copied": done.rows, "bytes_copied": done.bytes, "rows_total": done.rows}, force=True)
        async with stream.taker.session() as session:
            for table in self._tables:
                await session.execute(f"analyze {table.qualified}")

    @staticmethod
    async def _has_slot(stream: Stream) -> bool:
        """Whether the stream's slot is there. One that has lost its log is dropped."""
        try:
            return await stream.slot() is not None
        except StreamLost:
            await stream.drop_slot(stream.name)
            return False

    async def _split(self) -> None:
        """The range becomes one of its own, at the source and in the map; its owner stays."""
        move = self.move
        version = (await self._records.change_map(lambda current: current)).version + 1
        owner = self._sides[move.giver]
        await owner.commit(_SPLIT, move.id, self._hold.epoch, move.first, move.last, version, 1_000)
        await self._records.change_map(partial(split, first=move.first, last=move.last))

    async def _catch_up(self, stream: Stream) -> None:
        """Until what changed during the copy has been replayed, but for the last moment.

        What was replayed in a hurry is on the taker's quorum at the end. Had a failover of the taker erased some of it, which
        then never comes again, the verification finds that, and the copy begins anew.
        """
        await self._need(stream)
        await stream.hurry(wanted=True)
        await stream.enable()
        async with AsyncExitStack() as stack:
            gate = await stack.enter_async_context(Gate(stream)) if self.move.rate_rows_per_s else None
            while True:
                slot = await self._need(stream)
                await self._progress({"lag_bytes": max(0, slot)})
                if slot < NEAR_BYTES:
                    break
                await stream.mark()
                if gate is None:
                    await asyncio.sleep(CATCH_UP_PAUSE_S)
                else:
                    await gate.turn()
        await stream.hurry(wanted=False)
        await stream.applied(await stream.giver.position(), APPLIED_S)  # what began in a hurry has ended
        await stream.secured()
        await self._progress({"lag_bytes": await self._need(stream)}, force=True)

    async def _need(self, stream: Stream) -> int:
        """The stream's lag in bytes. When a failover has lost its slot, the copy begins anew."""
        try:
            slot = await stream.slot()
            is_there = slot is not None and await stream.origin() is not None
        except StreamLost:
            slot, is_there = None, False
            await stream.drop_slot(stream.name)
        if slot is None or not is_there:
            await self._anew(stream, "a failover has lost the stream's slot")
        assert slot is not None
        return slot.lag_bytes

    async def _anew(self, stream: Stream, why: str) -> None:
        """Begin the copy anew. Always raises, so that the next step is the copy."""
        _log.warning("the copy begins anew", move=self.move.id, reason=why)
        await stream.drop(Changes(stream, self._tables).slot)
        await self._hold.save(state="copy", verified=None)
        raise StreamLost(f"the copy begins anew: {why}")

    async def _verify(self, stream: Stream) -> None:
        """Compare all, and remember what changes from now on."""
        changes = Changes(stream, self._tables)
        await changes.begin()
        timelines = await self.source.timeline(), await self.target.timeline()
        comparer = Comparer(stream, self._tables)

        async def on_chunk(rows: int) -> None:
            await self._progress({"rows_verified": rows} | self._estimate(rows, self.move.rows_total))

        found = await comparer.whole(max(self.move.rows_total, 1), on_chunk, limit_rows_per_s=self.move.rate_rows_per_s)
        if found:
            if timelines != self.move.copied_on:
                await self._anew(stream, "after a failover rows differ, as when an old leader's last changes came in")
            await self._hold.save(differences=tuple(found), rows_verified=comparer.rows)
            raise MoveStopped(f"{len(found)} rows differ, the first: {found[0]}")
        verified = Verified(now_ms(), comparer.rows, *timelines)
        await self._hold.save(verified=verified, rows_verified=comparer.rows, differences=())

    # The hand-over

    async def _switch(self) -> None:
        """From ready to reversible. A failover since the verification voids it."""
        stream, home = self._stream(back=False), self._stream(back=True)
        if not await self._is_fresh(stream):
            await self._hold.save(state="verify", rows_verified=0)
            return
        await self._prepare(home)
        await self._hand_over(stream)

    async def _is_fresh(self, stream: Stream) -> bool:
        """Whether the verification still stands: no failover since, and all changes since are remembered."""
        await self._need(stream)
        await drop_stale(stream.giver, [stream.name, Changes(stream, self._tables).slot])
        verified = self.move.verified
        if verified is None or not await Changes(stream, self._tables).there():
            return False
        return (verified.source_timeline, verified.target_timeline) == (
            await self.source.timeline(),
            await self.target.timeline(),
        )

    async def _prepare(self, home: Stream) -> None:
        """The stream back runs before anything is written at the taker."""
        await home.publish(self._tables)
        if await home.make_slot():
            await home.unsubscribe()  # as in `_copy`
        await home.subscribe()
        await home.enable()

    async def _hand_over(self, stream: Stream) -> None:
        """Compare what changed since the verification, then hand over."""
        comparer, changes = Comparer(stream, self._tables), Changes(stream, self._tables)
        await stream.applied(await stream.giver.position(), APPLIED_S)
        for _ in range(NEAR_ROUNDS):
            count, found = await changes.compare(comparer)
            if found:
                await self._hold.save(differences=tuple(found))
                raise MoveStopped(f"{len(found)} rows differ, the first: {found[0]}")
            if count <= NEAR_KEYS:
                break
        handover = Handover(self._records, self._hold, stream, comparer, changes)
        try:
            pause_s = await handover.run()
        except (MoveStopped, PauseTooLong, Unavailable, MovePaused):
            if not handover.taken:  # else it stays `switch` until the map tells who has the range: whoever goes on sees to that
                await self._kept()
            raise
        await self._after_handover(pause_s)

    async def _after_handover(self, pause_s: float | None) -> None:
        """The map tells of the new owner: what is left is no matter of the pause."""
        kept = self.move.pause_s if pause_s is None else round(pause_s, 3)
        await self._hold.save(pause_s=kept, **({} if self.move.back else {"state": "reversible"}))
        await self._claim()
        if self.move.back:
            await self._clean_up_at_target()
        else:
            await self._end_stream()

    async def _end_stream(self) -> None:
        """The target has the range: nothing comes from the source any more, and no slot there has to keep its log."""
        stream = self._stream(back=False)
        await stream.drop(Changes(stream, self._tables).slot)
        self._stream_ended = True

    async def _after_a_fence(self) -> None:
        """Another process left the range fenced, or handed over and not told: find out, and make it whole."""
        stream = self._stream(back=self.move.back)
        handover = Handover(self._records, self._hold, stream, Comparer(stream, self._tables), Changes(stream, self._tables))
        if await handover.retreat():
            await handover.conclude(None)
            await self._after_handover(None)
        else:
            await self._kept()

    async def _kept(self) -> None:
        """A hand-over has failed, and the giver has the range: the position in the record is of no hand-over that was."""
        await self._hold.save(state="reversible" if self.move.back else "ready", back=False, drain_lsn="")

    # The ends

    async def _roll_back(self) -> None:
        """Back to the source, verified first. When a failover has lost the stream back, the source gets a fresh copy."""
        home = self._stream(back=True)
        if self.move.back and self.move.state == "copy":
            await self._copy(home)
            await self._hold.save(state="catch_up", eta_s=None, rows_per_s=0.0)
            return
        if self.move.back and self.move.state == "catch_up":
            await self._catch_up(home)
        await self._hold.save(state="verify", back=True, rows_verified=0, verified=None)
        try:
            await self._need(home)
            await home.applied(await home.giver.position(), APPLIED_S)
            await self._verify(home)
        except MoveStopped:
            await self._hold.save(state="reversible", back=False, goal="reversible")
            raise
        await self._hand_over(home)

    async def _clean_up_at_target(self) -> None:
        """After a rollback: the target keeps nothing."""
        for back in (True, False):
            stream = self._stream(back=back)
            await stream.drop(Changes(stream, self._tables).slot)
        await self._drop_origin()
        await self._delete(self.target)
        await self._hold.save(state="rolled_back", goal="rolled_back", back=True, eta_s=None)

    async def _finish(self) -> None:
        """No way back: the source keeps nothing, of a rollback that was given up either."""
        for back in (True, False):
            stream = self._stream(back=back)
            await stream.drop(Changes(stream, self._tables).slot)
        await self._drop_origin()
        await self._delete(self.source)
        await self._hold.save(state="finished", back=False, eta_s=None)

    async def _abort(self) -> None:
        """The move was never made: the target keeps nothing."""
        for back in (True, False):
            stream = self._stream(back=back)
            await stream.drop(Changes(stream, self._tables).slot)
        await self._drop_origin()
        await self._delete(self.target)
        await self._hold.save(state="aborted", eta_s=None, problem="")

    async def _drop_origin(self) -> None:
        """On both sides: a rollback may have copied the range back."""
        for side in self._sides.values():
            await drop_origin(side, self.move.id)

    async def _delete(self, side: Side) -> None:
        """Delete the range's rows on a shard that doesn't own it, those that refer to others first."""
        move = self.move

        async def on_rows(gone: int) -> None:
            await self._progress({"rows_deleted": gone})

        session = await side.open(mover=True)
        try:
            with side.own_errors():
                remover = Remover(session, move.id, self._hold.epoch, move.first, move.last, move.rate_rows_per_s, on_rows)
                for table in reversed(self._tables):
                    await remover.remove(table)
            await self._progress({"rows_deleted": remover.gone}, force=True)
        finally:
            session.terminate()
        await drop_stale(side, [name + tail for name in stream_names(move.id) for tail in ("", "_check")])
