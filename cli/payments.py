"""`oncepay payments`: look at payments, make one, give one up or back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from cli.common import client_errors, handle_errors, home, output_option

if TYPE_CHECKING:
    from oncepay.client import Oncepay, PaymentView

T = TypeVar("T")

DEADLINE_S = 30.0

url_option = click.option("--url", help="The router's origin. By default the local cluster's.")
key_option = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A file with the API key. By default the local cluster's.",
)


@click.group(short_help="Look at payments, make one, give one up or back.")
def payments() -> None:
    """Look at payments, make one, give one up or back.

    \b
    Example:
      oncepay payments list --buyer b-77
      oncepay payments show order-10042 --history
      oncepay payments pay order-10042 --buyer b-77 --item records-4:1499:2 --card pm_card_visa
      oncepay payments refund order-10042 --amount 500
    """


@payments.command()
@click.argument("key")
@click.option("--history", "with_history", is_flag=True, help="Also each event that moved it: when, at which LSN, by whom.")
@url_option
@click.option("--aggregator-url", help="The aggregator's origin, for --history. By default the local cluster's.")
@key_option
@output_option
@handle_errors
def show(
    key: str, with_history: bool, url: str | None, aggregator_url: str | None, api_key_file: Path | None, output: str
) -> None:
    """Show a payment with its refunds, disputes and ledger entries.

    \b
    Example:
      oncepay payments show order-10042
      oncepay payments show order-10042 --history
    """
    if not with_history:
        _print(_run(url, api_key_file, lambda client: client.get(key)), output)
        return
    from cli.history import print_history, read_history

    payment, versions = _run(url, api_key_file, lambda client: read_history(client, key), aggregator_url)
    if output == "json":
        click.echo(json.dumps({**msgspec.to_builtins(payment), "history": versions}))
        return
    _print(payment, output)
    print_history(versions, payment.version)


@payments.command(name="list")
@click.option("--buyer", default="", help="Only this buyer's.")
@click.option("--seller", default="", help="Only with items of this seller.")
@click.option("--status", default="", help="Only in this state.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many, newest first.")
@url_option
@key_option
@output_option
@handle_errors
def list_(buyer: str, seller: str, status: str, limit: int, url: str | None, api_key_file: Path | None, output: str) -> None:
    """List payments, newest first.

    \b
    Example:
      oncepay payments list --status processing
    """

    async def read(client: Oncepay) -> list[PaymentView]:
        found: list[PaymentView] = []
        async for payment in client.payments(buyer=buyer, seller=seller, status=status, limit=min(limit, 100)):
            found.append(payment)
            if len(found) == limit:
                break
        return found

    found = _run(url, api_key_file, read)
    if output == "json":
        click.echo(json.dumps({"payments": [msgspec.to_builtins(payment) for payment in found]}))
        return
    from rich.console import Console
    from rich.table import Table

    from oncepay.money import format_minor

    table = Table("key", "status", "buyer", "amount", "created")
    for payment in found:
        amount = format_minor(payment.amount, payment.currency)
        table.add_row(payment.key, payment.status, payment.buyer, amount, payment.created_at)
    Console(highlight=False).print(table if found else "no payments")


@payments.command()
@click.argument("key")
@click.option("--buyer", required=True, help="The buyer's id.")
@click.option("--currency", default="usd", show_default=True, help="ISO 4217, lower case.")
@click.option("--item", "items", multiple=True, required=True, help="SELLER:AMOUNT[:QUANTITY], the amount in minor units.")
@click.option("--card", default="", help="A payment method's id, as pm_card_visa; without it the browser confirms.")
@click.option("--capture", type=click.Choice(["automatic", "manual"]), default="automatic", show_default=True)
@url_option
@key_option
@output_option
@handle_errors
def pay(
    key: str,
    buyer: str,
    currency: str,
    items: tuple[str, ...],
    card: str,
    capture: str,
    url: str | None,
    api_key_file: Path | None,
    output: str,
) -> None:
    """Submit a payment under KEY. The same call again charges nothing, and shows what became of it.

    \b
    Example:
      oncepay payments pay order-10042 --buyer b-77 --item records-4:1499:2 --card pm_card_visa
    """
    cart = [_item(text) for text in items]
    more: dict[str, Any] = {"payment_method": card} if card else {}

    async def submit(client: Oncepay) -> PaymentView:
        return await client.pay(key, buyer=buyer, currency=currency, items=cart, capture_method=capture, **more)

    _print(_run(url, api_key_file, submit), output)


@payments.command()
@click.argument("key")
@url_option
@key_option
@output_option
@handle_errors
def cancel(key: str, url: str | None, api_key_file: Path | None, output: str) -> None:
    """Give a payment up. If it turns out to have been paid, that is the outcome.

    \b
    Example:
      oncepay payments cancel order-10042
    """
    _print(_run(url, api_key_file, lambda client: client.cancel(key)), output)


@payments.command()
@click.argument("key")
@click.option("--amount", type=click.IntRange(min=1), help="Minor units; all that is left by default.")
@click.option("--name", default="", help="The refund's own idempotency key: the same again gives back once.")
@url_option
@key_option
@output_option
@handle_errors
def refund(key: str, amount: int | None, name: str, url: str | None, api_key_file: Path | None, output: str) -> None:
    """Give a payment's money back, all that is left or a part of it.

    \b
    Example:
      oncepay payments refund order-10042 --amount 500 --name return-7
    """
    part = {} if amount is None else {"amount": amount}
    _print(_run(url, api_key_file, lambda client: client.refund(key, command=name, **part)), output)


def _item(text: str) -> dict[str, Any]:
    seller, *numbers = text.rsplit(":", 2) if text.count(":") > 1 else text.rsplit(":", 1)
    if not seller or not numbers or not all(number.isdigit() for number in numbers):
        raise click.UsageError(f"an item is SELLER:AMOUNT[:QUANTITY], not {text!r}")
    return {"seller": seller, "amount": int(numbers[0]), **({"quantity": int(numbers[1])} if len(numbers) > 1 else {})}


def _run(url: str | None, api_key_file: Path | None, work: Callable[[Oncepay], Awaitable[T]], aggregator: str | None = None) -> T:
    """Do `work` with a client of the cluster. Raises Refused, Unavailable, or the local cluster's errors."""
    from oncepay.client import Oncepay

    if url is None or api_key_file is None:
        from deploy.local import Cluster

        status = Cluster(home()).status()
        url = url or status.urls.get("router", "")
        aggregator = aggregator or status.urls.get("aggregator", "")
        api_key = status.api_key if api_key_file is None else api_key_file.read_text().strip()
    else:
        api_key = api_key_file.read_text().strip()

    async def run() -> T:
        async with Oncepay(router=url, aggregator=aggregator or "", api_key=api_key, deadline_s=DEADLINE_S) as client:
            return await work(client)

    with client_errors():
        return asyncio.run(run())


