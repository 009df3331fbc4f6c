"""How fast a worker's feed works a backlog off, beside pg_recvlogical in the same run.

    python -m loadtest.bench feed [--rows 1000000]

Prints one JSON object. The measurement looks inside of the worker, which this folder may not import: it is in tests/shard/worker.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> None:
    """Run it, with the options that were given."""
    command = [sys.executable, "-m", "tests.shard.worker.bench_feed", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
