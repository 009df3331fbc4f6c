"""Moves in etcd: their records, who carries one on, and the map.

An operator process holds a key under a lease and has an epoch of the record; every write of the record compares both, and all
that it does to a shard's database compares the epoch there. A lease alone would be no mutual exclusion.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from oncepay.errors import EtcdUnavailable
from oncepay.etcd import Compare, Etcd, EtcdOutcomeUnknown, Lease, Put, absent, mod_revision_is, value_is
from oncepay.logs import get_logger
from oncepay.moves import MOVES_PREFIX, OPERATORS_PREFIX, Goal, Move, refusal
from oncepay.shardmap import MAP_KEY, SHARDS_PREFIX, ShardMap, is_removing
from shard.mover.errors import MoveError, MovePaused, MoveRefused, MoveTaken, NoSuchMove

TTL_S = 5
TAKE_S = TTL_S + 3.0
"""How long a process waits for the seat of one that was killed."""
TRIES = 20
PAUSE_S = 0.2
FREEZE_AT = "ONCEPAY_MOVER_FREEZE_AT"
"""The environment variable by which fault campaigns stop an operator process at a step."""
CLAIMS_MAX = 4096
OVER_MAX = 50
"""Moves that are over and kept as history."""

MapChange = Callable[[ShardMap], ShardMap]
"""A change of the map; it returns the very same map when nothing has to change."""

_log = get_logger("mover")
_decode = msgspec.json.Decoder(Move).decode


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A short name, usable in the names of slots."""
    return f"m{secrets.token_hex(4)}"


