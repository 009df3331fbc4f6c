"""`oncepay reshard`: move ranges of slots between shards while payments go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.common import WRONG, handle_errors, home, output_option

if TYPE_CHECKING:
    from oncepay.etcd import Etcd
    from oncepay.moves import Goal, Move
    from oncepay.settings import Settings
    from oncepay.shardmap import ShardMap
    from shard.mover.plan import Plan

T = TypeVar("T")

SLOT_MAX = 65_535
RATE_ROWS_PER_S = 16_000
"""What a move is given unless its operator says otherwise."""

config_option = click.option(
    "--config", type=click.Path(dir_okay=False), help="The deployment's settings. By default the local cluster's."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
move_argument = click.argument("move_id", metavar="ID")
lost_option = click.option(
    "--lost",
    metavar="SHARD",
    help="This shard of the move is lost for good: end it without, and clean up the other shard.",
)


@click.group(short_help="Move ranges of slots between shards, under load.")
def reshard() -> None:
    """Move ranges of slots from one shard to another while payments go on.

    A move is planned, started (it copies, catches up and verifies), switched, and finished; until it is finished it can be
    rolled back with nothing lost. Every step can be carried on by `resume` after a crash.

    \b
    Example:
      oncepay reshard plan --range 0-16383 --to s1
      oncepay reshard start m1a2b3c4d
      oncepay reshard switch m1a2b3c4d
      oncepay reshard finish m1a2b3c4d
    """


class SlotRange(click.ParamType[tuple[int, int]]):
    """FIRST-LAST, both included."""

    name = "range"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, dash, last = str(value).partition("-")
        if not dash or not first.isdigit() or not last.isdigit() or not int(first) <= int(last) <= SLOT_MAX:
            self.fail(f"{value!r} is not FIRST-LAST with slots from 0 to {SLOT_MAX}", param, ctx)
        return int(first), int(last)


@reshard.command(short_help="Plan a move, and say what it takes.")
@click.option("--range", "slots", type=SlotRange(), metavar="FIRST-LAST", help="Move these slots.")
@click.option("--to", "target", metavar="SHARD", help="To this shard. By default the one that owns least.")
@click.option("--split", "split_shard", metavar="SHARD", help="Move the upper half of what this shard owns.")
@click.option("--empty", "empty_shard", metavar="SHARD", help="Move all that this shard owns.")
@click.option("--even", is_flag=True, help="Deal the slots out evenly over all shards.")
@click.option(
    "--rate",
    type=click.IntRange(0),
    default=RATE_ROWS_PER_S,
    show_default=True,
    metavar="ROWS",
    help="At most so many rows a second, in each step, with rests; 0: as fast as it goes, whatever payments feel.",
)
@click.option("--pause-limit", "pause_limit_s", type=click.FloatRange(0.1, 25), default=3.0, show_default=True,
              metavar="SECONDS", help="A switch that would hold the range for longer is undone.")  # fmt: skip
@dry_run_option
@config_option
@output_option
@handle_errors
def plan(
    slots: tuple[int, int] | None, target: str | None, split_shard: str | None, empty_shard: str | None, even: bool, rate: int,
    pause_limit_s: float, dry_run: bool, config: str | None, output: str,
) -> None:  # fmt: skip
    """Plan one or more moves: what moves, how long that takes, what it needs, and what stands in its way.

    \b
    Example:
      oncepay reshard plan --range 0-16383 --to s1
      oncepay reshard plan --split s0 --to s2 --rate 5000
      oncepay reshard plan --even --dry-run
    """
    if sum(bool(each) for each in (slots, split_shard, empty_shard, even)) != 1:
        raise click.UsageError("say what moves: one of --range, --split, --empty, --even")

    async def work(etcd: Etcd, settings: Settings) -> list[Plan]:
        from oncepay.shardmap import read_takers
        from shard.mover.plan import plan as make
        from shard.mover.run import mover

        async with mover(etcd, settings) as moving:
            current = await moving.records.change_map(lambda found: found)
            shards = await read_takers(etcd)
            wanted = _wanted(current, shards, slots, target, split_shard, empty_shard)
            return [
                await make(moving, current, first, last, to, rate_rows_per_s=rate, pause_limit_s=pause_limit_s, keep=not dry_run)
                for first, last, to in wanted
            ]

    plans = asyncio.run(_with_etcd(config, work))
    if output == "json":
        click.echo(json.dumps(_plans_as_json(plans, dry_run)))
    else:
        _show_plans(plans, dry_run)
    if not all(found.ok for found in plans):
        raise SystemExit(WRONG)


def _wanted(
    current: ShardMap, shards: list[str], slots: tuple[int, int] | None, target: str | None, split_shard: str | None,
    empty_shard: str | None,
) -> list[tuple[int, int, str]]:  # fmt: skip
    """The moves that were asked for: first slot, last slot, target. Raises click.UsageError."""
    from oncepay.moves import even_moves, owned_runs

    def size(shard: str) -> int:
        return sum(last - first + 1 for first, last in owned_runs(current, shard))

    def taker(giver: str) -> str:
        others = [shard for shard in shards if shard != giver]
        if not others:
            raise click.UsageError("there is no other shard")
        return target or min(others, key=size)

    if slots:
        return [(*slots, taker(current.range_of(slots[0]).shard))]
    giver = split_shard or empty_shard
    if giver is None:
        return [(first, last, to) for first, last, _, to in even_moves(current, tuple(shards))]
    runs = owned_runs(current, giver)
    if not runs:
        raise click.UsageError(f"shard {giver} owns nothing")
    if empty_shard:
        return [(first, last, taker(giver)) for first, last in runs]
    half, wanted = size(giver) // 2, list[tuple[int, int, str]]()
    for first, last in reversed(runs):
        count = min(half, last - first + 1)
        if count:
            wanted.append((last - count + 1, last, taker(giver)))
        half -= count
    return wanted


def _plans_as_json(plans: list[Plan], dry_run: bool) -> dict[str, Any]:
    """The first plan's members, and all of them under `moves` where there are several."""
    import msgspec

    def one(found: Plan) -> dict[str, Any]:
        move = found.move
        return {
            "move": None if dry_run or not found.ok else move.id,
            "range": [move.first, move.last],
            "from": move.source,
            "to": move.target,
            "rows": sum(found.rows.values()),
            "rows_by_table": found.rows,
            "bytes": found.bytes,
            "copy_s": found.copy_s,
            "shards": msgspec.to_builtins(found.shards),
            "checks": msgspec.to_builtins(found.checks),
            "ok": found.ok,
        }

    found = [one(each) for each in plans]
    if not found:
        return {"move": None, "moves": [], "ok": True}
    return found[0] | ({"moves": found} if len(found) > 1 else {})


