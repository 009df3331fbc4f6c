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
"""A backlog that has not become less in this time is let through: the payments of the range bring as much as the spells take."""

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
        self._lags: list[tuple[float, int]] = []
        self.given_up = False

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
        """Leave it open for a spell, then shut it for `REST` times as long. Where the backlog doesn't shrink, it stays open from
        then on."""
        await asyncio.sleep(OPEN_S)
        # Not by the slot: with data always at hand the apply worker confirms them once in half a minute.
        if self.given_up or self._stands(await self._stream.giver.position() - await self._stream.progress()):
            return
        await self.shut(OPEN_S * REST)

    async def shut(self, seconds: float) -> None:
        """Hold the stream for a time. Raises OutcomeUnknown when the session is gone, and the stream goes on."""
        assert self._session is not None
        with self._stream.taker.own_errors():
            async with self._session.transaction():
                await self._session.fetchval(_LOCK, self._stream.name)
                await asyncio.sleep(seconds)

    def _stands(self, lag_bytes: int) -> bool:
        now_s = time.monotonic()
        self._lags.append((now_s, lag_bytes))
        then_s, before = self._lags[0]
        if now_s - then_s >= LOOK_BACK_S:
            self.given_up = lag_bytes >= before
            self._lags = self._lags[-1:]
        return self.given_up
