"""Whether accepting and settling cost the same on a shard of ten million payments as on one of ten thousand.

    python -m loadtest.bench large [--rows 10000000] [--count 20000] [--cycle 500000]

One Postgres with its log on disk. Prints one JSON object. The measurement uses the store's own batches, which this folder may not
import: it is in tests/shard/store.
"""

from __future__ import annotations

import subprocess
import sys


def main() -> None:
    """Run it, with the options that were given."""
    command = [sys.executable, "-m", "tests.shard.store.bench_large", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
