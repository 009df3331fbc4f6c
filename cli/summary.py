"""The demo's summary on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from cli.ending import show_ending
from loadtest.purchases import DECLINED, SELLER_RULE
from oncepay.money import format_minor

if TYPE_CHECKING:
    from rich.console import Console

    from loadtest.replay import Tally

TABLE_WIDTH = 64
"""Columns of the sellers' table before its bars."""
BAR_WIDTH_MAX = 40
SHOWN = ("payments", "entries", "derived_entries", "confirmed_intents", "balance_transactions", "orphans")
"""What verify counted, as far as the summary shows it."""


def show(console: Console, result: dict[str, Any]) -> None:
    """Print what happened."""
    payments, tally = result["payments"], result["tally"]
    console.rule("Oncepay demo")
    console.print(_payments(payments), _money(result, tally), sep="\n")
    width = max(4, min(BAR_WIDTH_MAX, console.width - TABLE_WIDTH))
    console.print(_sellers(result["sellers"]["sellers"], width))
    _story(console, result, tally)
    show_ending(console, result)
    _verdict(console, result["verify"])


def _payments(payments: dict[str, int]) -> Table:
    table = Table(title="Payments", title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    meaning = {
        "submitted": "purchases, January 1997 to June 1998",
        "succeeded": "charged, once each",
        "failed": "declined by the card's bank",
        "canceled": "given up",
        "refused": "of $0.00: refused before any row",
        "pending": "still open",
    }
    for name, text in meaning.items():
        table.add_row(f"{payments[name]:,}", f"[bold]{name}[/bold]  [dim]{text}[/dim]")
    return table


def _money(result: dict[str, Any], tally: Tally) -> Table:
    table = Table(title="Money", title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    totals = _totals(result["totals"])
    table.add_row(format_minor(tally.amount_minor, "usd"), "in, as the clients were told")
    table.add_row(format_minor(totals["money_in"], "usd"), "in, as the derived ledger has it")
    table.add_row(format_minor(totals["platform_fees"], "usd"), "the platform's fees")
    table.add_row(format_minor(totals["stripe_fees"], "usd"), "Stripe's fees")
    return table


def _totals(totals: dict[str, Any]) -> dict[str, int]:
    """The row of US dollars in the aggregator's totals."""
    row: dict[str, Any] = next((row for row in totals["currencies"] if row["currency"] == "usd"), {})
    return {name: int(row.get(name, 0)) for name in ("money_in", "platform_fees", "stripe_fees")}


def _sellers(rows: list[dict[str, Any]], width: int) -> Table:
    table = Table(title="Top sellers", title_justify="left", box=None, header_style="dim")
    table.add_column("seller")
    for name in ("payments", "gross", "fees", "net"):
        table.add_column(name, justify="right")
    table.add_column("")
    most = max((row["gross"] for row in rows), default=1) or 1
    for row in rows:
        bar = "█" * max(1, round(width * row["gross"] / most))
        money = [format_minor(row[name], row["currency"]) for name in ("gross", "fees", "net")]
        table.add_row(row["seller"], f"{row['payments']:,}", *money, f"[cyan]{bar}[/cyan]")
    return table


def _story(console: Console, result: dict[str, Any], tally: Tally) -> None:
    counts, by = result["counts"], result["by_poll"]
    webhooks, faults = counts["webhooks"], counts.get("faults", {})
    repeat = sum(1 for count in tally.buyers.values() if count > 1)
    asked = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in sorted(faults.items()))
    declined = f"{sum(DECLINED.values()):.0%}"
    for text in (
        f"[bold]{repeat:,}[/bold] of {len(tally.buyers):,} buyers came back",
        f"[bold]{tally.doubled:,}[/bold] purchases were submitted twice at once;"
        f" {tally.doubled_replayed:,} answers came from the first",
        f"[bold]{webhooks['lost']:,}[/bold] webhooks were lost and {webhooks['doubled']:,} doubled of {webhooks['sent']:,} sent;"
        f" {by['webhook']:,} brought the first word of an outcome, and polls brought {by['poll']:,} payments to their end",
        f"the stand-in for Stripe misbehaved: {asked}; {declined} of the cards are declined",
        f"items to sellers: {SELLER_RULE}",
        f"cluster ready after [bold]{result['startup_seconds']}[/bold] s, purchases settled in"
        f" [bold]{result['seconds']}[/bold] s, verified in [bold]{result['verify_seconds']}[/bold] s",
    ):
        console.print(f"  • {text}")


def _verdict(console: Console, verdict: dict[str, Any]) -> None:
    checked = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name in SHOWN if (count := verdict["checked"].get(name)))
    if verdict["ok"]:
        console.print(f"[bold green]✓ verified[/bold green]: {checked}; {verdict['open']} open, no difference")
        return
    console.print(f"[bold red]✗ {len(verdict['differences'])} differences[/bold red] ({checked})")
    for difference in verdict["differences"][:20]:
        console.print(f"  promise {difference['promise']}: {difference['what']} ({difference['key']})")
