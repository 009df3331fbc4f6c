"""How the demo ends: sellers are paid, the books are held against Stripe's, and one seller reads its statement."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rich.table import Table

from cli.reconcile import reconciled
from oncepay.money import format_minor

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.local.status import Status
    from oncepay.client import Oncepay
    from oncepay.settings import Settings

PAID_SELLERS = 5
PAID_WAIT_S = 40.0
PAUSE_S = 0.3
SHOWN_ENTRIES = 3
REACHED = ("paid", "cleared")


async def ending(client: Oncepay, settings: Settings, status: Status, sellers: Sequence[str]) -> dict[str, Any]:
    """Pay the first PAID_SELLERS of `sellers`, reconcile what happened today, read the first one's statement."""
    chosen = list(sellers[:PAID_SELLERS])
    run: dict[str, Any] = {"held": [], "payouts": []}
    if chosen:
        await _onboard(settings, status, chosen)
        run = json.loads(await client.aggregator("POST", "/v1/payouts", {"sellers": chosen}))
    paid = await _until_paid(client, [payout["key"] for payout in run["payouts"]])
    today = dt.datetime.now(dt.UTC).date()
    reconciliation = await reconciled(client, today - dt.timedelta(days=1), today, grace_s=0)
    statement = await client.derived(f"/v1/sellers/{quote(chosen[0], safe='')}/statement", currency="usd") if chosen else None
    return {"payouts": {"held": run["held"], "payouts": paid}, "reconciliation": reconciliation, "statement": statement}


async def _onboard(settings: Settings, status: Status, sellers: Sequence[str]) -> None:
    """Sellers with payees that the stand-in for Tipalti pays. Everywhere else they do this themselves, on Tipalti's pages."""
    import aiohttp

    from oncepay.tipalti_client import TipaltiClient

    headers = {"Authorization": f"Bearer {status.api_key}"}
    async with aiohttp.ClientSession(headers=headers) as http, TipaltiClient(settings.tipalti) as tipalti:
        for seller in sellers:
            body = {"payee": seller, "currency": "usd"}
            async with http.put(f"{status.urls['router']}/v1/sellers/{quote(seller, safe='')}", json=body) as answer:
                answer.raise_for_status()
            await tipalti.create_payee(seller)
            asked = {"payee": seller, "payable": True}
            async with http.post(f"{status.urls['tipalti']}/_control/payee", json=asked) as answer:
                answer.raise_for_status()


async def _until_paid(client: Oncepay, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The payouts, once Tipalti has paid all of them, or as they are after PAID_WAIT_S."""
    deadline_s = asyncio.get_running_loop().time() + PAID_WAIT_S
    while True:
        found = [json.loads(await client.aggregator("GET", f"/v1/payouts/{quote(key, safe='')}"))["payout"] for key in keys]
        if all(payout["status"] in REACHED for payout in found) or asyncio.get_running_loop().time() > deadline_s:
            return found
        await asyncio.sleep(PAUSE_S)


def show_ending(console: Console, result: dict[str, Any]) -> None:
    """Print what `ending` found."""
    table = Table(title="Payouts", title_justify="left", box=None, header_style="dim")
    for name in ("seller", "payout", "state"):
        table.add_column(name, justify="right" if name == "payout" else "left")
    for payout in result["payouts"]["payouts"]:
        table.add_row(payout["seller"], format_minor(payout["amount"], payout["currency"]), payout["status"])
    console.print(table)
    if result["statement"] is not None:
        _statement(console, result["statement"])
    reconciliation = result["reconciliation"]
    checked = reconciliation["checked"]
    counts = (
        f"{checked.get('transactions', 0):,} transactions at Stripe, {checked.get('bank_payouts', 0):,} payouts to the bank,"
        f" {checked.get('tipalti_payments', 0):,} payments at Tipalti"
    )
    if reconciliation["ok"]:
        console.print(f"[bold green]✓ reconciled[/bold green]: {counts}, no difference")
        return
    console.print(f"[bold red]✗ {len(reconciliation['differences'])} differences to Stripe and Tipalti[/bold red] ({counts})")
    for found in reconciliation["differences"][:10]:
        console.print(f"  {found['kind']} {found['transaction'] or found['entry']}: {found['cause']}")


def _statement(console: Console, statement: dict[str, Any]) -> None:
    title = f"Statement of seller {statement['seller']}"
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for name in ("", "amount", "balance"):
        table.add_column(name, justify="right" if name else "left")
    currency, entries = statement["currency"], statement["entries"]
    table.add_row("opening balance", "", format_minor(statement["opening_balance"], currency))
    if len(entries) > SHOWN_ENTRIES:
        table.add_row(f"… {len(entries) - SHOWN_ENTRIES:,} entries before", "", "")
    for entry in entries[-SHOWN_ENTRIES:]:
        table.add_row(f"{entry['kind']} {entry['key']}", *(format_minor(entry[name], currency) for name in ("amount", "balance")))
    table.add_row("closing balance", "", format_minor(statement["closing_balance"], currency))
    console.print(table)
