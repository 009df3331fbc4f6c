"""A short campaign, as its command is used: fault after fault on a cluster of its own, verified, with report and history."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.ports import free_base

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_campaign_violates_nothing_and_leaves_a_report_and_a_history(tmp_path: Path) -> None:
    environment = {**os.environ, "ONCEPAY_HOME": str(tmp_path), "ONCEPAY_PORT_BASE": str(free_base())}
    command = [sys.executable, "-m", "cli", "chaos", "campaign", "--minutes", "1.5", "--seed", "3", "--output", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
    result = json.loads(done.stdout)
    assert result["violations"] == []
    assert (done.returncode, result["ok"]) == (0, True)
    assert result["kinds"] == result["faults"] > 1
    history = [json.loads(line) for line in Path(result["history"]).read_text(encoding="utf-8").splitlines()]
    told = {line["key"] for line in history if 200 <= line.get("status", 0) < 300}
    assert len(told) == result["acknowledged"] > 100
    assert [line["kind"] for line in history if line.get("event") == "whole"]
    assert "## Violations\n\nNone." in Path(result["report"]).read_text(encoding="utf-8")
    assert not (tmp_path / "chaos" / "run" / "supervisord.pid").exists()
