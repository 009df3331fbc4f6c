"""`oncepay verify`: what it prints, its exit codes, and a whole cluster that it finds sound."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from cli.common import UNREACHABLE
from cli.verify import as_json, show, target_of, verify
from deploy.local import Cluster
from deploy.local.status import ShardStatus, Status
from loadtest.checker import Difference, Report, Unreachable

REPORT = Report(
    {"keys": 3, "payments": 3, "succeeded": 2, "failed": 1, "orphans": 1, "awaited": 2},
    open=1,
    differences=[Difference(3, "pi_1 is succeeded at Stripe and no row names it", "key[1]", "look it up")],
    seconds=1.234,
)


def shown(report: Report, width: int = 120) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width), as_json(report))
    return out.getvalue()


def test_the_object_that_others_script_against() -> None:
    found = as_json(REPORT)
    assert set(found) >= {"ok", "checked", "open", "differences"}
    assert (found["ok"], found["open"]) == (False, 1)
    assert found["differences"][0] == {
        "promise": 3,
        "what": "pi_1 is succeeded at Stripe and no row names it",
        "key": "key[1]",
        "advice": "look it up",
    }
    json.dumps(found)


@pytest.mark.parametrize("width", [80, 160])
def test_a_difference_is_shown_with_its_key_and_what_to_do(width: int) -> None:
    text = shown(REPORT, width)
    assert "✗ 1" in text
    assert text.count("✓") == 5
    assert "key[1]" in text
    assert "look it up" in text
    assert "1 difference:" in text
    assert "2 things that may still come" in text


def test_a_sound_cluster_is_shown_as_verified() -> None:
    text = shown(Report({"payments": 7, "succeeded": 7}, 0, []))
    assert "✓ verified: 7 payments (7 succeeded), 0 open" in text
    assert "✗" not in text


def status(dsn: str | None) -> Status:
    shard = ShardStatus("s0", [(0, 65535)], "s0-a", [], dsn)
    urls = {"stripe": "http://127.0.0.1:1", "aggregator": "http://127.0.0.1:2"}
    return Status(urls=urls, api_key="ok", processes=[], shards=[shard], aggregator_dsn="a", etcd=[])


def test_where_the_parts_are() -> None:
    target = target_of(status("postgresql://x"), wait_s=5)
    assert (target.shards[0].name, target.shards[0].dsn, target.shards[0].ranges) == ("s0", "postgresql://x", ((0, 65535),))
    assert (target.aggregator_dsn, target.api_key, target.wait_s) == ("a", "ok", 5)
    with pytest.raises(Unreachable, match="s0 has no leader"):
        target_of(status(None))


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEPAY_HOME", str(tmp_path))
    result = CliRunner().invoke(verify, ["--output", "json"])
    assert result.exit_code == UNREACHABLE
    assert json.loads(result.stdout)["ok"] is False


@pytest.mark.cluster
def test_a_whole_cluster_is_sound(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))
    result = CliRunner().invoke(verify, ["--output", "json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"], found["differences"]) == (0, True, [])
    assert found["checked"]["shards"] == 2
    assert "✓ verified" in CliRunner().invoke(verify, []).stdout
