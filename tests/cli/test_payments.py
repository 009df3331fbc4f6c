"""`oncepay payments` on the whole cluster, as a person calls it."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from cli.main import main
from deploy.local import Cluster


@pytest.fixture
def runner(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))
    monkeypatch.delenv("ONCEPAY_PORT_BASE", raising=False)
    return CliRunner()


@pytest.mark.cluster
def test_a_payment_is_made_shown_listed_and_given_back(runner: CliRunner) -> None:
    key, buyer = f"cli-{os.urandom(6).hex()}", f"cli-{os.urandom(6).hex()}"
    pay = ["payments", "pay", key, "--buyer", buyer, "--item", "records-4:1499:2", "--card", "pm_card_visa"]
    made = runner.invoke(main, pay)
    assert made.exit_code == 0, made.output
    assert "29.98 USD" in made.stdout
    again = json.loads(runner.invoke(main, [*pay, "--output", "json"]).stdout)
    assert (again["status"], again["replayed"]) == ("succeeded", True)
    given = json.loads(runner.invoke(main, ["payments", "refund", key, "--amount", "500", "--output", "json"]).stdout)
    assert given["amount_refunded"] == 500
    shown = runner.invoke(main, ["payments", "show", key])
    assert "stripe:clearing" in shown.stdout
    story = json.loads(runner.invoke(main, ["payments", "show", key, "--history", "--output", "json"]).stdout)
    assert [each["version"] for each in story["history"]] == list(range(1, story["version"] + 1))
    assert all(each["lsn"] and each["actor"].startswith(("router-", "worker-")) for each in story["history"])
    assert story["history"][0]["event"].startswith("accepted")
    assert "position" in runner.invoke(main, ["payments", "show", key, "--history"]).stdout
    listed = json.loads(runner.invoke(main, ["payments", "list", "--buyer", buyer, "--output", "json"]).stdout)
    assert [payment["key"] for payment in listed["payments"]] == [key]


@pytest.mark.cluster
def test_what_is_refused_is_said(runner: CliRunner) -> None:
    shown = runner.invoke(main, ["payments", "show", "no-such-payment"])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "no payment no-such-payment" in shown.stderr
    pay = ["payments", "pay", f"cli-{os.urandom(6).hex()}", "--buyer", "b", "--item", "records-4:10"]
    refused = runner.invoke(main, pay)
    assert refused.exit_code == 1
    assert "items[0].amount" in refused.stderr


@pytest.mark.parametrize("item", ["records-4", "records-4:ten", ":100", "records-4:1:x"])
def test_an_item_that_cannot_be_read_is_wrong_usage(item: str) -> None:
    result = CliRunner().invoke(main, ["payments", "pay", "k", "--buyer", "b", "--item", item])
    assert result.exit_code == 2
    assert "SELLER:AMOUNT" in result.stderr
