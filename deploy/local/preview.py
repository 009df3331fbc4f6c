"""What `up` and `down` would do: the objects that `--dry-run --output json` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from deploy import processes
from deploy.local.ports import Port


class Start(NamedTuple):
    """What `up` would start; `ends` are the processes of an earlier run that it would end before."""

    home: Path
    is_new: bool
    port_base: int
    listens: tuple[Port, ...]
    shards: tuple[str, ...]
    parts: tuple[str, ...]
    ends: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "home": str(self.home),
            "new": self.is_new,
            "port_base": self.port_base,
            "ports": [{"port": port.number, "purpose": port.purpose} for port in self.listens],
            "shards": list(self.shards),
            "parts": list(self.parts),
            "ends": list(self.ends),
        }


class Ended(NamedTuple):
    """A process that `down` would stop, and the home of its cluster."""

    pid: int
    name: str
    home: str


class Ending(NamedTuple):
    """What `down` would stop and delete; `left` is what isn't a cluster's."""

    home: Path
    stops: tuple[Ended, ...]
    deletes: tuple[Path, ...]
    left: tuple[Path, ...]

    @classmethod
    def of(cls, home: Path, pids: list[int], deletes: list[Path], left: list[Path]) -> Ending:
        """With the names of the processes. A Postgres has no mark, and a supervisor no name."""
        stops = []
        for pid in sorted(pids):
            cluster = processes.variable(pid, processes.CLUSTER_ENV)
            name = processes.variable(pid, processes.PROCESS_ENV) or ("supervisor" if cluster else "postgres")
            stops.append(Ended(pid, name, cluster or str(home)))
        return cls(home, tuple(stops), tuple(deletes), tuple(left))

    def as_json(self) -> dict[str, Any]:
        return {
            "home": str(self.home),
            "running": bool(self.stops),
            "stops": [each._asdict() for each in self.stops],
            "deletes": [str(path) for path in self.deletes],
            "left": [str(path) for path in self.left],
        }