class Records:
    """All moves of a deployment."""

    def __init__(self, etcd: Etcd) -> None:
        self.etcd = etcd

    async def all(self) -> list[Move]:
        """Every move, the oldest first."""
        kvs, _ = await self.etcd.get_prefix(MOVES_PREFIX)
        return sorted((_decode(kv.value) for kv in kvs), key=lambda move: (move.created_at_ms, move.id))

    async def get(self, move_id: str) -> tuple[Move, int]:
        """A move and its record's revision. Raises NoSuchMove."""
        kv = await self.etcd.get(MOVES_PREFIX + move_id)
        if kv is None:
            raise NoSuchMove(f"there is no move {move_id}: `oncepay reshard status` lists them")
        return _decode(kv.value), kv.mod_revision

    async def create(self, move: Move) -> None:
        """Keep a planned move. Raises MoveRefused when it touches the range of another one that isn't over, or its target is
        being removed."""
        gate = f"{OPERATORS_PREFIX}plan"  # whoever plans at the same time has to look again
        before = await self.etcd.get(gate)
        taker = await self.etcd.get(SHARDS_PREFIX + move.target)
        if taker is not None and is_removing(taker.value):
            raise MoveRefused(f"shard {move.target} is being removed")
        compares = [
            absent(MOVES_PREFIX + move.id),
            mod_revision_is(gate, before.mod_revision if before else 0),
            mod_revision_is(SHARDS_PREFIX + move.target, taker.mod_revision if taker else 0),
        ]
        known = sorted(await self.all(), key=lambda item: item.changed_at_ms)
        for other in known:
            if not other.over and other.touches(move.first, move.last):
                raise MoveRefused(
                    f"move {other.id} ({other.state}) has slots {other.first}-{other.last}: finish or abort it first"
                )
        result = await self.etcd.txn(
            compares, [Put(MOVES_PREFIX + move.id, msgspec.json.encode(move)), Put(gate, move.id.encode())]
        )
        if not result.succeeded:
            raise MoveRefused("another move was planned, or its target changed, at the same time: plan again")
        over = [item for item in known if item.over]
        for old in over[: max(0, len(over) - OVER_MAX)]:
            await self.etcd.delete(MOVES_PREFIX + old.id)

    async def change(self, move_id: str, **fields: object) -> Move:
        """Write members of a record, whoever has the move (`pause`). Raises NoSuchMove."""
        for _ in range(TRIES):
            move, revision = await self.get(move_id)
            changed = replace(move, changed_at_ms=now_ms(), **fields)
            if await self.etcd.compare_and_put(MOVES_PREFIX + move_id, msgspec.json.encode(changed), revision) is not None:
                return changed
        raise MoveError(f"the record of move {move_id} changes all the time: try again")

    async def take(self, move_id: str, goal: Goal | None, *, wait_s: float = TAKE_S) -> Hold:
        """Become the process that carries the move on, towards `goal` (None: the one that it had).

        Waits for the seat of a process that was killed. Raises MoveRefused, or MoveTaken when another one lives on.
        """
        move, _ = await self.get(move_id)
        if goal is not None and (why := refusal(move, goal)):
            raise MoveRefused(why)
        name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        lease = await self.etcd.grant_lease(TTL_S)
        try:
            await self._sit(move_id, name, lease, wait_s)
            return await self._begin(move_id, goal, name, lease)
        except BaseException:
            await lease.revoke()
            raise

    async def _sit(self, move_id: str, name: str, lease: Lease, wait_s: float) -> None:
        key = OPERATORS_PREFIX + move_id
        deadline_s = time.monotonic() + wait_s
        while True:
            result = await self.etcd.txn([absent(key)], [Put(key, name.encode(), lease.id)])
            if result.succeeded:
                return
            if time.monotonic() > deadline_s:
                holder = await self.etcd.get(key)
                who = holder.value.decode().rpartition(":")[0] if holder else "another process"
                raise MoveTaken(f"{who} (host:pid) carries move {move_id} on: `oncepay reshard pause {move_id}` stops it")
            await asyncio.sleep(PAUSE_S)

    async def _begin(self, move_id: str, goal: Goal | None, name: str, lease: Lease) -> Hold:
        for _ in range(TRIES):
            move, revision = await self.get(move_id)
            if goal is not None and (why := refusal(move, goal)):
                raise MoveRefused(why)
            begun = replace(
                move, goal=goal or move.goal, epoch=move.epoch + 1, operator=name, paused=False, problem="",
                differences=(), changed_at_ms=now_ms(),
            )  # fmt: skip
            hold = Hold(self, begun, revision, name, lease)
            if await hold.write():
                return hold
        raise MoveError(f"the record of move {move_id} changes all the time: try again")

    # The map

    async def change_map(self, change: MapChange) -> ShardMap:
        """Put the map that `change` makes of the present one, by compare and swap; the map as it is then."""
        for _ in range(TRIES):
            changed = await self.map_changed(change, [])
            if changed is not None:
                return changed
        raise EtcdUnavailable("the shard map can't be changed")

    async def map_changed(self, change: MapChange, guards: Sequence[Compare]) -> ShardMap | None:
        """One try of `change_map`, made only where `guards` hold; None when it was not made, or that isn't known."""
        kv = await self.etcd.get(MAP_KEY)
        if kv is None:
            raise MoveError("etcd holds no shard map")
        current = msgspec.json.decode(kv.value, type=ShardMap)
        wanted = change(current)
        if wanted is current:
            return current
        compares = [mod_revision_is(MAP_KEY, kv.mod_revision), *guards]
        try:
            result = await self.etcd.txn(compares, [Put(MAP_KEY, msgspec.json.encode(wanted))])
        except EtcdOutcomeUnknown:
            return None  # it is read back: a change that was made is not made again
        return wanted if result.succeeded else None


def _freeze(move: Move, begins: bool) -> None:
    """Stop this very process once the record says what FREEZE_AT names, so that a campaign kills at a step, and not near it.

    `drain` is as the step begins, `copy+` in its midst, `back:drain` in a rollback.
    """
    point = f"{'back:' if move.back else ''}{move.state}{'' if begins else '+'}"
    if os.environ.get(FREEZE_AT) == point:
        del os.environ[FREEZE_AT]
        os.kill(os.getpid(), signal.SIGSTOP)


