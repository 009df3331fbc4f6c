"""`oncepay shards backup | backups | restore` where the archive isn't what it should be. No cluster is needed."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.shards import shards
from deploy.backup import SEGMENT_BYTES, Backup, BackupFolder, segment_name
from deploy.local import Cluster

MOMENT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(shards, [*arguments, "--output", "json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def put_backup(place: BackupFolder, id: str, end: int) -> None:
    made = Backup(id, "s0", "i", "s0-1", MOMENT, MOMENT, 1, end, end, 1, 1, [])
    (place.base / id).mkdir()
    (place.base / id / "backup.json").write_bytes(msgspec.json.encode(made))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackupFolder:
    """Backups in segments 3 and 7; segment 5 is missing."""
    monkeypatch.setenv("ONCEPAY_HOME", str(tmp_path))
    made = BackupFolder(tmp_path / "backups" / "s0")
    made.make()
    put_backup(made, "b1", 3 * SEGMENT_BYTES)
    put_backup(made, "b2", 7 * SEGMENT_BYTES)
    for number in (3, 4, 6, 7, 8):
        (made.wal / f"{segment_name(1, number * SEGMENT_BYTES)}.gz").touch()
    return made


def test_a_hole_in_the_archive_is_shown_and_not_restored_over(place: BackupFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "check_addition", lambda *_: None)
    missing = segment_name(1, 5 * SEGMENT_BYTES)
    assert run("backups", "s0")["missing"] == [missing]
    assert missing in CliRunner().invoke(shards, ["backups", "s0"]).output
    restore = ("restore", "s0", "--as", "s9", "--dry-run")
    error = run(*restore, "--backup", "b1", code=WRONG)["error"]
    assert error["type"] == "log-missing"
    assert missing in error["detail"]
    assert run(*restore)["backup"] == "b2"
    assert run(*restore, "--backup", "b1", "--to-time", "2026-01-01T01:00:00Z")["backup"] == "b1"
