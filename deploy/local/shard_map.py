"""The first shard map and the shards' records, as they are kept in etcd."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deploy.local.parts import node_names
from deploy.local.ports import Ports

SLOTS = 65_536

Range = tuple[int, int]
"""First and last slot, both included."""


def even_ranges(shards: Sequence[str]) -> dict[str, list[Range]]:
    """All slots, dealt out evenly and in order."""
    count = len(shards)
    bounds = [SLOTS * n // count for n in range(count + 1)]
    return {shard: [(bounds[n], bounds[n + 1] - 1)] for n, shard in enumerate(shards)}


def render_map(ranges: dict[str, list[Range]], version: int = 1) -> str:
    """The map's record."""
    rows = [{"first": first, "last": last, "shard": shard} for shard, owned in ranges.items() for first, last in owned]
    return json.dumps({"version": version, "ranges": sorted(rows, key=lambda row: row["first"])})


def parse_map(text: str) -> dict[str, list[Range]]:
    """The ranges of each shard; ranges that touch are shown as one. Raises ValueError for what is no map."""
    try:
        rows = sorted((int(row["first"]), int(row["last"]), str(row["shard"])) for row in json.loads(text)["ranges"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no shard map: {error}") from error
    ranges: dict[str, list[Range]] = {}
    for first, last, shard in rows:
        owned = ranges.setdefault(shard, [])
        if owned and owned[-1][1] + 1 == first:
            owned[-1] = (owned[-1][0], last)
        else:
            owned.append((first, last))
    return ranges


def shard_record(
    ports: Ports, number: int, shard: str, hosts: Sequence[str], *, restored: bool = False, removing: bool = False
) -> str:
    """What etcd keeps of a shard: where its nodes listen, at `hosts` in the order of the nodes. `restored`: it was made from a
    backup, and may get no slots until it is accepted. `removing`: it may get none any more.
    """
    named = enumerate(zip(node_names(shard), hosts, strict=True))
    nodes = [{"name": node, "host": host, "port": ports.postgres(number, n)} for n, (node, host) in named]
    marks = {name: True for name, marked in (("restored", restored), ("removing", removing)) if marked}
    return json.dumps({"name": shard, "scope": shard, "nodes": nodes, **marks})
