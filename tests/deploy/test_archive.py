"""The archive of a log: whole files, never replaced, compared when they come again; and verified base backups."""

from __future__ import annotations

import datetime as dt
import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deploy.backup
from deploy import archive, restore
from deploy.archive import compress, get, holds, put
from deploy.backup import SEGMENT_BYTES, Backup, BackupFailed, BackupFolder, LogMissing, await_archived, position, segment_name
from deploy.furthest import LogEnd, furthest


@given(st.binary(max_size=4096))
def test_what_is_archived_is_a_gzip_file_that_knows_its_content(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("one") / "file"
    path.write_bytes(compress(data))
    assert gzip.decompress(compress(data)) == data
    assert holds(str(path), data)
    assert not holds(str(path), data + b"x")


@pytest.fixture(autouse=True)
def data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Postgres calls it in its data directory."""
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(data)
    return data


def test_put_and_get(tmp_path: Path) -> None:
    folder, source, target = tmp_path / "wal", tmp_path / "segment", tmp_path / "fetched"
    source.write_bytes(b"log" * 1000)
    assert put(str(folder), str(source), "0001") == 0, "without the folder nothing is archived"
    folder.mkdir()
    assert get(str(folder), "0001", str(target)) == 1
    assert put(str(folder), str(source), "0001") == 0
    assert put(str(folder), str(source), "0001") == 0, "a standby brings the same again"
    assert get(str(folder), "0001", str(target)) == 0
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["0001.gz"]


def test_another_file_of_that_name_is_refused_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    folder = tmp_path / "wal"
    folder.mkdir()
    assert put(str(folder), str(tmp_path / "one"), "0001") == 0
    assert put(str(folder), str(tmp_path / "two"), "0001") == 1
    assert "nothing was replaced" in capsys.readouterr().err
    assert gzip.decompress((folder / "0001.gz").read_bytes()) == b"one"


def test_a_folder_that_was_there_and_is_gone_is_no_beginning(
    tmp_path: Path, data_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Postgres would recycle segments that nobody has."""
    folder, source = tmp_path / "wal", tmp_path / "segment"
    source.write_bytes(b"log")
    assert put(str(folder), str(source), "0001") == 0
    assert list(data_directory.iterdir()) == [], "nothing was archived yet"
    folder.mkdir()
    assert put(str(folder), str(source), "0001") == 0
    folder.rename(tmp_path / "elsewhere")
    assert put(str(folder), str(source), "0002") == 1
    assert f"{folder} is gone" in capsys.readouterr().err
    folder.mkdir()
    assert put(str(folder), str(source), "0002") == 0, "a backup has made it anew"
    assert [path.name for path in data_directory.iterdir()] == [archive.BEGUN]
    assert archive.BEGUN in restore.LEFT_BY_THE_SOURCE, "a restored shard has no archive yet"


def no_folder(folder: Path) -> None:
    folder.rmdir()


def no_content(folder: Path) -> None:
    (folder / "0001.gz").touch()


def half(folder: Path) -> None:
    (folder / "0001.gz").write_bytes(compress(os.urandom(1000))[:500])


def no_file(folder: Path) -> None:
    (folder / "0001.gz").mkdir()


def test_an_archive_that_can_not_be_looked_into_is_not_one_that_nobody_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Postgres lets go of what it takes for archived. (Root may look everywhere.)"""
    segment, look = tmp_path / "segment", os.stat

    def refused(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if os.path.normpath(path) == str(tmp_path / "wal"):
            raise PermissionError(13, "Permission denied")
        return look(path, *arguments, **options)

    segment.write_bytes(b"x")
    assert put(str(tmp_path / "none"), str(segment), "0" * 24) == 0
    (tmp_path / "wal").mkdir()
    monkeypatch.setattr(os, "stat", refused)
    assert put(str(tmp_path / "wal"), str(segment), "0" * 24) == 1
    assert "may Postgres' user read and write it?" in capsys.readouterr().err
    assert put(str(segment), str(segment), "0" * 24) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [no_folder, no_content, half, no_file])
def test_an_archive_that_cannot_be_read_does_not_end_there(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Postgres takes exit codes up to 125 as the end of the archive, and promotes what it has."""
    folder = tmp_path / "wal"
    folder.mkdir()
    command = [sys.executable, "-S", archive.__file__, "get", str(folder), "0001", str(tmp_path / "fetched")]
    assert subprocess.run(command, check=False).returncode == 1
    damage(folder)
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 255
    assert str(folder).encode() in done.stderr


def test_two_nodes_that_archive_the_same_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    source, folder = tmp_path / "segment", tmp_path / "wal"
    source.write_bytes(b"log" * 1_000_000)
    folder.mkdir()
    command = [sys.executable, "-S", archive.__file__, "put", str(folder), str(source), "0001"]
    running = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert [path.name for path in folder.iterdir()] == ["0001.gz"]
    assert gzip.decompress((folder / "0001.gz").read_bytes()) == source.read_bytes()


@pytest.mark.parametrize("arguments", [["put"], ["move", "a", "b", "c"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-S", archive.__file__, *arguments], capture_output=True, check=False)
    assert (done.returncode, done.stderr[:5]) == (2, b"usage")


def test_positions_and_segments() -> None:
    assert position("16/B374D848") == 0x16B374D848
    assert segment_name(2, position("0/6000028")) == "000000020000000000000006"
    assert segment_name(1, position("16/B374D848")) == "0000000100000016000000B3"
    with pytest.raises(ValueError, match="no position"):
        position("16:B3")


def record(folder: BackupFolder, timeline: int, end: int) -> Backup:
    """A finished backup that ends at that position."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    made = Backup("b", "s0", "i", "s0-1", moment, moment, timeline, end - SEGMENT_BYTES, end, 1, 1, [])
    (folder.base / made.id).mkdir()
    (folder.base / made.id / "backup.json").write_bytes(msgspec.json.encode(made))
    return made


def archive_of(tmp_path: Path, *names: str, **histories: str) -> BackupFolder:
    """Segments as `timeline-number`; a timeline's history as `t2="1 0/5000100"`."""
    folder = BackupFolder(tmp_path / "s0")
    folder.make()
    for name in names:
        timeline, _, number = name.partition("-")
        (folder.wal / f"{int(timeline):08X}{0:08X}{int(number):08X}.gz").touch()
    for name, content in histories.items():
        lines = "".join(f"{line.replace(' ', chr(9))}\tno recovery target specified\n" for line in content.split(","))
        (folder.wal / f"{int(name[1:]):08X}.history.gz").write_bytes(compress(lines.encode()))
    return folder


@pytest.mark.parametrize(
    ("names", "histories", "missing"),
    [
        ([], {}, []),
        (["1-3", "1-4", "1-5"], {}, []),
        (["1-0", "1-1", "1-4", "1-5"], {}, ["1-3"]),
        (["1-3", "1-6"], {}, ["1-4", "1-5"]),
        (["1-1"], {}, []),
        # A new leader begins within segment 5, and has all of it; the old one's own is no help.
        (["1-3", "1-4", "2-5", "2-6"], {"t2": "1 0/5000100"}, []),
        (["1-3", "1-4", "1-5", "2-6"], {"t2": "1 0/5000100"}, ["2-5"]),
        (["1-3", "1-4", "1-5", "1-6", "1-9"], {"t2": "1 0/5000100"}, []),
        (["1-3", "2-5"], {"t2": "1 0/5000100"}, ["1-4"]),
        (["1-3", "1-4", "2-5"], {"t2": "1 0/5000000"}, []),
        (["1-3", "1-4", "2-5", "3-6"], {"t2": "1 0/5000100", "t3": "1 0/5000100,2 0/6000100"}, []),
        (["1-3", "1-4", "2-5", "3-7"], {"t2": "1 0/5000100", "t3": "1 0/5000100,2 0/6000100"}, ["3-6"]),
        (["1-3", "1-4", "2-5"], {}, ["00000002.history"]),
        (["1-3", "1-4", "3-5"], {"t3": "1 0/5000100,2 0/5000200"}, ["00000002.history"]),
    ],
)
def test_what_a_restore_would_miss_is_named(
    tmp_path: Path, names: list[str], histories: dict[str, str], missing: list[str]
) -> None:
    folder = archive_of(tmp_path, *names, **histories)
    (folder.wal / "000000010000000000000005.partial.gz").touch()
    (folder.wal / "000000010000000000000003.00000028.backup.gz").touch()
    found = folder.missing(record(folder, 1, 3 * SEGMENT_BYTES + 100))
    wanted = [name.split("-") if "-" in name else name for name in missing]
    assert found == [f"{int(x[0]):08X}{0:08X}{int(x[1]):08X}" if isinstance(x, list) else x for x in wanted]


async def archived() -> str:
    return ""


async def test_a_hole_ends_the_wait_for_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.backup, "ARCHIVE_S", 0.3)
    folder = archive_of(tmp_path, "1-3", "1-5")
    made = record(folder, 1, 3 * SEGMENT_BYTES + 100)
    await await_archived(folder, segment_name(1, 5 * SEGMENT_BYTES), archived)
    with pytest.raises(LogMissing, match="000000010000000000000004"):
        await await_archived(folder, segment_name(1, 5 * SEGMENT_BYTES), archived, made)
    (folder.wal / f"{segment_name(1, 4 * SEGMENT_BYTES)}.gz").touch()
    await await_archived(folder, segment_name(1, 5 * SEGMENT_BYTES), archived, made)
    with pytest.raises(BackupFailed, match="didn't reach"):
        await await_archived(folder, segment_name(1, 6 * SEGMENT_BYTES), archived, made)


ends = st.dictionaries(
    st.sampled_from(["s0-1", "s0-2", "s0-3"]), st.builds(LogEnd, st.integers(1, 3), st.integers(0, 9)), min_size=1
)


@given(ends)
def test_nobody_has_more_log_than_the_furthest(found: dict[str, LogEnd]) -> None:
    first = furthest(found)
    assert all(end <= found[first] for end in found.values())
    assert first == min(node for node, end in found.items() if end == found[first])
