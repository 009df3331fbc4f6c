"""`oncepay shards backup | backups | restore` where the archive isn't what it should be. No cluster is needed."""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from click.testing import CliRunner

from cli.common import INTERRUPTED, WRONG
from cli.shards import shards
from deploy import processes
from deploy.backup import SEGMENT_BYTES, Backup, BackupFailed, BackupFolder, Source, await_archived, segment_name
from deploy.local import Cluster, WrongHome
from deploy.local.layout import Memory
from deploy.os_user import OsUser
from oncepay.settings import Settings
from shard.store.facts import ArchiveFacts

T = TypeVar("T")
MOMENT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(shards, [*arguments, "--output", "json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def put_backup(place: BackupFolder, id: str, end: int, shard: str = "s0") -> None:
    made = Backup(id, shard, "i", "s0-1", MOMENT, MOMENT, 1, end, end, 1, 1, [])
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


def test_a_name_whose_backups_are_kept_is_not_given_again(place: BackupFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(place.folder.parent.parent)
    monkeypatch.setattr(Cluster, "supervisor", lambda *_: None)
    cluster.layout.remember(Memory(20_000, ("s1",)))
    with pytest.raises(WrongHome, match="restore s0 --folder"):
        cluster.check_addition("s0")
    assert cluster.check_addition("s2").shards == ("s1",)
    place.folder.rename(place.folder.with_name("s0.old"))
    assert cluster.check_addition("s0").shards == ("s1",)


@pytest.mark.parametrize(
    ("last", "failing", "words"),
    [
        ("000000010000000000000008", False, ""),
        ("000000020000000000000009", False, ""),
        ("000000010000000000000008.00000028.backup", None, ""),
        ("00000002.history", False, ""),
        ("000000010000000000000007", False, "has not archived 000000010000000000000008"),
        (None, None, "has not archived 000000010000000000000008"),
        ("000000010000000000000007", True, "fails at X"),
        ("000000010000000000000009", True, "fails at X"),
    ],
)
def test_the_archiver_itself_has_to_say_that_a_segment_is_archived(last: str | None, failing: bool | None, words: str) -> None:
    """A file of that name may be another shard's."""
    told = ArchiveFacts("always", 1, last, None, 1, failing, "X")
    trouble = told.trouble("000000010000000000000008")
    assert words in trouble if words else trouble == ""


SLOW_COPY = """#!/bin/sh
while [ "$1" != -D ]; do shift; done
mkdir -p "$2"
echo $$ > "$2/pid"
exec sleep 60
"""

TAKE = """
import asyncio, importlib, sys
from pathlib import Path
import deploy.programs
from deploy.backup import Source

module = importlib.import_module("cli.shards.backups")

async def source(*_):
    return Source("s0", "i", 1, [], "s0-1", "127.0.0.1", 1), True

module._source = source
module.with_etcd = lambda settings, work: asyncio.run(work(None))
module.settings_of = lambda _: importlib.import_module("oncepay.settings").Settings()
deploy.programs.postgres_bin = lambda: Path(sys.argv[1])
module.backup(["s0"])
"""


@pytest.fixture
def copying(place: BackupFolder, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A backup whose copy takes long, and the folder that it goes to."""
    program = tmp_path / "pg_basebackup"
    program.write_text(SLOW_COPY)
    program.chmod(0o700)
    process = subprocess.Popen([sys.executable, "-c", TAKE, str(tmp_path)], stderr=subprocess.PIPE)
    try:
        yield process, Path(until(lambda: next(iter(place.base.glob("*/data/pid")), None)))
    finally:
        process.kill()
        process.communicate()


def until(check: Callable[[], T | None]) -> T:
    deadline_s = time.monotonic() + 20
    while not (found := check()):
        assert time.monotonic() < deadline_s, "it never came to hold"
        time.sleep(0.05)
    return found


def pid_in(path: Path) -> int:
    return int(until(path.read_text))


def test_a_backup_that_is_terminated_takes_back_what_it_began(
    place: BackupFolder, copying: tuple[subprocess.Popen[bytes], Path]
) -> None:
    process, path = copying
    copier = pid_in(path)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert not processes.is_alive(copier)
    assert sorted(found.name for found in place.base.iterdir()) == ["b1", "b2"]


def test_the_next_backup_removes_unfinished_ones_that_nobody_works_on(
    place: BackupFolder, copying: tuple[subprocess.Popen[bytes], Path]
) -> None:
    process, path = copying
    copier, running = pid_in(path), path.parent.parent
    (place.base / "b0" / "data").mkdir(parents=True)
    place.drop_unfinished()
    assert sorted(found.name for found in place.base.iterdir()) == sorted([running.name, "b1", "b2"])
    process.kill()
    process.wait()
    place.drop_unfinished()
    assert running.exists(), "the program that copies has outlived the command"
    os.kill(copier, signal.SIGKILL)
    until(lambda: not processes.is_alive(copier) or None)
    place.drop_unfinished()
    assert sorted(found.name for found in place.base.iterdir()) == ["b1", "b2"]


def test_a_backup_without_an_archive_says_so_and_is_not_all_well(
    place: BackupFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("cli.shards.backups")
    told = Source("s0", "i", 1, [], "s0-1", "127.0.0.1", 1), False
    monkeypatch.setattr(module, "settings_of", lambda _: Settings())
    monkeypatch.setattr(module, "with_etcd", lambda *_: told)
    monkeypatch.setattr("deploy.backup.take", lambda *_: place.choose(id="b2"))
    done = run("backup", "s0", "--keep", "1", code=WRONG)
    assert (done["backup"]["id"], done["archived_to"], done["dropped"]) == ("b2", None, ["b1"])
    result = CliRunner().invoke(shards, ["backup", "s0"])
    assert result.exit_code == WRONG
    assert "archive_mode is off" in result.stderr
    assert "backup b2" in result.stdout


@pytest.fixture
def taken(place: BackupFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A shard s0 that archives no log; the names of shards whose backups were taken. Taking one changes nothing."""
    module, found = importlib.import_module("cli.shards.backups"), list[str]()

    def take(_: BackupFolder, source: Source, *__: object) -> Backup:
        found.append(source.shard)
        return place.choose()

    monkeypatch.setattr(module, "settings_of", lambda _: Settings())
    monkeypatch.setattr(module, "with_etcd", lambda *_: (Source("s0", "i", 1, [], "s0-1", "127.0.0.1", 1), False))
    monkeypatch.setattr("deploy.backup.take", take)
    return found


def test_backups_of_two_shards_in_one_folder_are_not_taken_for_one_anothers(
    place: BackupFolder, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "check_addition", lambda *_: None)
    put_backup(place, "b3", 8 * SEGMENT_BYTES, "s1")
    for command in (("backup", "s0", "--keep", "1"), ("restore", "s0", "--as", "s9", "--dry-run")):
        error = run(*command, "--folder", str(place.folder), code=WRONG)["error"]
        assert error["type"] == "other-shard"
        assert "backups of s1, and is asked for s0's" in error["detail"]
    assert taken == []
    assert [backup.id for backup in place.all()] == ["b1", "b2", "b3"]


def test_another_shards_backup_that_comes_meanwhile_drops_nothing(
    place: BackupFolder, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: object) -> Backup:
        put_backup(place, "b3", 8 * SEGMENT_BYTES, "s1")
        return place.choose(id="b2")

    monkeypatch.setattr("deploy.backup.take", take)
    assert run("backup", "s0", "--keep", "1", code=WRONG)["error"]["type"] == "other-shard"
    assert [backup.id for backup in place.all()] == ["b1", "b2", "b3"]


@pytest.mark.parametrize("own", [True, False], ids=["its nodes' folder", "another one"])
def test_the_nodes_own_the_folder_that_they_archive_into(
    place: BackupFolder, taken: list[str], monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Root makes it, for itself alone; Postgres may run as a dedicated user."""
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr("deploy.os_user.for_postgres", lambda: OsUser(("setpriv",), 4711, 4712))
    monkeypatch.setattr(os, "chown", lambda *arguments: given.append(arguments))
    run("backup", "s0", *(() if own else ("--folder", str(place.folder))), code=WRONG)
    assert taken == ["s0"]
    assert given == ([(path, 4711, 4712) for path in (place.folder, place.base, place.wal)] if own else [])


async def test_a_backup_fails_while_the_archiver_does(place: BackupFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.backup.ARCHIVE_S", 0.3)
    answers = ["the archiver fails", ""]

    async def trouble() -> str:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    segment = segment_name(1, 8 * SEGMENT_BYTES)
    await await_archived(place, segment, trouble)
    answers[:] = ["the archiver fails"]
    with pytest.raises(BackupFailed, match="the archiver fails"):
        await await_archived(place, segment, trouble)
