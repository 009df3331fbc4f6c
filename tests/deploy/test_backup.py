"""Base backups of a real Postgres: verified whole, and whatever is changed in one afterwards is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from deploy import manifest, os_user, restore
from deploy.archive import put
from deploy.backup import BackupFailed, BackupFolder, NoBackup, OtherShard, Source, segment_name, take
from deploy.furthest import log_end
from deploy.manifest import BackupDamaged, verify
from deploy.programs import postgres_bin
from tests.postgres_fixture import PostgresServer

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer(parameters={"max_wal_senders": "4"}) as made:
        execute(made, "create role oncepay_backup login replication", "create table held (n integer)")
        yield made


@pytest.fixture(scope="module")
def folder(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> BackupFolder:
    """With one backup in it."""
    made = BackupFolder(tmp_path_factory.mktemp("backups") / "s0")
    made.make()
    take(made, source(server.port), "", postgres_bin(), lambda _: None)
    return made


def execute(server: PostgresServer, *statements: str) -> None:
    connection = psycopg2.connect(server.dsn())
    connection.autocommit = True
    for statement in statements:
        connection.cursor().execute(statement)
    connection.close()


def source(port: int) -> Source:
    return Source("s0", "i", 8, [(0, 65_535)], "s0-1", "127.0.0.1", port)


def test_a_backup_is_described_and_whole(folder: BackupFolder) -> None:
    [backup] = folder.all()
    assert (backup.shard, backup.node, backup.timeline) == ("s0", "s0-1", 1)
    assert backup.start < backup.end
    assert backup.first_segment.startswith("00000001")
    assert folder.choose() == folder.choose(id=backup.id) == folder.choose(to_time=backup.ended_at) == backup
    with pytest.raises(NoBackup, match="ended by"):
        folder.choose(to_time=backup.began_at.replace(year=2000))
    verify(folder.data(backup), postgres_bin())


def change(data: Path) -> str:
    path = data / "global" / "pg_control"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "global/pg_control has another content"


def shorten(data: Path) -> str:
    os.truncate(data / "PG_VERSION", 1)
    return "PG_VERSION has 1 bytes"


def remove(data: Path) -> str:
    (data / "backup_label").unlink()
    return "backup_label is missing"


def add(data: Path) -> str:
    (data / "base" / "9").write_text("x")
    return "base/9 is not in the manifest"


def change_manifest(data: Path) -> str:
    path = data / manifest.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"Size": 3', b'"Size": 2', 1))
    return "its own checksum differs"


def lose_log(data: Path) -> str:
    for path in (data / "pg_wal").glob("0*"):
        path.unlink()
    return "can't be read"


@pytest.mark.parametrize("damage", [change, shorten, remove, add, change_manifest, lose_log])
def test_damage_is_named(folder: BackupFolder, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder.data(folder.all()[0]), data)
    verify(data, postgres_bin())
    words = damage(data)
    with pytest.raises(BackupDamaged, match=words):
        verify(data, postgres_bin())


def test_what_could_not_be_copied_leaves_no_backup(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path / "s0")
    folder.make()
    with pytest.raises(BackupFailed, match="pg_basebackup"):
        take(folder, source(1), "", postgres_bin(), lambda _: None)
    assert folder.all() == []
    assert list(folder.base.iterdir()) == []


def test_older_backups_go_with_the_log_that_only_they_need(folder: BackupFolder, tmp_path: Path) -> None:
    kept = BackupFolder(tmp_path / "s0")
    kept.make()
    template = json.loads((folder.base / folder.all()[0].id / "backup.json").read_text())
    for number in range(1, 5):
        (kept.base / f"b{number}" / "data").mkdir(parents=True)
        record = {**template, "id": f"b{number}", "start": number * 32 * 2**20}
        (kept.base / f"b{number}" / "backup.json").write_text(json.dumps(record))
    for number in range(10):
        (kept.wal / f"{1:08X}{0:08X}{number:08X}.gz").write_text("")
    (kept.wal / "00000002.history.gz").write_text("")
    assert kept.drop_older(2) == ["b1", "b2"]
    assert [backup.id for backup in kept.all()] == ["b3", "b4"]
    assert [int(name[16:], 16) for name in kept.archived()] == [6, 7, 8, 9]
    assert (kept.wal / "00000002.history.gz").exists()
    assert kept.drop_older(2) == []


def test_a_node_that_got_more_log_is_further(server: PostgresServer) -> None:
    before = log_end(server.data_dir, postgres_bin())
    execute(server, "insert into held select generate_series(1, 1000)", "checkpoint")
    after = log_end(server.data_dir, postgres_bin())
    assert after > before
    execute(server, "select pg_switch_wal()", "insert into held values (1)")
    assert log_end(server.data_dir, postgres_bin()) > after


def test_a_backup_of_a_leader_is_restored_as_far_as_the_log_goes(
    server: PostgresServer, folder: BackupFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: its control file says that it is in production before recovery has begun."""
    [backup] = folder.all()
    execute(server, "create table later as select generate_series(1, 200000) n", "select pg_switch_wal()", "create table last ()")
    wal = tmp_path / "wal"
    wal.mkdir()
    monkeypatch.chdir(tmp_path)  # where `put` leaves its mark
    current = segment_name(backup.timeline, log_end(server.data_dir, postgres_bin())[1])
    for path in sorted((server.data_dir / "pg_wal").glob("0*")):
        if len(path.name) == 24 and backup.first_segment <= path.name < current:
            assert put(str(wal), str(path), path.name) == 0
    plan = {
        "backup": str(folder.data(backup)), "archive": str(wal), "to_time": "", "database": "postgres", "user": "postgres",
        "bin_dir": str(postgres_bin()), "sql": "create table made_anew (n integer); insert into made_anew values (7)",
    }  # fmt: skip
    data, file = tmp_path / "data", tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    command = [
        *os_user.for_postgres().prefix,
        sys.executable,
        "-S",
        restore.__file__,
        str(file),
        "--scope=s9",
        f"--datadir={data}",
    ]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert not (data / "recovery.signal").exists()
    control = subprocess.run([postgres_bin() / "pg_controldata", data], capture_output=True, check=True, text=True)
    assert "shut down" in control.stdout
    assert "TimeLineID:       2" in control.stdout, "it was promoted"
    single = [*os_user.for_postgres().prefix, str(postgres_bin() / "postgres"), "--single", "-D", str(data), "postgres"]
    asked = "select n from made_anew\nselect count(*) from later\n"
    told = subprocess.run(single, input=asked, capture_output=True, check=True, text=True).stdout
    assert 'n = "7"' in told
    assert 'count = "200000"' in told


def test_a_folder_is_one_shards(folder: BackupFolder) -> None:
    folder.check("s0")
    with pytest.raises(OtherShard, match=r"backups of s0.*asked for s1's"):
        folder.check("s1")
