"""`make soak`: the purchases again and again, on a cluster of its own, with faults and kills, verified after each round.

    python -m loadtest.soak --minutes 60

Each round replays purchases while the stand-in for Stripe misbehaves and one process is killed, then checks every row
(`oncepay verify`) and the workers' caches (`oncepay shards check-cache`). Memory of each process is noted round by round.
Prints one JSON object at the end; exit code 1 when anything differed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from loadtest.purchases import purchases
from loadtest.replay import Mismatch, Tally, replay
from oncepay.client import Oncepay, Problem, Unreachable

COUNT = 6_919
PAYMENTS_MAX = 60_000
"""Payments on one cluster; then a fresh one takes its place. The check holds all rows in memory."""
DEFAULT_BASE, SPAN = 8080, 70
BASES = 10
KILL_AFTER_S = 3.0
"""A round's process is killed this long after its start, in the midst of the purchases."""
FAULTS: dict[str, Any] = {
    "latency_ms": [2, 25],
    "error_before": 0.02,
    "error_after": 0.01,
    "lost_answer": 0.02,
    "reset": 0.01,
    "rate_limited": 0.01,
    "processing": 0.03,
    "processing_s": [1, 8],
    "webhook_lost": 0.3,
    "webhook_doubled": 0.1,
    "webhook_reordered": 0.1,
    "webhook_delay_s": [0, 1],
}
KILLED = ("worker", "router", "primary", "keygen", "aggregator", "replica", "etcd")
"""What is killed, one a round, in turn."""


class Failed(Exception):
    """The cluster can't be started, or a command can't be run."""


