"""A campaign of faults: seeded, one after the other, under payments, verified at the end, with a report and a history."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cli.demo import set_faults
from cli.up import hooks
from cli.verify import verify_cluster
from deploy.local import ClusterError
from deploy.local.faults import FAULTS, Hands, inflict
from loadtest.recorder import Recorder, all_ranges

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.local import Cluster
    from deploy.local.status import Status

PAYMENTS_BETWEEN = 100
"""Payments that are told of between two faults: then everything goes on as usual again."""
BESIDE = ("kill-router", "kill-worker", "kill-keygen", "kill-aggregator")
"""What may be killed while another fault lasts."""
BESIDE_CHANCE = 0.4
BESIDE_AFTER_S = 2.0
VERIFY_WAIT_S = 120.0
STEADY_S = 120.0


class Inflicted(msgspec.Struct):
    """One fault of the campaign, and what the buyers saw from its beginning until all was whole."""

    kind: str
    shard: str
    beside: str
    target: str = ""
    at_s: float = 0.0
    whole_after_s: float = 0.0
    gap_s: float = 0.0
    slowest_s: float = 0.0
    refused: int = 0
    failed: str = ""


class Deck:
    """Which fault comes next, on which shard, and what is killed beside it. The same seed gives the same course.

    Every kind comes once, in an order by the seed, before any comes again.
    """

    def __init__(self, kinds: Sequence[str], shards: Sequence[str], seed: int) -> None:
        self._kinds = list(kinds)
        self._shards = list(shards)
        self._chance = random.Random(seed)
        self._left: list[str] = []

    def draw(self) -> tuple[str, str, str]:
        """Fault, shard, and the fault beside it or an empty string."""
        if not self._left:
            self._left = list(self._kinds)
            self._chance.shuffle(self._left)
        kind, shard = self._left.pop(), self._chance.choice(self._shards)
        has_another = self._chance.random() < BESIDE_CHANCE and kind not in (*BESIDE, "restart-everything")
        return kind, shard, self._chance.choice(BESIDE) if has_another else ""


class Campaign:
    """On a running cluster, for `minutes`. The same seed gives the same order of faults on the same shards."""

    def __init__(self, cluster: Cluster, minutes: float, seed: int, reports: Path, console: Console) -> None:
        self._cluster = cluster
        self._minutes = minutes
        self._seed = seed
        self._console = console
        self._inflicted: list[Inflicted] = []
        self._violations: list[str] = []
        started = dt.datetime.now(dt.UTC)
        self._folder = reports / f"{started:%Y%m%dT%H%M%SZ}-seed{seed}"
        self._folder.mkdir(parents=True)

    def run(self) -> dict[str, Any]:
        """The object that `--output json` prints."""
        return asyncio.run(self._run())

    async def _run(self) -> dict[str, Any]:
        status = await self._steady()
        history = self._folder / "history.jsonl"
        began_s = time.monotonic()
        ranges = all_ranges(shard.ranges for shard in status.shards)
        async with Recorder(status.urls["router"], status.api_key, ranges, history=history) as recorder:
            recorder.note("campaign", seed=self._seed, minutes=self._minutes)
            possible = [name for name, kind in FAULTS.items() if kind.is_possible(self._cluster)]
            deck = Deck(possible, [shard.name for shard in status.shards], self._seed)
            with progress_bar(self._console, 60 * self._minutes) as progress:
                while not self._inflicted or time.monotonic() - began_s < 60 * self._minutes:
                    await asyncio.to_thread(set_faults, status, self._seed)  # also after a restart of everything
                    await recorder.more(PAYMENTS_BETWEEN, within_s=STEADY_S)
                    await self._one(recorder, *deck.draw(), began_s)
                    progress(time.monotonic() - began_s)
                    if self._inflicted[-1].failed:
                        break
            await recorder.more(PAYMENTS_BETWEEN, within_s=STEADY_S)
            await recorder.stop()
            await asyncio.to_thread(set_no_faults, status)
            self._violations += await recorder.check()
            verdict = await verify_cluster(await self._steady(), wait_s=VERIFY_WAIT_S)
            self._violations += [f"promise {d['promise']}: {d['what']} ({d['key']})" for d in verdict["differences"]]
            recorder.note("verified", **{name: verdict[name] for name in ("ok", "checked", "open")})
        return self._result(recorder, verdict, history, time.monotonic() - began_s)

    async def _steady(self) -> Status:
        """The cluster's status once everything does its work. Raises ClusterError."""
        hands = Hands(self._cluster, "s0")
        await asyncio.to_thread(hands.until, lambda: self._cluster.status().healthy, "everything does its work", STEADY_S, 0.5)
        return await asyncio.to_thread(self._cluster.status)

    async def _one(self, recorder: Recorder, name: str, shard: str, beside: str, began_s: float) -> None:
        kind = FAULTS[name]
        found = Inflicted(name, shard, beside, at_s=round(time.monotonic() - began_s, 1))
        self._inflicted.append(found)
        fault = kind(Hands(self._cluster, shard, hooks(self._cluster)))
        recorder.note("fault", kind=name, shard=shard, beside=beside)
        calls = [asyncio.to_thread(inflict, fault, on_moment=lambda moment: recorder.note(moment.what, kind=name))]
        if beside:
            calls.append(self._beside(beside, shard))
        first_s = time.monotonic()
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        found.failed = "; ".join(map(str, errors))
        self._violations += [f"{name} on {shard}: {error}" for error in errors]
        begun_s = results[0]["begun"] if isinstance(results[0], dict) else first_s
        found.target = fault.target
        found.whole_after_s = round(time.monotonic() - begun_s, 1)
        found.gap_s = round(recorder.gap_s(begun_s), 2)
        found.slowest_s = round(recorder.slowest_s(begun_s), 2)
        found.refused = recorder.refused(begun_s)
        mark = f"[red]✗ {found.failed}[/red]" if found.failed else "[green]✓[/green]"
        self._console.print(
            f"{found.at_s:6.0f} s  {name:<28} {shard}  {beside:<16} gap {found.gap_s:5.1f} s"
            f"  slowest {found.slowest_s:5.1f} s  {len(recorder.told):,} payments {mark}",
            soft_wrap=True,
        )

    async def _beside(self, name: str, shard: str) -> dict[str, float]:
        """A process is killed too, in the midst of the other fault."""
        await asyncio.sleep(BESIDE_AFTER_S)
        fault = FAULTS[name](Hands(self._cluster, shard))
        try:
            await asyncio.to_thread(fault.begin)
        except ClusterError:  # it may not run just now
            return {}
        return {}

    def _result(self, recorder: Recorder, verdict: dict[str, Any], history: Path, seconds: float) -> dict[str, Any]:
        report = self._folder / "report.md"
        result = {
            "ok": not self._violations and verdict["ok"],
            "faults": len(self._inflicted),
            "kinds": len({found.kind for found in self._inflicted}),
            "acknowledged": len(recorder.told),
            "violations": self._violations,
            "report": str(report),
            "history": str(history),
            "seconds": round(seconds, 1),
            "seed": self._seed,
            "verify": verdict,
        }
        report.write_text(self._report(result, recorder), encoding="utf-8")
        self._console.print(
            f"{'[green]✓[/green]' if result['ok'] else '[red]✗[/red]'} {result['faults']} faults of {result['kinds']} kinds,"
            f" {result['acknowledged']:,} payments acknowledged, {len(self._violations)} violations; {report}",
            soft_wrap=True,
        )
        for violation in self._violations:
            self._console.print(f"[red]✗[/red] {violation}")
        return result

    def _report(self, result: dict[str, Any], recorder: Recorder) -> str:
        verdict = result["verify"]
        lines = [
            f"# Campaign of faults, seed {self._seed}",
            "",
            f"{result['faults']} faults of {result['kinds']} kinds in {result['seconds'] / 60:.1f} minutes;"
            f" {result['acknowledged']:,} payments acknowledged, {recorder.paid()}; {len(recorder.answers):,} answers,"
            f" of which {recorder.refused():,} told the caller to come again or broke off.",
            "",
            f"Verified: {'yes' if verdict['ok'] else 'NO'}, {verdict['checked']}, {verdict['open']} open.",
            "",
            "| at | fault | shard | hit | killed beside it | longest gap | slowest answer | told to come again | whole after |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {f.at_s:.0f} s | {f.kind} | {f.shard} | {f.target} | {f.beside or '—'} | {f.gap_s:.1f} s | {f.slowest_s:.1f} s"
            f" | {f.refused} | {f.whole_after_s:.0f} s |"
            for f in self._inflicted
        ]
        lines += ["", "## Violations", "", *([f"- {text}" for text in self._violations] or ["None."]), ""]
        return "\n".join(lines)


@contextlib.contextmanager
def progress_bar(console: Console, seconds: float) -> Iterator[Callable[[float], None]]:
    """A bar of the campaign's time, with an estimate; what it yields takes the seconds that have passed."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("campaign", total=seconds)
        yield lambda passed_s: bars.update(task, completed=min(passed_s, seconds))


def set_no_faults(status: Status) -> None:
    """The stand-in for Stripe behaves again."""
    import urllib.request

    request = urllib.request.Request(f"{status.urls['stripe']}/_control/faults", data=b"{}", method="PUT")  # noqa: S310
    with urllib.request.urlopen(request, timeout=10):  # noqa: S310
        pass
