"""A move with a rate brings its backlog in spells, and rests between them.

What came during a copy is applied by a worker of Postgres, which has no throttle of its own and takes a processor whole for
minutes. But it applies one transaction after the other, and now and then one of them is a mark of the move (`Stream.mark`).
Whoever has locked the mark's row at the taker holds the worker there. The lock goes with its session: a process that stands still
holds the stream for `IDLE_MAX` at most, and one that is gone doesn't at all.
"""

from __future__ import annotations

import asyncio
import time
from typing import Self

import asyncpg

from shard.mover.pace import REST
from shard.mover.stream import Stream

MARK_EVERY_S = 1.0
"""A mark so often during the copy. What came in a second is applied in some 0.15 s."""
OPEN_S = 0.25
IDLE_MAX = "5s"
LOOK_BACK_S = 15.0
"""Where the backlog has not become less in this time, the range's payments bring as much as the spells take: rests are halved."""
REST_MIN = 0.2
"""After a rest of at most so many times the spell there is none: the backlog is let through."""

_LOCK = "select beat from oncepay.move_marks where stream = $1 for update"


class Marks:
    """Puts marks into a stream, one every `MARK_EVERY_S` at most."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._next_s = 0.0

    async def put(self) -> None:
        """A mark, when it is time for one. Raises OutcomeUnknown or ShardUnavailable."""
        if time.monotonic() >= self._next_s:
            await self._stream.mark()
            self._next_s = time.monotonic() + MARK_EVERY_S


class Gate:
    """Holds the stream at its next mark while it is shut. `async with Gate(stream) as gate`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._session: asyncpg.Connection | None = None
        self._seen: tuple[float, float] | None = None
        self.rest = REST

    async def __aenter__(self) -> Self:
        session = await self._stream.taker.open()
        try:
            with self._stream.taker.own_errors():
                await session.execute(f"set idle_in_transaction_session_timeout = '{IDLE_MAX}'")
                await session.execute("set synchronous_commit = 'off'")  # nothing is written: no quorum to wait for
        except BaseException:
            session.terminate()
            raise
        self._session = session
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session is not None:
            self._session.terminate()

    async def turn(self) -> None:
        """Leave it open for a spell, then shut it for `rest` times as long: `REST`, and less where the backlog doesn't shrink."""
        await asyncio.sleep(OPEN_S)
        if self.rest:
            self._look(await self._stream.behind_s())
        if self.rest:
            await self.shut(OPEN_S * self.rest)

    async def shut(self, seconds: float) -> None:
        """Hold the stream for a time. Raises OutcomeUnknown when the session is gone, and the stream goes on."""
        assert self._session is not None
        with self._stream.taker.own_errors():
            async with self._session.transaction():
                await self._session.fetchval(_LOCK, self._stream.name)
                await asyncio.sleep(seconds)

    def _look(self, behind_s: float) -> None:
        """Rest less when the stream is as far behind as `LOOK_BACK_S` ago. That is told in time, not in bytes: after a checkpoint
        a payment is several times as much log as before it."""
        now_s = time.monotonic()
        self._seen = self._seen or (now_s, behind_s)
        then_s, before_s = self._seen
        if now_s - then_s >= LOOK_BACK_S:
            self._seen = now_s, behind_s
            if behind_s >= before_s:
                self.rest = self.rest / 2 if self.rest > REST_MIN else 0.0
