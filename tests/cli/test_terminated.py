"""A command that has a cluster of its own stops it when it is terminated, as by `timeout`, which sends the signal twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from deploy.local import Cluster


@pytest.fixture
def handled() -> Iterator[None]:
    """The signal doesn't end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("command", [["demo"], ["chaos", "campaign"]])
def test_the_cluster_is_stopped(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []

    def start(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("went on")

    def down(_: Cluster, *, purge: bool = False) -> None:
        if not purge:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append("purged" if purge else "stopped")

    monkeypatch.setattr("cli.demo.start", start)
    monkeypatch.setattr(Cluster, "down", down)
    result = CliRunner().invoke(main, command, env={"ONCEPAY_HOME": str(tmp_path)})
    assert done == ["purged", "stopped"]
    assert "interrupted" in result.output
