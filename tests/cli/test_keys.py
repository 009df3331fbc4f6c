"""`oncepay keys` against a real key service and a real etcd."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.common import UNREACHABLE, WRONG
from cli.keys import keys
from keygen import upkeep
from keygen.pool import FREE_BLOCKS
from oncepay.keys import ISSUED_CHARACTERS, ISSUED_PREFIX, slot
from tests.etcd_fixture import EtcdCluster, etcd_cluster, free_ports
from tests.keygen.harness import Keygen

__all__ = ["etcd_cluster"]


@pytest.fixture
def keygen(tmp_path: Path, etcd_cluster: EtcdCluster) -> Iterator[Keygen]:
    with Keygen(tmp_path, etcd_cluster.settings(), "keygen-1") as process:
        yield process.wait()


def run(*args: str, code: int = 0) -> str:
    """What the command prints on standard output."""
    result = CliRunner().invoke(keys, args)
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.mark.cluster
def test_issue_and_pool(keygen: Keygen) -> None:
    lines = run("issue", "--count", "3", "--url", keygen.url).splitlines()
    assert len(set(lines)) == 3
    assert {len(line) for line in lines} == {ISSUED_CHARACTERS}
    assert len(json.loads(run("issue", "--url", keygen.url, "--output", "json"))["keys"]) == 1
    state = json.loads(run("pool", "--url", keygen.url, "--output", "json"))
    assert state["blocks_held"] == 1
    assert "1 held" in run("pool", "--url", keygen.url)


@pytest.mark.cluster
def test_keys_of_a_range_of_slots(keygen: Keygen) -> None:
    lines = run("issue", "--count", "20", "--slots", "1000-20000", "--url", keygen.url).split()
    assert len(set(lines)) == 20
    assert all(1000 <= slot(key) <= 20000 for key in lines)


@pytest.mark.parametrize("slots", ["", "5", "9-3", "0-65536", "a-b", "1-2-3"])
def test_slots_that_can_t_be(slots: str) -> None:
    result = CliRunner().invoke(keys, ["issue", "--slots", slots, "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert "FIRST-LAST" in result.output


@pytest.mark.cluster
def test_a_new_secret_in_two_steps(keygen: Keygen, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(*more: str, code: int = 0) -> dict[str, object]:
        found: dict[str, object] = json.loads(run("rotate", "--config", str(keygen.config), "--output", "json", *more, code=code))
        return found

    assert rotate("--dry-run")["step"] == "added"
    assert rotate()["number"] == 2
    assert "just now" in str(rotate(code=WRONG))
    monkeypatch.setattr(upkeep, "KNOWN_AFTER_S", 0.0)
    assert rotate()["current"] == 2
    deadline = time.monotonic() + 5
    while secret_number(keygen.issue(1000)[-1]) != 2:
        assert time.monotonic() < deadline


def secret_number(key: str) -> int:
    """The number of the secret that an issued key was made with."""
    return base64.urlsafe_b64decode(key.removeprefix(ISSUED_PREFIX))[16]


@pytest.mark.cluster
def test_retired_blocks_are_never_used_again(tmp_path: Path, keygen: Keygen, etcd_cluster: EtcdCluster) -> None:
    before = keygen.issue(1000)
    config = str(keygen.config)
    deadline = time.monotonic() + 5
    while (held := keygen.pool())["blocks_free"] < FREE_BLOCKS:
        assert time.monotonic() < deadline
    assert json.loads(run("retire", "--config", config, "--dry-run", "--output", "json")) == {"retired": 3, "dry_run": True}
    keygen.stop()
    assert json.loads(run("retire", "--config", config, "--yes", "--output", "json")) == {"retired": 3, "dry_run": False}
    with Keygen(tmp_path, keygen.etcd, "keygen-1") as again:
        again.wait()
        assert again.pool()["blocks_held"] == held["blocks_held"]
        assert not set(before) & set(again.issue(10_000))


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert json.loads(run("issue", "--url", url, "--output", "json", code=UNREACHABLE))["ok"] is False


@pytest.mark.parametrize("count", ["0", "10001", "x"])
def test_a_count_that_can_t_be(count: str) -> None:
    run("issue", "--count", count, code=2)


@pytest.mark.parametrize("command", ["issue", "pool", "rotate", "retire"])
def test_help_shows_an_example(command: str) -> None:
    assert "Example" in run(command, "--help")
