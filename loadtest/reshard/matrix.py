"""The kill matrix: one part is killed at one step of a move, while buyers pay; then everything has to come out right.

In each cell a range moves and the move is finished, or rolled back. The operator's process stops itself exactly at the step, the
victim is killed, and the operator goes on (or is dead, and another one resumes). The cell is right when the move came to its end,
every acknowledged payment is found once with the status that was told, `oncepay verify` and `shards check-cache` are ok, and
nothing of the move is left: no slot, publication, subscription or origin, and no row of the range where it isn't owned.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from loadtest.reshard.commands import Failed, Operator, frozen, kill, session, thaw
from loadtest.reshard.traffic import Traffic

VICTIMS = ("operator", "frozen operator", "source leader", "target leader", "worker", "router", "etcd member")
STEPS = ("copy", "catch_up", "verify", "fence", "drain", "switch", "reversible", "back:fence", "back:drain", "back:switch")
FREEZES = {"copy": "copy+", "verify": "verify+", "reversible": "reversible+"}
"""Steps that have a midst: there, after the first chunk."""
RATE_PER_S = 12.0
FROZEN_OPERATOR_S = 9.0
"""Longer than the operator's lease: it finds that another one has been at work."""
RESUMES_MAX = 5
WHOLE_S = 120.0
SLOTS = 256
MADE = (
    ("pg_publication", "pubname"), ("pg_subscription", "subname"), ("pg_replication_slots", "slot_name"),
    ("pg_replication_origin", "roname"),
)  # fmt: skip
"""What a move makes in both databases, each named after it."""


class Cell(msgspec.Struct, frozen=True):
    """What came of one cell. `longest_s`: the slowest answer in the range; `errors`: how many were no success, by what came."""

    step: str
    victim: str
    ok: bool
    resumed: int
    seconds: float
    pause_s: float | None
    payments: int
    errors: dict[str, int]
    longest_s: float
    wrong: tuple[str, ...] = ()


async def matrix(
    operator: Operator, steps: tuple[str, ...], victims: tuple[str, ...], say: Callable[[Cell], None], first: int = 20_000
) -> list[Cell]:
    """Every step with every victim, on the cluster of `operator`. `say` hears of each cell."""
    cells = []
    for step in steps:
        for victim in victims:
            cell = await one_cell(operator, step, victim, first)
            cells.append(cell)
            say(cell)
    return cells


async def one_cell(operator: Operator, step: str, victim: str, first: int) -> Cell:
    """One cell."""
    began_s = time.monotonic()
    wrong: list[str] = []
    status = await whole(operator)
    traffic = Traffic(status["urls"]["router"], status["api_key"], first, first + SLOTS - 1)
    source = owner(status, first)
    target = next(shard["name"] for shard in status["shards"] if shard["name"] != source)
    resumed, move = 0, dict[str, Any]()
    try:
        async with traffic.running(RATE_PER_S):
            await asyncio.sleep(1.0)
            resumed, move = await moved(operator, step, victim, first, source, target)
            await asyncio.sleep(1.0)
    except (Failed, TimeoutError) as error:
        wrong.append(repr(error))
        await tidied(operator)
    wanted = source if step.startswith("back:") else target
    status = await whole(operator)
    if owner(status, first) != wanted:
        wrong.append(f"the range is on {owner(status, first)}, and not on {wanted}")
    wrong += await checked(operator, traffic)
    if move:
        wrong += await left_over(operator, move["move"], first, (source, target), wanted)
    return Cell(
        step, victim, not wrong, resumed, round(time.monotonic() - began_s, 1), move.get("pause_s"), len(traffic.answers),
        dict(Counter(str(answer.status or "no answer") for answer in traffic.answers if answer.status not in {200, 201})),
        round(max((answer.took_s for answer in traffic.answers if answer.inside), default=0.0), 2), tuple(wrong),
    )  # fmt: skip


async def moved(operator: Operator, step: str, victim: str, first: int, source: str, target: str) -> tuple[int, dict[str, Any]]:
    """Bring a move to its end with one kill on the way: how often it was resumed, and the move."""
    plan = await operator.must("reshard", "plan", "--range", f"{first}-{first + SLOTS - 1}", "--to", target)
    name = plan["move"]
    last = "rollback" if step.startswith("back:") else "finish"
    commands = {
        "start": ("copy", "catch_up", "verify"), "switch": ("fence", "drain", "switch"),
        "finish": ("reversible",), "rollback": ("back:fence", "back:drain", "back:switch"),
    }  # fmt: skip
    resumed = 0
    for command in ("start", "switch", last):
        freeze_at = FREEZES.get(step, step) if step in commands[command] else ""
        process = await operator.start("reshard", command, name, freeze_at=freeze_at)
        if freeze_at:
            if not await frozen(process):
                raise Failed(f"{command} never came to {freeze_at}: {await operator.end(process)}")
            await strike(operator, victim, process, source, target)
        code, answer = await operator.end(process)
        goal = {"start": "ready", "switch": "reversible", "finish": "finished", "rollback": "rolled_back"}[command]
        for _ in range(RESUMES_MAX):
            if code == 0 and answer["state"] == goal:
                break
            resumed += 1
            found = await operator.must("reshard", "status", name)
            again = "resume" if found["goal"] == goal else command
            code, answer = await operator.run("reshard", again, name)
        else:
            raise Failed(f"{command} of {name} doesn't end: {answer}")
    return resumed, await operator.must("reshard", "status", name)


