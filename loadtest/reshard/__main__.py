"""Moves of ranges under load, killed at every step, and measured.

    python -m loadtest.reshard matrix                                    # every step with every victim, some 30 minutes
    python -m loadtest.reshard matrix --step drain --victim operator     # one cell
    python -m loadtest.reshard pauses --moves 20 --rate 100              # how long the range is held
    python -m loadtest.reshard copy --payments 200000                    # a move's copy beside COPY piped into COPY

Starts a cluster of its own in the sub-folder `reshard` of ONCEPAY_HOME and deletes it at the end; with --attach HOME it takes
the one that runs there. Prints one JSON object; exit code 1 when a cell came out wrong. `matrix --table` prints the table too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from loadtest.bench.own_cluster import cluster
from loadtest.reshard.commands import COMMAND_S, Operator
from loadtest.reshard.matrix import STEPS, VICTIMS, Cell, matrix, table
from loadtest.reshard.measure import copy_beside_copy, pauses

LONG_S = 3600.0


def say(cell: Cell) -> None:
    """A line about a cell, on standard error."""
    outcome = "ok" if cell.ok else f"WRONG: {'; '.join(cell.wrong)}"
    print(
        f"{cell.step:<12} {cell.victim:<16} {outcome}; resumed {cell.resumed} times, slowest answer {cell.longest_s} s,"
        f" {sum(cell.errors.values())} errors of {cell.payments} {cell.errors or ''}, {cell.seconds} s",
        file=sys.stderr,
        flush=True,
    )


async def run(arguments: argparse.Namespace, operator: Operator) -> dict[str, Any]:
    """What the chosen command prints."""
    if arguments.command == "pauses":
        return await pauses(operator, arguments.moves, arguments.rate, arguments.payments, arguments.slots, arguments.rows_rate)
    if arguments.command == "copy":
        return await copy_beside_copy(operator, arguments.payments, arguments.slots)
    cells = await matrix(operator, tuple(arguments.step or STEPS), tuple(arguments.victim or VICTIMS), say)
    if arguments.table:
        print("\n".join(table(cells)), file=sys.stderr)
    return {"ok": all(cell.ok for cell in cells), "cells": msgspec.to_builtins(cells)}


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("matrix", "pauses", "copy"))
    parser.add_argument("--attach", type=Path, metavar="HOME", help="use the cluster that runs there")
    parser.add_argument("--step", action="append", choices=STEPS, help="only this step (may be given again)")
    parser.add_argument("--victim", action="append", choices=VICTIMS, help="only this victim (may be given again)")
    parser.add_argument("--table", action="store_true", help="print the matrix as a table, on standard error")
    parser.add_argument("--moves", type=int, default=20, help="moves to measure (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100.0, help="payments a second meanwhile (default: %(default)s)")
    parser.add_argument("--payments", type=int, default=20_000, help="payments in the range (default: %(default)s)")
    parser.add_argument("--rows-rate", type=int, default=0, help="rows a second that a move may take; 0 is no limit")
    parser.add_argument("--slots", type=int, default=8192, help="slots of the range, 10,000 at most (default: %(default)s)")
    parser.add_argument("--buffers", default="", help="the cache of each node's Postgres (default: the local cluster's)")
    parser.add_argument("--log", default="", help="log between two checkpoints of a node at most (default: the local cluster's)")
    arguments = parser.parse_args()
    if not 1 <= arguments.slots <= 10_000:
        parser.error("--slots: 1 to 10,000")
    attached = arguments.attach.resolve() if arguments.attach else None
    with cluster("reshard", attached=attached, node_buffers=arguments.buffers, node_log=arguments.log) as running:
        operator = Operator(running.home, command_s=COMMAND_S if arguments.command == "matrix" else LONG_S)
        result = asyncio.run(run(arguments, operator))
    print(json.dumps(result, indent=2))
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
