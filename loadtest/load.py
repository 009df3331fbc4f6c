"""`make load`: locust against the local cluster, which is started when it isn't up; then verify.

Exits non-zero when locust counted an error or verify isn't ok.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def oncepay(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the `oncepay` command of this environment; progress and errors go to the terminal."""
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=check)


def cluster_status() -> dict[str, Any]:
    """The status of the local cluster, started when it isn't up."""
    answer = oncepay("status", "--output", "json", check=False)
    if answer.returncode != 0:
        print("starting the local cluster", file=sys.stderr)
        answer = oncepay("up", "--output", "json")
    status: dict[str, Any] = json.loads(answer.stdout)
    return status


def main() -> int:
    """Run the load; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.load",
        description="Locust against the local cluster, then verify. Example: python -m loadtest.load --users 100 --seconds 30",
    )
    parser.add_argument("--users", type=int, default=60, help="buyers and sellers together (default 60)")
    parser.add_argument("--spawn-rate", type=float, default=20, help="users started a second (default 20)")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60)")
    parser.add_argument("--web", action="store_true", help="locust's own page instead, on port 8089")
    arguments = parser.parse_args()
    status = cluster_status()
    urls = status["urls"]
    environment = {
        **os.environ,
        "ONCEPAY_KEYGEN": urls["keygen"],
        "ONCEPAY_AGGREGATOR": urls["aggregator"],
        "ONCEPAY_API_KEY": status["api_key"],
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", urls["router"]]
    command += ["-u", str(arguments.users), "-r", str(arguments.spawn_rate)]
    if arguments.web:
        command += ["--web-host", "127.0.0.1"]
    else:
        command += ["--headless", "-t", f"{arguments.seconds}s", "--only-summary", "--exit-code-on-error", "1"]
    load = subprocess.run(command, env=environment, check=False)
    verdict = json.loads(oncepay("verify", "--output", "json", check=False).stdout)
    print(f"verify: {'ok' if verdict.get('ok') else 'NOT ok'} {json.dumps(verdict)[:2000]}")
    return load.returncode or (0 if verdict.get("ok") else 1)


if __name__ == "__main__":
    sys.exit(main())
