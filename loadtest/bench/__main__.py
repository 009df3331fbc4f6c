"""`make bench`: runs the benchmarks of this folder one after the other.

    python -m loadtest.bench                     # all of them
    python -m loadtest.bench --list
    python -m loadtest.bench keygen --seconds 2  # one, with its own options

A benchmark is a module here whose docstring says that it prints one JSON object; this prints them as one, by name.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MARK = "Prints one JSON object"


def benchmarks() -> dict[str, str]:
    """The benchmarks' names, each with the first line of what it says about itself."""
    found = {}
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if MARK in " ".join(text.split()):
            found[path.stem] = text.partition("\n")[0]
    return found


def run(name: str, options: list[str]) -> tuple[int, Any]:
    """The benchmark's exit code and what it measured. Raises ValueError when it printed nothing of the kind.

    Its errors go to the terminal.
    """
    print(f"{name}: running", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", f"loadtest.bench.{name}", *options], stdout=subprocess.PIPE, check=False)
    return done.returncode, json.loads(done.stdout)


def main() -> int:
    """Run what is asked for; the exit code: 1 when a benchmark failed or measured more than it allows."""
    found = benchmarks()
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench",
        description="Run the benchmarks. What follows a benchmark's name goes to it.",
        epilog="example: python -m loadtest.bench keygen --seconds 2",
    )
    parser.add_argument("name", nargs="?", choices=list(found), help="one benchmark; all of them by default")
    parser.add_argument("--list", action="store_true", help="only list them")
    arguments, options = parser.parse_known_args()
    if arguments.list:
        for name, text in found.items():
            print(f"{name:<12} {text}")
        return 0
    if options and not arguments.name:
        parser.error(f"{' '.join(options)} would go to a benchmark: name one")
    results, failed = {}, []
    for name in [arguments.name] if arguments.name else found:
        try:
            code, results[name] = run(name, options)
        except ValueError:
            code = 1
        if code:
            failed.append(name)
    print(json.dumps(results, indent=2))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
