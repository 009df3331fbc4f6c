"""Which shards a rebuild needs beside those that were named: what a shard gave away while its feed stood still. Pure.

A rebuild takes the slots that its shard owns now, and the feed goes on behind it. What the shard committed in a range before it
gave it away is then in no feed any more, but in the tables of the range's present owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from oncepay.feed import parse_lsn
from oncepay.moves import FENCED, Move
from oncepay.shardmap import ShardMap


class Part(NamedTuple):
    """A shard to be rebuilt. `why`: which slots it has that another one gave away; empty where that is no matter."""

    shard: str
    why: str = ""


def in_order(named: Sequence[str], moves: Iterable[Move], current: ShardMap, positions: Mapping[str, int]) -> list[Part]:
    """The shards to be rebuilt, each once. `positions`: up to where each feed was applied; one that isn't there was not at all.

    The owner of what was given away comes before its giver: whatever fails in between, the giver's position still tells.
    """
    lost = [(move, giver) for move in moves if (giver := _not_applied(move, positions)) is not None]
    whys: dict[str, list[str]] = {}
    ordered: list[str] = []

    def visit(shard: str) -> None:
        whys[shard] = []
        for move, giver in lost:
            if giver != shard:
                continue
            for first, last, owner in _owners(current, move):
                if owner == shard:
                    continue
                if owner not in whys:
                    visit(owner)
                whys[owner].append(f"it has slots {first}-{last}, which {shard} gave away while its feed stood still")
        ordered.append(shard)

    for shard in named:
        if shard not in whys:
            visit(shard)
    return [Part(shard, "; ".join(dict.fromkeys(whys[shard]))) for shard in ordered]


def _not_applied(move: Move, positions: Mapping[str, int]) -> str | None:
    """The shard that gave the move's range away, when its feed may not have been applied up to there."""
    if move.state == "rolled_back":
        giver, until = move.target, move.drain_lsn
    elif move.state in {"reversible", "finished"} or (move.back and move.state not in FENCED):
        giver, until = move.source, move.drain_lsn
    elif move.state in FENCED:  # it is on its way, and the position may be of either direction
        giver, until = move.source, ""
    else:
        return None
    return None if until and positions.get(giver, -1) >= parse_lsn(until) else giver


def _owners(current: ShardMap, move: Move) -> list[tuple[int, int, str]]:
    """Who has the move's slots now, as (first, last, shard)."""
    return [
        (max(item.first, move.first), min(item.last, move.last), item.shard)
        for item in current.ranges
        if move.touches(item.first, item.last)
    ]