class Hold:
    """One process's hold of a move. `move` is the record as last written.

    `epoch` is what the shards' databases compare. It grows with the record's, from process to process, and within a process
    with each `claim_anew`: then whatever this process has sent before, and has no answer to, is refused.
    """

    def __init__(self, records: Records, move: Move, revision: int, name: str, lease: Lease) -> None:
        self.move = move
        self.name = name
        self._records = records
        self._revision = revision
        self._lease = lease
        self._claims = 0

    @property
    def epoch(self) -> int:
        """The epoch for the shards' databases."""
        return self.move.epoch * CLAIMS_MAX + self._claims

    def claim_anew(self) -> int:
        """A higher epoch, to be claimed before anything else is done. Raises MoveError after CLAIMS_MAX."""
        self._claims += 1
        if self._claims >= CLAIMS_MAX:
            raise MoveError(f"{CLAIMS_MAX} claims in one process: run `oncepay reshard resume {self.move.id}`")
        return self.epoch

    async def save(self, **fields: object) -> None:
        """Write members of the record. Raises MoveTaken when the move is another process's now, MovePaused when an operator
        has paused it or wants something else of it."""
        for _ in range(TRIES):
            before = self.move
            self.move = replace(before, changed_at_ms=now_ms(), **fields)
            try:
                if await self.write():
                    _freeze(self.move, "state" in fields)
                    return
            except EtcdUnavailable as error:
                _log.info("record not written", move=before.id, error=str(error))
                await asyncio.sleep(PAUSE_S)
            self.move = before
            await self._look()
        raise EtcdUnavailable(f"the record of move {self.move.id} can't be written")

    async def write(self) -> bool:
        """Write the record as it is here, if nobody else has written it since and this process has the seat."""
        key = MOVES_PREFIX + self.move.id
        mine = value_is(OPERATORS_PREFIX + self.move.id, self.name.encode())
        result = await self._records.etcd.txn(
            [mod_revision_is(key, self._revision), mine], [Put(key, msgspec.json.encode(self.move))]
        )
        if result.succeeded:
            self._revision = result.revision
        return result.succeeded

    async def _look(self) -> None:
        """Why a write was refused: read the record again, and go on only when it is still ours."""
        seen, revision = await self._records.get(self.move.id)
        if (seen.epoch, seen.operator) != (self.move.epoch, self.name):
            raise MoveTaken(f"another process carries move {self.move.id} on")
        self.move, self._revision = seen, revision
        if seen.paused:
            raise MovePaused(f"move {seen.id} was paused: `oncepay reshard resume {seen.id}` carries it on")
        key = OPERATORS_PREFIX + seen.id
        seat = await self._records.etcd.get(key)
        if seat is not None and seat.value != self.name.encode():
            raise MoveTaken(f"another process carries move {self.move.id} on")
        if seat is None:  # the lease ended while etcd or this process stood still, and nobody has taken over yet
            self._lease = await self._records.etcd.grant_lease(TTL_S)
            await self._records.etcd.txn([absent(key)], [Put(key, self.name.encode(), self._lease.id)])

    async def change_map(self, change: MapChange) -> ShardMap:
        """As `Records.change_map`, only while this process has the move: one that stood still meanwhile changes nothing.

        Raises MoveTaken. An operator's pause waits until the map tells what is.
        """
        own = MOVES_PREFIX + self.move.id, OPERATORS_PREFIX + self.move.id
        for _ in range(TRIES):
            guards = [mod_revision_is(own[0], self._revision), value_is(own[1], self.name.encode())]
            changed = await self._records.map_changed(change, guards)
            if changed is not None:
                return changed
            with contextlib.suppress(MovePaused):
                await self._look()
        raise EtcdUnavailable("the shard map can't be changed")

    async def leave(self) -> None:
        """Give the seat up."""
        await self._lease.revoke()
