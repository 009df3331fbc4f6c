"""Moves of slot ranges between shards: the record that etcd keeps of each, and the rules that need no I/O.

A move's record is written before each step begins. `state` says which step that is, `goal` what the operator asked for;
whoever carries a move on needs nothing else to know what comes next.
"""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

from oncepay.shardmap import SLOTS, Range, ShardMap

MOVES_PREFIX = "moves/"
OPERATORS_PREFIX = "movers/"

State = Literal[
    "plan", "copy", "catch_up", "verify", "ready", "fence", "drain", "switch", "reversible", "finished", "rolled_back", "aborted"
]
Goal = Literal["planned", "ready", "reversible", "finished", "rolled_back", "aborted"]

OVER: frozenset[State] = frozenset({"finished", "rolled_back", "aborted"})
"""Nothing more happens to these."""
BUSY: frozenset[State] = frozenset({"copy", "catch_up", "verify"})
"""States that load both shards: one move at a time does this to a shard, the others wait for their turn."""
FENCED: frozenset[State] = frozenset({"fence", "drain", "switch"})
"""States in which the range may be nobody's for a moment."""

PAUSE_LIMIT_S = 3.0
LAG_MAX_BYTES = 64 << 20

_FROM: dict[Goal, frozenset[State]] = {
    "ready": frozenset({"plan", *BUSY, "ready"}),
    "reversible": frozenset({"ready", *FENCED, "reversible"}),
    "finished": frozenset({"reversible", *BUSY, "finished"}),
    "rolled_back": frozenset({"reversible", *BUSY, *FENCED, "rolled_back"}),
    "aborted": frozenset({"plan", *BUSY, "ready", *FENCED, "aborted"}),
}
_BACK: frozenset[Goal] = frozenset({"rolled_back", "finished"})
"""What may follow a step of the rollback: until the hand-over the range is the target's, and can stay there."""


class Verified(msgspec.Struct, frozen=True):
    """A whole verification: when, how many rows, and on which timelines. A later failover voids it."""

    at_ms: int
    rows: int
    source_timeline: int
    target_timeline: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """The slots `first` to `last`, both included, from shard `source` to shard `target`.

    `back`: the step is one of the rollback, from target to source. `epoch` is that of the operator process that has the
    move. `attempt` counts how often the copy was begun, `copied_on` tells on which timelines of source
    and target. Rates in rows a second, 0 is no limit; `pause_s` is how long the
    range was held in the last switch or rollback. `changed_at_ms` is when the record was last written.
    """

    id: str
    first: int
    last: int
    source: str
    target: str
    state: State = "plan"
    goal: Goal = "planned"
    back: bool = False
    paused: bool = False
    epoch: int = 0
    operator: str = ""
    attempt: int = 0
    copied_on: tuple[int, int] | None = None
    created_at_ms: int = 0
    changed_at_ms: int = 0
    started_at_ms: int = 0
    map_version: int = 0
    rows_total: int = 0
    bytes_total: int = 0
    rows_copied: int = 0
    bytes_copied: int = 0
    rows_verified: int = 0
    rows_deleted: int = 0
    rate_rows_per_s: int = 0
    """0: no throttle but the standbys' lag."""
    lag_max_bytes: int = LAG_MAX_BYTES
    pause_limit_s: float = PAUSE_LIMIT_S
    lag_bytes: int = 0
    rows_per_s: float = 0.0
    eta_s: float | None = None
    drain_lsn: str = ""
    pause_s: float | None = None
    verified: Verified | None = None
    problem: str = ""
    differences: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in OVER

    @property
    def giver(self) -> str:
        """The shard that gives the range away in this direction."""
        return self.target if self.back else self.source

    @property
    def taker(self) -> str:
        """The shard that takes the range over in this direction."""
        return self.source if self.back else self.target

    def touches(self, first: int, last: int) -> bool:
        """Whether a slot of `first` to `last` is in this move."""
        return self.first <= last and first <= self.last


