"""What the worker's pending cache costs: bytes a payment, insert, settle, the next thousand due.

    python -m loadtest.bench cache [--payments 1000000]

Prints one JSON object. The measurement looks inside of the worker, which this folder may not import: it is in tests/shard/worker.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> None:
    """Run it, with the options that were given."""
    command = [sys.executable, "-m", "tests.shard.worker.bench_cache", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