def _show_plans(plans: list[Plan], dry_run: bool) -> None:
    if not plans:
        click.echo("Nothing has to move.")
    for found in plans:
        move = found.move
        name = "(not kept)" if dry_run or not found.ok else move.id
        click.echo(f"move {name}: slots {move.first}-{move.last} from {move.source} to {move.target}")
        rows = ", ".join(f"{count:,} {table}" for table, count in found.rows.items())
        click.echo(f"  {rows}; {found.bytes / 2**20:,.1f} MiB; the copy takes about {_duration(found.copy_s)}")
        for room in found.shards:
            keep = "all" if room.keep_bytes < 0 else f"{room.keep_bytes / 2**20:,.0f} MiB"
            click.echo(
                f"  {room.shard}: database {room.database_bytes / 2**20:,.0f} MiB, log {room.wal_bytes / 2**20:,.0f} MiB on disk,"
                f" writes {room.wal_bytes_per_s / 2**20:.2f} MiB/s, slots keep {room.kept_bytes / 2**20:,.0f} of {keep}"
            )
        for check in found.checks:
            mark = "ok  " if check.ok else "FAIL" if check.fatal else "note"
            click.echo(f"  {mark} {check.name}: {check.detail}")
        if found.ok and not dry_run:
            click.echo(f"  next: oncepay reshard start {move.id}")


# Carrying a move on


def _command(name: str, goal: Goal | None, short: str, text: str) -> None:
    """A command that brings a move to `goal`."""

    @config_option
    @dry_run_option
    @output_option
    @handle_errors
    def run(move_id: str, config: str | None, dry_run: bool, output: str, lost: str | None = None) -> None:
        if lost is not None and goal is not None:
            _end_without(move_id, goal, lost, config, dry_run, output)
        else:
            _carry_on(move_id, goal, config, dry_run, output)

    run.__doc__ = f"{text}\n\n    \b\n    Example:\n      oncepay reshard {name} m1a2b3c4d\n    "
    options = lost_option(run) if name in ("abort", "finish") else run
    reshard.command(name, short_help=short)(move_argument(options))


