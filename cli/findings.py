"""What a check found: how bad, where, what, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Level = Literal["problem", "warning"]


class Finding(NamedTuple):
    """`problem`: it doesn't work, or a promise is in danger. `warning`: it works, and should be looked at."""

    level: Level
    where: str
    what: str
    do: str


def say(found: Sequence[Finding], *, nothing: str) -> None:
    """Problems first, for people."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for each in sorted(found, key=lambda finding: finding.level):
        mark = "[red]✗[/red]" if each.level == "problem" else "[yellow]![/yellow]"
        console.print(f"{mark} [bold]{escape(each.where)}[/bold]: {escape(each.what)}", soft_wrap=True)
        console.print(f"  → {escape(each.do)}", soft_wrap=True)
    if not found:
        console.print(f"[green]✓[/green] {escape(nothing)}", soft_wrap=True)