def oncepay(environment: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run an `oncepay` command: its exit code and its object."""
    command = [sys.executable, "-m", "cli", *arguments, "--output", "json"]
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"oncepay {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}") from None
    return done.returncode, answer


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """A fresh cluster in `home`, stopped at the end: the environment that names it, and its status. Raises Failed."""
    first = int(os.environ.get("ONCEPAY_PORT_BASE") or DEFAULT_BASE)
    environment = {**os.environ, "ONCEPAY_HOME": str(home)}
    oncepay(environment, "down", "--purge")
    for base in range(first, first + BASES * SPAN, SPAN):
        environment["ONCEPAY_PORT_BASE"] = str(base)
        code, status = oncepay(environment, "up")
        if status.get("error", {}).get("type") != "local-cluster-port-taken":
            break
    if code:
        raise Failed(f"the cluster didn't come up: {status}")
    try:
        yield environment, status
    finally:
        oncepay(environment, "down")


def set_faults(stripe: str, faults: dict[str, Any]) -> None:
    """Replace the stand-in's faults."""
    request = urllib.request.Request(f"{stripe}/_control/faults", data=json.dumps(faults).encode(), method="PUT")
    with urllib.request.urlopen(request, timeout=10):
        pass


def victim(status: dict[str, Any], kind: str, chance: random.Random) -> tuple[str, int] | None:
    """A process of that kind: its name and pid. None when there is none now."""
    if kind in {"primary", "replica"}:
        nodes = [node for shard in status["shards"] for node in shard["nodes"] if node["role"] == kind and node["pid"]]
        found = [(f"Postgres of {node['name']}", node["pid"]) for node in nodes]
    else:
        found = [(p["name"], p["pid"]) for p in status["processes"] if p["name"].startswith(kind) and p["pid"]]
    return chance.choice(found) if found else None


def memory_mib(status: dict[str, Any]) -> dict[str, int]:
    """Resident memory of each process of the cluster."""
    found = {}
    for process in status["processes"]:
        with contextlib.suppress(psutil.Error, TypeError):
            found[process["name"]] = round(psutil.Process(process["pid"]).memory_info().rss / 2**20)
    return found


async def kill_midway(environment: dict[str, str], kind: str, seed: int) -> str | None:
    """Kill one process of that kind in the midst of a round; its name."""
    await asyncio.sleep(KILL_AFTER_S)
    _, status = await asyncio.to_thread(oncepay, environment, "status")
    found = victim(status, kind, random.Random(seed)) if "shards" in status else None
    if found is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(found[1], signal.SIGKILL)
    return found[0]


async def replayed(environment: dict[str, str], status: dict[str, Any], count: int, seed: int, kind: str) -> tuple[Tally, str]:
    """One round's purchases, with one kill. Raises what `replay` raises."""
    urls = status["urls"]
    async with Oncepay(router=urls["router"], keygen=urls["keygen"], api_key=status["api_key"], deadline_s=180) as client:
        killing = asyncio.create_task(kill_midway(environment, kind, seed)) if kind else None
        try:
            tally = await replay(client, list(purchases(count)), seed=seed)
        finally:
            killed = (await killing or "") if killing else ""
    return tally, killed


def one_round(environment: dict[str, str], status: dict[str, Any], count: int, seed: int, kind: str) -> dict[str, Any]:
    """Replay, wait for the end of what is open, verify; what happened, with `wrong` naming what went wrong."""
    set_faults(status["urls"]["stripe"], {"seed": seed, **FAULTS})
    wrong: list[str] = []
    tally, killed = Tally(), ""
    try:
        tally, killed = asyncio.run(replayed(environment, status, count, seed, kind))
    except* (Mismatch, Problem, Unreachable) as group:
        wrong += [repr(error) for error in group.exceptions]
    set_faults(status["urls"]["stripe"], {})
    code, verdict = oncepay(environment, "verify", "--wait", "180")
    if code:
        wrong.append(f"verify: {json.dumps(verdict)[:2000]}")
    code, caches = oncepay(environment, "shards", "check-cache")
    if code:
        wrong.append(f"check-cache: {json.dumps(caches)[:2000]}")
    if tally.pending:
        wrong.append(f"{tally.pending} payments were not settled")
    return {
        "seed": seed,
        "payments": {name: getattr(tally, name) for name in ("submitted", "succeeded", "failed", "refused", "pending")},
        "amount_minor": tally.amount_minor,
        "seconds": round(tally.seconds, 1),
        "killed": killed,
        "checked": verdict.get("checked", {}),
        "verify_seconds": verdict.get("seconds"),
        "memory_mib": memory_mib(oncepay(environment, "status")[1]),
        "wrong": wrong,
    }


def say(number: int, found: dict[str, Any], minutes: float, of: float) -> None:
    """A line about a round, on standard error."""
    outcome = f"WRONG: {'; '.join(found['wrong'])}" if found["wrong"] else "ok"
    print(
        f"round {number}: {found['payments']['submitted']:,} purchases in {found['seconds']} s,"
        f" killed {found['killed'] or 'nothing'}, {found['checked'].get('payments', 0):,} payments verified: {outcome}"
        f" ({minutes:.0f} of {of:g} min)",
        file=sys.stderr,
        flush=True,
    )


def soak(home: Path, minutes: float, count: int, seed: int, *, kills: bool) -> list[dict[str, Any]]:
    """Rounds until the time is over, at least one; a round that went wrong is the last. Raises Failed."""
    rounds: list[dict[str, Any]] = []
    began_s = time.monotonic()
    while True:
        with cluster(home) as (environment, status):
            for _ in range(max(1, PAYMENTS_MAX // count)):
                kind = KILLED[len(rounds) % len(KILLED)] if kills else ""
                rounds.append(one_round(environment, status, count, seed + len(rounds), kind))
                passed = (time.monotonic() - began_s) / 60
                say(len(rounds), rounds[-1], passed, minutes)
                if rounds[-1]["wrong"] or passed >= minutes:
                    return rounds


def report(rounds: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The object that is printed at the end."""
    first, last = rounds[0]["memory_mib"], rounds[-1]["memory_mib"]
    return {
        "ok": not any(found["wrong"] for found in rounds),
        "minutes": round(seconds / 60, 1),
        "payments": {name: sum(found["payments"][name] for found in rounds) for name in rounds[0]["payments"]},
        "amount_minor": {"usd": sum(found["amount_minor"] for found in rounds)},
        "kills": sum(bool(found["killed"]) for found in rounds),
        "memory_mib_first_and_last": {name: [first[name], last[name]] for name in first if name in last},
        "rounds": rounds,
    }


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.soak",
        description="Replay the purchases on a cluster of its own again and again, with faults and kills, verified each time.",
        epilog="example: python -m loadtest.soak --minutes 10 --count 500",
    )
    parser.add_argument("--minutes", type=float, default=60, help="no round begins after this long (default: %(default)g)")
    parser.add_argument("--count", type=int, default=COUNT, help="purchases a round (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's faults and cards; the next take the next")
    parser.add_argument("--no-kills", action="store_true", help="only faults of Stripe's")
    arguments = parser.parse_args()
    home = Path(os.environ.get("ONCEPAY_HOME") or ".oncepay").absolute() / "soak"
    began_s = time.monotonic()
    try:
        rounds = soak(home, arguments.minutes, arguments.count, arguments.seed, kills=not arguments.no_kills)
    except Failed as error:
        print(f"soak: {error}", file=sys.stderr)
        return 3
    result = report(rounds, time.monotonic() - began_s)
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