_TEXTS: dict[str, tuple[Goal | None, str, str]] = {
    "start": (
        "ready",
        "Copy, catch up and verify: up to where only the switch is left.",
        "Copy the range, catch up with what changed meanwhile, and verify it. Returns when only the switch is left.",
    ),
    "switch": (
        "reversible",
        "Hand the range over.",
        "Hand the range over: requests for it wait for a moment, all others go on. If that would take longer than the move's"
        " pause limit, the range stays where it is.",
    ),
    "rollback": (
        "rolled_back",
        "Hand the range back, with all that was written since.",
        "Verify the stream back, hand the range back to its former shard with all that was written since, and clean up.",
    ),
    "finish": (
        "finished",
        "Delete what the former shard still has: no way back.",
        "End the stream back, and delete what the former shard still has of the range. A rollback that was begun is given up"
        " so, too, up to its hand-over.",
    ),
    "abort": (
        "aborted",
        "Give a move up that was not switched, and clean up.",
        "Give a move up that was not switched: payments go on where they are, and nothing of the copy stays.",
    ),
    "resume": (
        None,
        "Carry a move on that was paused, or whose process ended.",
        "Carry a move on, from wherever it stands to what was last asked for.",
    ),
}
for _name, _text in _TEXTS.items():
    _command(_name, *_text)


def _carry_on(move_id: str, goal: Goal | None, config: str | None, dry_run: bool, output: str) -> None:
    async def work(etcd: Etcd, settings: Settings) -> Move:
        from oncepay.moves import refusal
        from shard.mover.errors import MoveRefused
        from shard.mover.records import Records
        from shard.mover.run import mover

        if dry_run:
            move, _ = await Records(etcd).get(move_id)
            if goal is not None and (why := refusal(move, goal)):
                raise MoveRefused(why)
            return move
        if goal is not None and goal != "ready":
            await _interrupt(Records(etcd), move_id, goal)
        with _bars(quiet=output == "json") as on_progress:
            async with mover(etcd, settings, on_progress) as moving:
                return await moving.run(move_id, goal)

    move = asyncio.run(_with_etcd(config, work))
    if dry_run:
        _say(move, output, f"would bring move {move.id} from {move.state} to {goal or move.goal}")
    else:
        _say(move, output, _outcome(move))


def _end_without(move_id: str, goal: Goal, lost: str, config: str | None, dry_run: bool, output: str) -> None:
    async def work(etcd: Etcd, settings: Settings) -> Move:
        from deploy.members import read
        from oncepay.moves import refusal_without
        from oncepay.shardmap import read_map
        from shard.mover.errors import MoveRefused
        from shard.mover.lost import end_without
        from shard.mover.records import Records
        from shard.mover.run import mover

        move, _ = await Records(etcd).get(move_id)
        alive = await read(etcd, lost)
        if alive.leader is not None or alive.members:
            names = ", ".join(member.name for member in alive.members) or alive.leader
            raise MoveRefused(f"{names} of {lost} is in touch with etcd: only a shard whose nodes are lost is done without")
        known = await read_map(etcd)
        if dry_run:
            if known is None or (why := refusal_without(move, goal, lost, known.range_of(move.first).shard)):
                raise MoveRefused(why if known else "etcd has no shard map")
            return move
        with _bars(quiet=output == "json") as on_progress:
            async with mover(etcd, settings, on_progress) as moving:
                return await end_without(moving, move_id, goal, lost, on_progress)

    move = asyncio.run(_with_etcd(config, work))
    _say(move, output, f"would bring move {move.id} from {move.state} to {goal}" if dry_run else _outcome(move))


async def _interrupt(records: Any, move_id: str, goal: Goal) -> None:
    """Another process that carries the move on leaves it to this one, which wants something else of it."""
    from oncepay.moves import OPERATORS_PREFIX, refusal
    from shard.mover.errors import MoveRefused

    move, _ = await records.get(move_id)
    if why := refusal(move, goal):
        raise MoveRefused(why)
    if goal == "aborted" and await records.etcd.get(OPERATORS_PREFIX + move_id):
        await records.change(move_id, paused=True)


@reshard.command(short_help="Let the process that carries a move on stop.")
@move_argument
@dry_run_option
@config_option
@output_option
@handle_errors
def pause(move_id: str, dry_run: bool, config: str | None, output: str) -> None:
    """Let the process that carries a move on stop at its next chunk. `resume` carries it on. A switch is not paused.

    \b
    Example:
      oncepay reshard pause m1a2b3c4d
    """

    async def work(etcd: Etcd, settings: Settings) -> Move:
        from shard.mover.errors import MoveRefused
        from shard.mover.records import Records

        del settings
        records = Records(etcd)
        move, _ = await records.get(move_id)
        if move.over:
            raise MoveRefused(f"move {move.id} is {move.state}: there is nothing to pause")
        return move if dry_run else await records.change(move_id, paused=True)

    move = asyncio.run(_with_etcd(config, work))
    _say(move, output, f"move {move.id} is paused in {move.state}: oncepay reshard resume {move.id}")


