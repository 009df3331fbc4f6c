"""What `oncepay etcd` says of moves that a restored etcd holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cli.etcd
from cli.common import WRONG
from deploy import etcd_snapshot
from deploy.etcd_snapshot import Snapshot
from deploy.local import Cluster, etcd_restore
from deploy.local.layout import Layout, Memory
from deploy.local.ports import free_base
from oncepay.settings import Settings


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command on a cluster whose etcd holds the moves in `moves`."""
    layout = Layout(tmp_path)
    layout.make()
    layout.remember(Memory(free_base(), ("s0",), ("etcd",)))
    held: list[str] = []

    async def forget(*_: object, **__: object) -> dict[str, Any]:
        return {"retired": 1, "shards": ["s0"], "api_keys": []}

    async def settle(*_: object) -> dict[str, Any]:
        return {"map_version": 3, "map_changed": True, "open_moves": held}

    def restore(
        cluster: Cluster, _: Path, *, prepare: Callable[[Settings], None], settle: Callable[[Settings], None], **__: object
    ) -> Path:
        prepare(cluster.settings)
        settle(cluster.settings)
        return tmp_path / "etcd.before"

    monkeypatch.setattr(cli.etcd, "_forget", forget)
    monkeypatch.setattr(cli.etcd, "_settle", settle)
    monkeypatch.setattr(etcd_snapshot, "look", lambda _: Snapshot(revision=1, keys=1, size_bytes=1))
    monkeypatch.setattr(etcd_restore, "restore_etcd", restore)

    def invoke(*arguments: str, moves: tuple[str, ...] = ()) -> Result:
        held[:] = moves
        return CliRunner().invoke(cli.etcd.etcd, arguments, env={"ONCEPAY_HOME": str(tmp_path)})

    return invoke


@pytest.mark.parametrize("command", [("restore", "file", "--yes"), ("settle",)], ids=lambda command: command[0])
@pytest.mark.parametrize("output", ["text", "json"])
def test_open_moves_are_named(run: Callable[..., Result], command: tuple[str, ...], output: str) -> None:
    found = run(*command, "--output", output, moves=("m1", "m2"))
    assert found.exit_code == WRONG
    assert "these moves are not over: m1, m2" in found.stderr
    if output == "json":
        assert json.loads(found.stdout)["open_moves"] == ["m1", "m2"]

    found = run(*command, "--output", output)
    assert found.exit_code == 0, found.output
    assert "moves" not in found.stderr
