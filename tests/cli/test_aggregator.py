"""`oncepay aggregator`: how far the derived data is, and what a rebuild would do."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from click.testing import CliRunner

from cli.aggregator import _show, aggregator
from deploy.local import Cluster


@pytest.fixture
def home(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))


def run(*args: str) -> Any:
    result = CliRunner().invoke(aggregator, [*args, "--output", "json"])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


@pytest.mark.cluster
def test_the_status_of_a_cluster(cluster: Cluster, home: None) -> None:
    names = {shard.name for shard in cluster.status().shards}
    found, until_s = run("status"), time.monotonic() + 60
    while {feed["shard"] for feed in found["feeds"]} != names and time.monotonic() < until_s:
        time.sleep(0.5)  # a young cluster's shard has sent nothing yet
        found = run("status")
    assert {feed["shard"] for feed in found["feeds"]} == names
    assert all(feed["behind_bytes"] is not None for feed in found["feeds"])
    assert set(found["rows"]) == {"entries", "payments", "seller_postings"}
    assert found["audit"]["differences"] == []


@pytest.mark.cluster
def test_a_dry_run_names_who_would_rebuild(cluster: Cluster, home: None) -> None:
    found = run("rebuild", "--dry-run")
    assert [shard["shard"] for shard in found["shards"]] == [shard.name for shard in cluster.status().shards]
    assert all(shard["worker"].startswith(f"worker-{shard['shard']}-") for shard in found["shards"])


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    feed = {"shard": "s0", "position": "0/1", "applied_at": "2026-11-25T00:00:00Z"}
    _show(
        {
            "feeds": [{**feed, "behind_bytes": 4096}, {**feed, "shard": "s1", "behind_bytes": None}],
            "rows": {"entries": 1234},
            "audit": {"ended_at": "2026-11-25T00:00:00+00:00", "entries": 400, "differences": ["the sums of seller ann"]},
            "reconciled_at": "2026-11-25T04:00:00Z",
            "differences": 2,
        }
    )
    text = capsys.readouterr().out
    for part in (
        "4,096 bytes behind",
        "s1: at 0/1, its shard can't be read",
        "✗ the sums of seller ann",
        "1,234 entries",
        "2 differences",
    ):
        assert part in text
