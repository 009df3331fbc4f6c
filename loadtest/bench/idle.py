"""What a local cluster costs at rest: memory and processor time of all its processes, without a single payment.

    python -m loadtest.bench.idle [--home .oncepay] [--seconds 60]

Prints one JSON object; exits with 1 when the cluster takes more than it may. Memory is the proportional set size (PSS),
which counts a page that n processes share as 1/n of a page for each. Processor time is what the kernel accounted to the
processes, and to those that began and ended meanwhile, so other work on the machine doesn't count.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

PSS_MAX_MIB = 1024.0
CPU_MAX_PERCENT = 10.0
"""Of one core."""
CLUSTER_ENV = "ONCEPAY_CLUSTER"
PROCESS_ENV = "ONCEPAY_PROCESS"


class Member(NamedTuple):
    """A process of the cluster; `kind` says what it is, as `etcd`, `router` or `Postgres of node`."""

    process: psutil.Process
    kind: str


class Cost(NamedTuple):
    """At one moment. `cpu_s` counts also the children that ended."""

    processes: int = 0
    pss_bytes: int = 0
    cpu_s: float = 0.0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.processes + other.processes, self.pss_bytes + other.pss_bytes, self.cpu_s + other.cpu_s)


def members(home: Path) -> Iterator[Member]:
    """The cluster's processes: those with its mark, and their descendants, for Postgres' children overwrite theirs."""
    parts: dict[int, str] = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except (psutil.Error, OSError):
            continue
        if variables.get(CLUSTER_ENV) == str(home):
            parts[process.pid] = variables.get(PROCESS_ENV, "supervisor").removesuffix("-db").split("-")[0]
    for process in psutil.process_iter():
        try:
            part = _part(process, parts)
            if part is not None:
                yield Member(process, _kind(process, part))
        except psutil.Error:
            continue


def _part(process: psutil.Process, parts: dict[int, str]) -> str | None:
    """Of the process or of the nearest ancestor that has the mark."""
    return next((parts[each.pid] for each in (process, *process.parents()) if each.pid in parts), None)


def _kind(process: psutil.Process, part: str) -> str:
    command = process.cmdline()
    if os.path.basename(process.exe()).startswith("postgres"):
        return f"Postgres of {part}"
    if "deploy.node" in command or "deploy.postgres" in command:
        return f"wrapper of {part}"
    return "Patroni" if "patroni" in command else part


def costs(home: Path, *, with_memory: bool) -> dict[str, Cost]:
    """What each kind of process has cost until now."""
    found: defaultdict[str, Cost] = defaultdict(Cost)
    for process, kind in members(home):
        try:
            times = process.cpu_times()
            pss = process.memory_full_info().pss if with_memory else 0
        except psutil.Error:
            continue
        cpu_s = times.user + times.system + times.children_user + times.children_system
        found[kind] = found[kind].plus(Cost(1, pss, cpu_s))
    return found


def measure(home: Path, seconds: float) -> dict[str, Any]:
    """Wait `seconds`, and compare. Raises SystemExit when nothing runs there."""
    before = costs(home, with_memory=False)
    if not before:
        raise SystemExit(f"no cluster runs in {home}: start one with `oncepay up`")
    began_s = time.monotonic()
    time.sleep(seconds)
    after = costs(home, with_memory=False)
    took_s = time.monotonic() - began_s
    memory = costs(home, with_memory=True)  # takes a while, and wakes nobody
    kinds = {
        kind: {
            "processes": cost.processes,
            "pss_mib": round(cost.pss_bytes / 2**20, 1),
            "cpu_percent": round(100 * (after[kind].cpu_s - before[kind].cpu_s) / took_s, 2),
        }
        for kind, cost in sorted(memory.items(), key=lambda item: -item[1].pss_bytes)
        if kind in after and kind in before
    }
    return {
        "processes": sum(cost.processes for cost in memory.values()),
        "pss_mib": round(sum(cost.pss_bytes for cost in memory.values()) / 2**20, 1),
        "cpu_percent": round(100 * (sum(c.cpu_s for c in after.values()) - sum(c.cpu_s for c in before.values())) / took_s, 2),
        "seconds": round(took_s, 1),
        "kinds": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("ONCEPAY_HOME") or ".oncepay")
    parser.add_argument("--home", type=Path, default=home, help="the cluster's ONCEPAY_HOME (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to look (default: %(default)s)")
    options = parser.parse_args()
    found = measure(options.home.resolve(), options.seconds)
    print(json.dumps(found, indent=2))
    if found["pss_mib"] > PSS_MAX_MIB or found["cpu_percent"] > CPU_MAX_PERCENT:
        raise SystemExit(f"that is more than {PSS_MAX_MIB:g} MiB or {CPU_MAX_PERCENT:g} % of one core")


if __name__ == "__main__":
    main()
