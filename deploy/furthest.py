"""Which of a shard's stopped nodes has the most of its log: the one that must lead when nobody remembers who may.

When etcd's memory of who is in the quorum is lost or old, a node that lacks acknowledged commits could be elected before the
others are up. So the furthest one is started first, alone. Whoever acknowledged a commit has it in its log on disk.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deploy.backup import position
from oncepay.errors import OncepayError

SEGMENT = re.compile(r"[0-9A-F]{24}")


class NoLog(OncepayError):
    """A node's log can't be read."""

    slug = "no-log"


class LogEnd(NamedTuple):
    """Where a node's log ends: its newest timeline, and where its last whole record begins (bytes). The later is greater."""

    timeline: int
    position: int


def log_end(data_dir: Path, bin_dir: Path) -> LogEnd:
    """Where the log of a stopped node ends, whether or not it was replayed. Raises NoLog."""
    segments = sorted((path for path in (data_dir / "pg_wal").glob("*") if SEGMENT.fullmatch(path.name)), reverse=True)
    for segment in segments:  # segments that are kept for later use hold old pages, and show no record
        done = subprocess.run(
            [bin_dir / "pg_waldump", str(segment)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if records := re.findall(r"lsn: ([0-9A-F]+/[0-9A-F]+),", done.stdout):
            return LogEnd(int(segment.name[:8], 16), position(records[-1]))
    raise NoLog(f"{data_dir} holds no log that can be read")


def furthest(ends: Mapping[str, LogEnd]) -> str:
    """The node whose log goes furthest; of equals the first by name."""
    return min(ends, key=lambda node: (-ends[node].timeline, -ends[node].position, node))
