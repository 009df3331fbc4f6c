"""A payment's story: each version, with the event that made it, from the aggregator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

if TYPE_CHECKING:
    from oncepay.client import Oncepay, PaymentView

WAIT_S = 5.0
"""How long the aggregator may take to reach the version that the router shows."""
PAUSE_S = 0.1

Versions = list[dict[str, Any]]


async def read_history(client: Oncepay, key: str) -> tuple[PaymentView, Versions]:
    """The payment as its shard has it, and its versions as far as the aggregator has them."""
    payment = await client.get(key)
    deadline_s = time.monotonic() + WAIT_S
    while True:
        answer = await client.derived(f"/v1/payments/{quote(key, safe='')}/history")
        versions: Versions = answer["versions"]
        if (versions and versions[-1]["version"] >= payment.version) or time.monotonic() > deadline_s:
            return payment, versions
        await asyncio.sleep(PAUSE_S)


def rows(versions: Sequence[dict[str, Any]], current: int) -> list[tuple[str, ...]]:
    """A line for each version from 1 to `current`, also for those that are not known."""
    found: list[tuple[str, ...]] = []
    following = 1
    for version in versions:
        found += _gap(following, version["version"] - 1, "not known: the feed had lost its log")
        lsn = version["lsn"] or "before a rebuild"
        names = (version["status"], version["event"], version["at"], f"{version['shard']} {lsn}", version["actor"])
        found.append((str(version["version"]), *names))
        following = version["version"] + 1
    return found + _gap(following, current, "not there yet")


def _gap(first: int, last: int, why: str) -> list[tuple[str, ...]]:
    if first > last:
        return []
    return [(str(first) if first == last else f"{first}-{last}", "?", why, "", "", "")]


def print_history(versions: Sequence[dict[str, Any]], current: int) -> None:
    """As a table, oldest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "status", "event", "committed", "position", "by")
    for row in rows(versions, current):
        table.add_row(*row)
    Console(highlight=False).print(table)
    if not versions:
        click.echo("The aggregator knows nothing of this payment yet.")
