"""`oncepay reconcile` on a whole cluster: what no payment caused is booked, once, and the books agree."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from click.testing import CliRunner

from cli.reconcile import reconcile
from cli.reconcile import show as show_result
from deploy.local import Cluster


@pytest.fixture
def home(cluster: Cluster) -> Iterator[None]:
    before = os.environ.get("ONCEPAY_HOME")
    os.environ["ONCEPAY_HOME"] = str(cluster.home)
    yield
    os.environ.pop("ONCEPAY_HOME")
    if before is not None:
        os.environ["ONCEPAY_HOME"] = before


def run(*args: str) -> dict[str, Any]:
    result = CliRunner().invoke(reconcile, [*args, "--output", "json"])
    assert result.exit_code in (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.cluster
def test_a_period_that_has_not_ended_is_refused_in_a_line(cluster: Cluster, home: None) -> None:
    result = CliRunner().invoke(reconcile, ["--to", "2999-01-01"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("oncepay: invalid-field")
    assert last.endswith("ends in the future")


@pytest.mark.cluster
async def test_what_no_payment_caused_is_booked_once(cluster: Cluster, home: None, tmp_path: Path) -> None:
    status = cluster.status()
    headers = {"Authorization": "Bearer sk_test_books"}
    async with aiohttp.ClientSession(status.urls["stripe"], headers=headers) as stripe:

        async def post(path: str, **body: Any) -> Any:
            control = path.startswith("/_control")
            async with stripe.post(path, json=body if control else None, data=None if control else body) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        posted = [
            await post("/_control/balance_transactions", type="topup", amount=90_000),
            await post("/_control/balance_transactions", type="adjustment", amount=-250, fee=15),
            await post("/_control/balance_transactions", type="stripe_fee", amount=-1200),
        ]
        payout = await post("/v1/payouts", amount="5000", currency="usd")
        canceled = await post(f"/v1/payouts/{payout['id']}/cancel")
    ours = {item["id"] for item in posted} | {payout["balance_transaction"], canceled["failure_balance_transaction"]}

    csv_file = tmp_path / "differences.csv"
    found = await asyncio.to_thread(run, "--csv", str(csv_file))
    assert not [row for row in found["differences"] if row["transaction"] in ours or row["source"] == payout["id"]]
    assert found["checked"]["booked"] >= len(ours)
    assert csv_file.read_text().startswith("kind,transaction,key,")
    again = await asyncio.to_thread(run)
    assert not [row for row in again["differences"] if row["transaction"] in ours]

    held = await asyncpg.connect(status.aggregator_dsn)
    rows = await held.fetch(
        "select source, kind, accounts, amounts from oncepay.entries where source = any ($1) order by kind", list(ours)
    )
    await held.close()
    sums: dict[str, int] = {}
    for row in rows:
        for account, amount in zip(row["accounts"], row["amounts"], strict=True):
            sums[account] = sums.get(account, 0) + amount
    assert sums == {"stripe:clearing": 90_000 - 265 - 1200, "stripe:other": -90_000 + 250 + 1200, "stripe:fees": 15, "bank": 0}
    assert len(rows) == 6


def test_a_dry_run_asks_nobody() -> None:
    assert run("--from", "2026-10-01", "--to", "2026-10-31", "--dry-run") == {
        "from": "2026-10-01", "to": "2026-10-31", "dry_run": True,
    }  # fmt: skip
    backwards = CliRunner().invoke(reconcile, ["--from", "2026-10-02", "--to", "2026-10-01"])
    assert backwards.exit_code == 2


def test_a_difference_is_shown_with_its_cause_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    difference = {
        "kind": "net_differs", "transaction": "txn_1", "key": "k", "entry": None, "source": "ch_1", "currency": "usd",
        "expected_minor": 970, "actual_minor": 1000, "detail": "", "cause": "why", "advice": "do this",
    }  # fmt: skip
    result = {"ok": False, "from": "2026-10-01", "to": str(dt.date(2026, 10, 2)), "checked": {"read": 3}}
    show_result({**result, "differences": [difference]})
    text = capsys.readouterr().out
    for part in ("net_differs txn_1 of k: 970 usd expected, 1000 found", "why", "do this", "✗ 1 differences", "3 read"):
        assert part in text
