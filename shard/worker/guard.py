"""Watches over moves of the shard's ranges: shows their progress as metrics, and ends a fence whose operator process is gone.

A range that is fenced is nobody's. The process that fenced it ends that within seconds, or undoes it; when that process was
killed, the giver's worker does, so that payments of the range go on without a person.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self, get_args

import msgspec

from oncepay.errors import OncepayError
from oncepay.etcd import Etcd, Mirror
from oncepay.logs import get_logger
from oncepay.moves import FENCED, MOVES_PREFIX, OPERATORS_PREFIX, Move, State
from oncepay.settings import Settings
from shard.mover.records import Records
from shard.mover.run import Mover
from shard.store.leader import Leaders
from shard.worker import metrics

LOOK_S = 1.0

_log = get_logger("guard")
_decode = msgspec.json.Decoder(Move).decode


class Guard:
    """The guard of `shard`'s moves, in a worker; it does something only while that one `is_active`. An async context manager."""

    def __init__(self, shard: str, etcd: Etcd, leaders: Leaders, settings: Settings, is_active: Callable[[], bool]) -> None:
        self._shard = shard
        self._is_active = is_active
        self._moves = Mirror(etcd, MOVES_PREFIX)
        self._operators = Mirror(etcd, OPERATORS_PREFIX)
        self._mover = Mover(Records(etcd), leaders, settings, lambda _: None)
        self._orphans: set[tuple[str, int]] = set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="guard")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with self._moves, self._operators:
            while True:
                if self._is_active():
                    await self._look_at_all()
                await asyncio.sleep(LOOK_S)

    async def _look_at_all(self) -> None:
        for kv in list(self._moves.kvs.values()):
            try:
                move = _decode(kv.value)
                self._measure(move)
                if move.giver == self._shard and move.state in FENCED:
                    await self._look(move)
            except Exception as error:  # a worker lives on, whatever a move's record says
                _log.exception("move not looked at", key=kv.key, error=str(error))

    async def _look(self, move: Move) -> None:
        """A fence without an operator process, seen twice, is ended here."""
        seen = (move.id, move.epoch)
        if self._operators.get(move.id) is not None:
            self._orphans.discard(seen)
        elif seen not in self._orphans:
            self._orphans.add(seen)
        else:
            _log.warning("fence without an operator process", move=move.id, state=move.state)
            try:
                after = await self._mover.rescue(move.id)
            except OncepayError as error:
                metrics.RESCUES.labels(self._shard, "failed").inc()
                _log.error("fence not ended", move=move.id, error=str(error))
            else:
                self._orphans.discard(seen)
                metrics.RESCUES.labels(self._shard, after.state).inc()
                _log.warning("fence ended", move=move.id, state=after.state)

    def _measure(self, move: Move) -> None:
        if move.source != self._shard:
            return
        metrics.MOVE_ROWS.labels(move.id, "copied").set(move.rows_copied)
        metrics.MOVE_ROWS.labels(move.id, "verified").set(move.rows_verified)
        metrics.MOVE_ROWS.labels(move.id, "deleted").set(move.rows_deleted)
        metrics.MOVE_ROWS.labels(move.id, "total").set(move.rows_total)
        metrics.MOVE_BYTES.labels(move.id).set(move.bytes_copied)
        metrics.MOVE_LAG.labels(move.id).set(move.lag_bytes)
        metrics.MOVE_RATE.labels(move.id).set(move.rows_per_s)
        metrics.MOVE_LEFT.labels(move.id).set(move.eta_s or 0.0)
        metrics.MOVE_PAUSE.labels(move.id).set(move.pause_s or 0.0)
        for state in get_args(State):
            metrics.MOVE_STATE.labels(move.id, move.source, move.target, state).set(state == move.state)
