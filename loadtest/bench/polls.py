"""What it costs at Stripe to bring ten thousand pending payments up to date of which a hundred changed.

    python -m loadtest.bench polls [--payments 10000] [--changed 100]

Prints one JSON object. The measurement looks inside of the worker, which this folder may not import: it is in tests/shard/worker.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> None:
    """Run it, with the options that were given."""
    command = [sys.executable, "-m", "tests.shard.worker.bench_polls", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