def _print(payment: PaymentView, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(msgspec.to_builtins(payment)))
        return
    from rich.console import Console
    from rich.table import Table

    from oncepay.money import format_minor

    def money(amount: int) -> str:
        return format_minor(amount, payment.currency)

    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    rows = [("status", payment.status), ("buyer", payment.buyer), ("amount", money(payment.amount))]
    rows += [("captured", money(payment.amount_captured)), ("refunded", money(payment.amount_refunded))]
    rows += [("platform's fee", money(payment.platform_fee)), ("at Stripe", payment.payment_intent or "nothing yet")]
    rows += [("failure", f"{payment.failure.get('code')}: {payment.failure.get('message', '')}")] if payment.failure else []
    rows += [("created", payment.created_at), ("updated", payment.updated_at), ("version", str(payment.version))]
    rows += [("refund", f"{r['key']}  {r['status']}  {money(r['amount'])}") for r in payment.refunds]
    rows += [("dispute", f"{d['id']}  {d['status']}  {money(d['amount'])}") for d in payment.disputes]
    for name, value in rows:
        table.add_row(name, value)
    console.print(f"[bold]{payment.key}[/bold]", table, sep="\n")
    if payment.entries:
        entries = Table("entry", "account", "debit", "credit")
        for entry in payment.entries:
            for posting in entry["postings"]:
                amount = format_minor(abs(posting["amount"]), entry["currency"])
                entries.add_row(entry["id"], posting["account"], *(("", amount) if posting["amount"] < 0 else (amount, "")))
        console.print(entries)
