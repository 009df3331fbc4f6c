"""What `oncepay etcd` says of moves that a restored etcd holds."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from http.server import BaseHTTPRequestHandler, HTTPServer
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
from keygen import upkeep
from oncepay.etcd.types import KeyValue
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


class Registered:
    """An etcd in which a shard has one node, whose Patroni has this address."""

    def __init__(self, api_url: str) -> None:
        self.kvs = {"shards/s0": "{}", "patroni/s0/members/s0-1": json.dumps({"api_url": api_url, "role": "primary"})}
        self.deleted: list[str] = []

    async def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        return [KeyValue(key, value.encode(), 1) for key, value in self.kvs.items() if key.startswith(prefix)], 1

    async def delete_prefix(self, prefix: str) -> int:
        self.deleted.append(prefix)
        return 1


@pytest.mark.parametrize("alive", [True, False], ids=["a node runs", "all are stopped"])
def test_nobody_is_forgotten_while_a_node_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    class Patroni(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Patroni)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if not alive:
        server.shutdown()
        server.server_close()
    etcd = Registered(f"http://127.0.0.1:{server.server_address[1]}/patroni")

    def with_etcd(_: Settings, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run(work(etcd))

    async def retire_all(*_: object, **__: object) -> int:
        etcd.deleted.append("blocks")
        return 1

    monkeypatch.setattr(cli.etcd, "with_etcd", with_etcd)
    monkeypatch.setattr(upkeep, "retire_all", retire_all)
    monkeypatch.setattr(cli.etcd, "settings_of", lambda _: Settings())
    env = {"ONCEPAY_HOME": str(tmp_path)}
    try:
        found = CliRunner().invoke(cli.etcd.etcd, ["forget", "--output", "json"], env=env, input="n\n")
        assert found.exit_code == WRONG
        assert etcd.deleted == []
        assert ("still-running" in found.output) is alive
        found = CliRunner().invoke(cli.etcd.etcd, ["forget", "--yes", "--output", "json"], env=env)
        assert (found.exit_code, bool(etcd.deleted)) == ((WRONG, False) if alive else (0, True)), found.output
    finally:
        server.shutdown() if alive else None
        server.server_close()
