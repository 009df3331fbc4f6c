"""Which of a shard's stopped nodes has the most of its log: the one that must lead when nobody remembers who may.

When etcd's memory of who is in the quorum is lost or old, a node that lacks acknowledged commits could be elected before the
others are up. So the furthest one is started first, alone. Whoever acknowledged a commit has it in its log on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deploy import replay
from oncepay.errors import OncepayError


class NoLog(OncepayError):
    """A node's log can't be read."""

    slug = "no-log"


class LogEnd(NamedTuple):
    """Where a node's log ends: its newest timeline, and where its last whole record begins (bytes). The later is greater."""

    timeline: int
    position: int


def log_end(data_dir: Path, bin_dir: Path) -> LogEnd:
    """Where the log of a stopped node ends, whether or not it was replayed. Raises NoLog."""
    found = replay.log_end(str(data_dir), str(bin_dir))
    if found is None:
        raise NoLog(f"{data_dir} holds no log that can be read")
    return LogEnd(*found)


def furthest(ends: Mapping[str, LogEnd]) -> str:
    """The node whose log goes furthest; of equals the first by name."""
    return min(ends, key=lambda node: (-ends[node].timeline, -ends[node].position, node))
