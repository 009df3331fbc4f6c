"""`oncepay payouts`, as a person calls it."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from cli import payouts
from cli.main import main
from deploy.local import Cluster
from oncepay.errors import Unavailable
from oncepay.tipalti_client import TipaltiClient


@pytest.fixture
def runner(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))
    monkeypatch.delenv("ONCEPAY_PORT_BASE", raising=False)
    return CliRunner()


def owed_seller(cluster: Cluster) -> str:
    """A seller that is owed 9.00 USD, with a payee at Tipalti that can be paid."""
    status, name = cluster.status(), f"cli-{os.urandom(6).hex()}"

    async def make() -> None:
        headers = {"Authorization": f"Bearer {status.api_key}", "Idempotency-Key": name}
        async with aiohttp.ClientSession(headers=headers) as http, TipaltiClient(cluster.settings.tipalti) as tipalti:
            await tipalti.create_payee(name)
            await http.post(f"{status.urls['tipalti']}/_control/payee", json={"payee": name, "payable": True})
            seller = {"payee": name, "currency": "usd"}
            async with http.put(f"{status.urls['router']}/v1/sellers/{name}", json=seller) as answer:
                assert answer.status == 201
            cart = {
                "buyer": "b",
                "currency": "usd",
                "items": [{"seller": name, "amount": 1000}],
                "payment_method": "pm_card_visa",
            }
            async with http.post(f"{status.urls['router']}/v1/payments", json=cart) as answer:
                assert (await answer.json())["status"] == "succeeded"

    asyncio.run(make())
    return name


@pytest.mark.cluster
def test_a_run_is_tried_made_listed_and_exported(cluster: Cluster, runner: CliRunner, tmp_path: Path) -> None:
    seller = owed_seller(cluster)
    key = f"payout:{seller}:usd:1"
    tried = runner.invoke(main, ["payouts", "run", "--dry-run", "--seller", seller])
    assert tried.exit_code == 0, tried.output
    assert "9.00 USD would be paid in 1 payouts" in tried.stdout
    file = tmp_path / "run.csv"
    made = runner.invoke(main, ["payouts", "run", "--seller", seller, "--csv", str(file), "--output", "json"])
    assert made.exit_code == 0, made.output
    assert [payout["key"] for payout in json.loads(made.stdout)["payouts"]] == [key]
    (line,) = csv.DictReader(io.StringIO(file.read_text()))
    assert (line["key"], line["amount_minor"], line["amount"], line["payee"]) == (key, "900", "9.00", seller)
    assert "nothing to pay" in runner.invoke(main, ["payouts", "run", "--seller", seller]).stdout
    shown = runner.invoke(main, ["payouts", "show", key])
    assert f"seller:{seller}:payable" in shown.stdout
    listed = json.loads(runner.invoke(main, ["payouts", "list", "--seller", seller, "--output", "json"]).stdout)
    assert [payout["key"] for payout in listed["payouts"]] == [key]
    refused = runner.invoke(main, ["payouts", "decline", key, "--output", "json"])
    if refused.exit_code:  # Tipalti has it, as nearly always by now
        assert json.loads(refused.stdout)["error"]["type"] == "refused"
    assert runner.invoke(main, ["payouts", "approve", key]).exit_code == 1
    tried = runner.invoke(main, ["payouts", "decline", key, "--dry-run", "--output", "json"])
    assert (tried.exit_code, json.loads(tried.stdout)["dry_run"]) == (0, True)


@pytest.mark.cluster
def test_what_isnt_there_is_said(runner: CliRunner) -> None:
    shown = runner.invoke(main, ["payouts", "show", "payout:nobody:usd:1"])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "no payout payout:nobody:usd:1" in shown.stderr


class Listing(payouts.Api):
    """Lists a run as the feed brings it: so many of its payouts each time."""

    def __init__(self, *listed: int) -> None:
        self.listed = list(listed)

    async def call(self, method: str, path: str, body: object = None, query: dict[str, str] | None = None) -> dict[str, Any]:
        count = self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]
        return {"payouts": [{"key": f"k{n}"} for n in range(count)], "cursor": None}


async def test_a_large_run_is_exported_when_all_of_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payouts, "LISTED_PAUSE_S", 0.0)
    assert len(await payouts._all_of(Listing(3, 3, 5), "r", 5)) == 5
    monkeypatch.setattr(payouts, "LISTED_S", 0.0)
    with pytest.raises(Unavailable, match="only 3 are listed"):
        await payouts._all_of(Listing(3), "r", 5)


def test_csv_and_json_cannot_share_standard_output() -> None:
    result = CliRunner().invoke(main, ["payouts", "run", "--csv", "-", "--output", "json"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("amount", "currency", "shown"), [(1, "usd", "0.01"), (123456, "usd", "1234.56"), (7, "jpy", "7"), (1005, "kwd", "1.005")]
)
def test_amounts_as_spreadsheets_read_them(amount: int, currency: str, shown: str) -> None:
    assert payouts._plain(amount, currency) == shown


def test_a_text_that_a_spreadsheet_would_run_is_kept_from_it() -> None:
    assert payouts._cell("=1+1") == "'=1+1"
    assert payouts._cell("plain") == "plain"
    assert payouts._cell(None) == ""