def refusal(move: Move, goal: Goal) -> str:
    """Why a move can't be brought to `goal`; empty when it can."""
    turned = move.back != (goal in _BACK) and move.state in BUSY | FENCED
    if move.state in _FROM.get(goal, frozenset()) and not turned:
        return ""
    wants = {
        "ready": "`start` takes a move that is planned",
        "reversible": "`switch` takes a move that is ready: run `oncepay reshard start` first",
        "finished": "`finish` takes a move that was switched",
        "rolled_back": "`rollback` takes a move that was switched and not finished",
        "aborted": "`abort` takes a move that was not switched; after the switch there is `rollback`",
    }
    return f"move {move.id} is in state {move.state}: {wants.get(goal, 'it was only planned')}"


def refusal_without(move: Move, goal: Goal, lost: str, owner: str) -> str:
    """Why a move can't be ended without its shard `lost`, where the map gives the range to `owner`; empty when it can."""
    if lost not in (move.source, move.target):
        return f"move {move.id} is from {move.source} to {move.target}: {lost} takes no part in it"
    if move.over:
        return f"move {move.id} is {move.state} already"
    fit: Goal = "aborted" if owner == move.source else "finished"
    command = {"aborted": "abort", "finished": "finish"}[fit]
    wants = f"the map gives its slots to {owner}: `oncepay reshard {command} {move.id} --lost {lost}` ends it"
    return "" if goal == fit else wants


def split(current: ShardMap, first: int, last: int) -> ShardMap:
    """The same owners, with `first` to `last` as ranges of their own; the same map when they are already."""
    ranges: list[Range] = []
    for item in current.ranges:
        cuts = [cut for cut in (first, last + 1) if item.first < cut <= item.last]
        bounds = [item.first, *cuts, item.last + 1]
        ranges += [Range(begin, end - 1, item.shard) for begin, end in itertools.pairwise(bounds)]
    if len(ranges) == len(current.ranges):
        return current
    return ShardMap(current.version + 1, tuple(ranges))


def given(current: ShardMap, first: int, last: int, shard: str, version: int) -> ShardMap:
    """The map with `first` to `last` on `shard`, at `version` or later. The same map when that is so already.

    Raises ValueError when the slots are not whole ranges of the map.
    """
    inside = [item for item in current.ranges if item.first <= last and first <= item.last]
    if inside[0].first != first or inside[-1].last != last:
        raise ValueError(f"slots {first}-{last} are no whole ranges of map version {current.version}")
    if all(item.shard == shard for item in inside):
        return current
    before = tuple(item for item in current.ranges if item.last < first)
    after = tuple(item for item in current.ranges if item.first > last)
    return ShardMap(max(version, current.version + 1), (*before, Range(first, last, shard), *after))


def owned_runs(current: ShardMap, shard: str) -> list[tuple[int, int]]:
    """What the shard owns, ranges that touch as one."""
    runs: list[tuple[int, int]] = []
    for item in current.ranges:
        if item.shard != shard:
            continue
        if runs and runs[-1][1] + 1 == item.first:
            runs[-1] = runs[-1][0], item.last
        else:
            runs.append((item.first, item.last))
    return runs


def even_moves(current: ShardMap, shards: tuple[str, ...]) -> list[tuple[int, int, str, str]]:
    """Moves `(first, last, source, target)` after which each of `shards` owns as many slots as any other, give or take one.

    Slots are taken from the end of what the richest own; as few moves as that needs.
    """
    share = {shard: SLOTS // len(shards) + (1 if n < SLOTS % len(shards) else 0) for n, shard in enumerate(shards)}
    runs = {shard: owned_runs(current, shard) for shard in shards}
    have = {shard: sum(last - first + 1 for first, last in runs[shard]) for shard in shards}
    moves: list[tuple[int, int, str, str]] = []
    for poor in shards:
        while have[poor] < share[poor]:
            rich = max(shards, key=lambda shard: have[shard] - share[shard])
            first, last = runs[rich][-1]
            count = min(have[rich] - share[rich], share[poor] - have[poor], last - first + 1)
            moves.append((last - count + 1, last, rich, poor))
            runs[rich][-1] = first, last - count
            if last - count < first:
                runs[rich].pop()
            have[rich] -= count
            have[poor] += count
    return moves