async def tidied(operator: Operator) -> None:
    """End the move that a cell has left, so that the next one has its range."""
    for found in (await operator.must("reshard", "status"))["moves"]:
        move = found
        for command in ("finish", "rollback", "abort"):
            if move["state"] in {"finished", "rolled_back", "aborted"}:
                break
            await operator.run("reshard", command, move["move"])
            move = await operator.must("reshard", "status", move["move"])


async def strike(operator: Operator, victim: str, process: asyncio.subprocess.Process, source: str, target: str) -> None:
    """Kill the victim while the operator stands still; then let that one go on."""
    status = await operator.must("status")
    if victim == "operator":
        kill(process.pid)
        return
    if victim == "frozen operator":
        await asyncio.sleep(FROZEN_OPERATOR_S)
    elif victim in {"source leader", "target leader"}:
        shard = source if victim == "source leader" else target
        found = next(item for item in status["shards"] if item["name"] == shard)
        kill(next(node["pid"] for node in found["nodes"] if node["name"] == found["leader"]))
    else:
        start = {"worker": f"worker-{source}", "router": "router", "etcd member": "etcd"}[victim]
        kill(next(item["pid"] for item in status["processes"] if item["name"].startswith(start) and item["pid"]))
    thaw(process)


def owner(status: dict[str, Any], slot: int) -> str:
    """The shard that has the slot by the map."""
    owners = (shard["name"] for shard in status["shards"] for first, last in shard["ranges"] if first <= slot <= last)
    return str(next(owners))


async def whole(operator: Operator) -> dict[str, Any]:
    """The status, once everything runs and every standby streams."""
    async with asyncio.timeout(WHOLE_S):
        while True:
            status = await operator.must("status")
            nodes = [node for shard in status["shards"] for node in shard["nodes"]]
            if (
                all(process["healthy"] for process in status["processes"])
                and all(shard["leader"] for shard in status["shards"])
                and all(node["role"] in {"primary", "replica"} and node["lag_bytes"] is not None for node in nodes)
            ):
                return status
            await asyncio.sleep(0.5)


async def checked(operator: Operator, traffic: Traffic) -> list[str]:
    """What is wrong now: payments that were acknowledged and are not found as they were told, and differences."""
    wrong: list[str] = []
    told = {answer.key: answer.state for answer in traffic.answers if answer.status in {200, 201}}
    found = await traffic.find(list(told))
    lost = [key for key, state in told.items() if found.get(key) != state]
    if lost:
        wrong.append(f"{len(lost)} acknowledged payments are not as they were told, such as {lost[0]}")
    code, verdict = await operator.run("verify", "--wait", "120")
    if code:
        wrong.append(f"verify: {verdict.get('differences', verdict)}"[:2000])
    code, caches = await operator.run("shards", "check-cache")
    if code:
        wrong.append(f"check-cache: {caches}"[:1000])
    return wrong


async def left_over(operator: Operator, move: str, first: int, shards: tuple[str, ...], owner: str) -> list[str]:
    """What is left of a move that is over."""
    found: list[str] = []
    for shard in shards:
        connection = await session(operator, shard)
        try:
            for catalog, column in MADE:
                rows = await connection.fetch(f"select {column} from {catalog} where {column} like $1", f"%{move}%")
                found += [f"left on {shard}: {row[0]} in {catalog}" for row in rows]
            if shard != owner:
                query = "select count(*) from oncepay.payments where slot between $1 and $2"
                if rows := await connection.fetchval(query, first, first + SLOTS - 1):
                    found.append(f"left on {shard}: {rows} payments of the range")
        finally:
            await connection.close()
    return found


def table(cells: list[Cell]) -> list[str]:
    """The cells as a table: a row a step, a column a victim; each with its pause and the slowest answer in the range."""
    victims = list(dict.fromkeys(cell.victim for cell in cells))
    lines = [f"| killed at | {' | '.join(victims)} |", f"| --- |{' --- |' * len(victims)}"]
    for step in dict.fromkeys(cell.step for cell in cells):
        row = []
        for victim in victims:
            cell = next((each for each in cells if (each.step, each.victim) == (step, victim)), None)
            row.append(_shown(cell) if cell else "")
        lines.append(f"| `{step}` | {' | '.join(row)} |")
    return lines


def _shown(cell: Cell) -> str:
    mark = "ok" if cell.ok else "WRONG"
    how = f", resumed {cell.resumed}×" if cell.resumed else ""
    errors = "".join(f", {count} × {what}" for what, count in cell.errors.items())
    return f"{mark}{how}, {cell.longest_s:g} s{errors}"