@reshard.command(short_help="Show where a move stands, or all of them.")
@click.argument("move_id", metavar="[ID]", required=False)
@config_option
@output_option
@handle_errors
def status(move_id: str | None, config: str | None, output: str) -> None:
    """Show where a move stands: state, rows, lag, rate, estimate, pause. Without an ID all moves, the newest first.

    \b
    Example:
      oncepay reshard status
      oncepay reshard status m1a2b3c4d --output json
    """

    async def work(etcd: Etcd, settings: Settings) -> list[Move]:
        from shard.mover.records import Records

        del settings
        records = Records(etcd)
        return [(await records.get(move_id))[0]] if move_id else list(reversed(await records.all()))

    moves = asyncio.run(_with_etcd(config, work))
    if output == "json":
        found = [as_json(move) for move in moves]
        newest = found[0] if found else dict.fromkeys(("move", "state"))
        click.echo(json.dumps(newest if move_id else newest | {"moves": found}))
        return
    if not moves:
        click.echo("There are no moves: oncepay reshard plan --help")
    for move in moves:
        click.echo(_line(move))


def as_json(move: Move) -> dict[str, Any]:
    """A move as others script against it."""
    return {
        "move": move.id,
        "state": move.state,
        "goal": move.goal,
        "back": move.back,
        "paused": move.paused,
        "range": [move.first, move.last],
        "from": move.source,
        "to": move.target,
        "rows_copied": move.rows_copied,
        "rows_total": move.rows_total,
        "rows_verified": move.rows_verified,
        "rows_deleted": move.rows_deleted,
        "bytes_copied": move.bytes_copied,
        "lag_bytes": move.lag_bytes,
        "rows_per_s": move.rows_per_s,
        "eta_s": move.eta_s,
        "pause_s": move.pause_s,
        "problem": move.problem,
        "differences": list(move.differences),
    }


def _say(move: Move, output: str, text: str) -> None:
    click.echo(json.dumps(as_json(move)) if output == "json" else text)


def _outcome(move: Move) -> str:
    held = f" The range was held for {move.pause_s:.3f} s." if move.pause_s is not None else ""
    next_step = {
        "ready": f" Next: oncepay reshard switch {move.id}",
        "reversible": f"{held} Next: oncepay reshard finish {move.id}, or rollback",
        "rolled_back": held,
    }
    return f"move {move.id}: {move.state}.{next_step.get(move.state, '')}"


def _line(move: Move) -> str:
    done = f"{move.rows_copied:,}/{move.rows_total:,} rows"
    parts = [f"slots {move.first}-{move.last} {move.source} → {move.target}", done]
    if move.rows_per_s and not move.over:
        parts.append(f"{move.rows_per_s:,.0f} rows/s")
    if move.eta_s is not None:
        parts.append(f"about {_duration(move.eta_s)} left")
    if move.pause_s is not None:
        parts.append(f"held for {move.pause_s:.3f} s")
    if move.paused:
        parts.append("paused")
    if move.problem:
        parts.append(move.problem)
    return f"{move.id}  {move.state:<12} {', '.join(parts)}" + "".join(f"\n    {text}" for text in move.differences)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 7200 else f"{whole // 60} min {whole % 60} s"


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Callable[[Move], None]]:
    """A bar for each step that has rows, on standard error."""
    if quiet:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {name: bars.add_task(name, total=None, visible=False) for name in ("copy", "verify", "delete")}

        def on_progress(move: Move) -> None:
            shown = {"copy": move.rows_copied, "verify": move.rows_verified}
            name = "delete" if move.rows_deleted else move.state
            if name in tasks:
                done = move.rows_deleted if name == "delete" else shown[name]
                bars.update(tasks[name], completed=done, total=max(move.rows_total, done), visible=True)

        yield on_progress


# Where the deployment is


async def _with_etcd(config: str | None, work: Callable[[Etcd, Settings], Awaitable[T]]) -> T:
    from oncepay.etcd import Etcd

    settings = await asyncio.to_thread(_settings, config)
    async with Etcd(settings.etcd) as etcd:
        return await work(etcd, settings)


def _settings(config: str | None) -> Settings:
    if config is not None:
        from oncepay.settings import load

        return load(config)
    from deploy.local import Cluster

    cluster = Cluster(home())
    cluster.supervisor()  # tells when no cluster is running
    return cluster.settings
