"""How long writes stand still for each fault of a shard, as buyers outside see it.

    python -m loadtest.bench.failover [--rounds 3] [--faults kill-postgres,kill-node] [--home .oncepay]

Each fault is inflicted by `oncepay chaos` on a shard while buyers pay, and undone. The gap is the longest time without a payment
that was accepted, beside the slowest answer and the number of callers that were told to come again. Nothing that was
acknowledged may be lost, doubled or answered backwards. `--home` takes the cluster that runs there, else one of its own is
started. Prints one JSON object; exits with 1 when a gap or an answer is longer than docs/durability.md promises.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from loadtest.bench.own_cluster import Failed, Running, cluster, machine, oncepay

FAULTS = ("kill-postgres", "kill-patroni", "freeze-patroni", "kill-node", "freeze-node", "switchover", "lose-standby")
"""Those for which there is a promise in seconds."""


def inflict(running: Running, fault: str) -> dict[str, Any]:
    """One fault, and what the buyers saw. Raises Failed when anything was violated."""
    code, found = oncepay(running.environment, "chaos", fault)
    if code or found.get("violations"):
        raise Failed(f"{fault}: {found}")
    print(
        f"{fault}: gap {found['gap_s']} s, slowest {found['slowest_s']} s, refused {found['refused']}",
        file=sys.stderr,
        flush=True,
    )
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The longest of all rounds, for that is what is promised, and the medians."""
    promised = rounds[0]["promised"]
    gaps, slowest = [each["gap_s"] for each in rounds], [each["slowest_s"] for each in rounds]
    return {
        "gap_s": max(gaps),
        "gap_s_median": statistics.median(gaps),
        "slowest_s": max(slowest),
        "refused": sum(each["refused"] for each in rounds),
        "acknowledged": sum(each["acknowledged"] for each in rounds),
        "promised": promised,
        "kept": (promised["gap_s"] is None or max(gaps) < promised["gap_s"])
        and (promised["slowest_s"] is None or max(slowest) < promised["slowest_s"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each fault (default: %(default)s)")
    parser.add_argument("--faults", default=",".join(FAULTS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--home", type=Path, help="the home of a cluster that runs already")
    options = parser.parse_args()
    with cluster("bench-failover", attached=options.home) as running:
        found = {fault: summary([inflict(running, fault) for _ in range(options.rounds)]) for fault in options.faults.split(",")}
    print(json.dumps({"faults": found, "machine": machine()}, indent=2))
    late = [fault for fault, each in found.items() if not each["kept"]]
    if late:
        raise SystemExit(f"longer than promised: {', '.join(late)}")


if __name__ == "__main__":
    main()
