"""Backups of a shard: base backups that were verified, beside the archive of its log.

A shard's folder holds `base/<id>/` (`data`, and `backup.json`, which is written last) and `wal/`. A backup whose `backup.json` is
missing was never finished, and is nothing.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from deploy.archive import SUFFIX
from deploy.manifest import Manifest, verify
from oncepay.errors import OncepayError

ROLE = "oncepay_backup"
RECORD = "backup.json"
ARCHIVE_S = 60.0
POLL_S = 0.2
SEGMENT_BYTES = 16 * 2**20

Report = Callable[[str], None]


class BackupFailed(OncepayError):
    """The backup could not be made."""

    slug = "backup-failed"


class NoBackup(OncepayError):
    """There is no such backup."""

    status = 404
    slug = "no-backup"


class Backup(msgspec.Struct, frozen=True):
    """A base backup, verified. Times are UTC, positions in bytes; `ranges` are those that the shard owned."""

    id: str
    shard: str
    incarnation: str
    node: str
    began_at: dt.datetime
    ended_at: dt.datetime
    timeline: int
    start: int
    end: int
    size_bytes: int
    migration: int
    ranges: list[tuple[int, int]]

    @property
    def first_segment(self) -> str:
        """The name of the first segment of the log that a restore needs."""
        return segment_name(self.timeline, self.start)


def segment_name(timeline: int, position: int) -> str:
    """The file that holds `position` (bytes) of the log."""
    number = position // SEGMENT_BYTES
    each = 2**32 // SEGMENT_BYTES
    return f"{timeline:08X}{number // each:08X}{number % each:08X}"


class BackupFolder:
    """Where the backups of one shard are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.wal = folder / "wal"

    def make(self) -> None:
        """Make it; from then on the shard's nodes archive their log."""
        for path in (self.folder, self.base, self.wal):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> list[Backup]:
        """Every finished backup, oldest first."""
        found = []
        for record in sorted(self.base.glob(f"*/{RECORD}")):
            found.append(msgspec.json.decode(record.read_bytes(), type=Backup))
        return found

    def data(self, backup: Backup) -> Path:
        return self.base / backup.id / "data"

    def choose(self, *, id: str = "", to_time: dt.datetime | None = None) -> Backup:
        """The backup of that id, or the newest that had ended by `to_time`. Raises NoBackup."""
        known = self.all()
        if id:
            known = [backup for backup in known if backup.id == id]
        fit = [backup for backup in known if to_time is None or backup.ended_at <= to_time]
        if not fit:
            when = f" that had ended by {to_time.isoformat()}" if to_time else ""
            raise NoBackup(f"{self.folder} holds no backup{f' {id}' if id else ''}{when}")
        return fit[-1]

    def archived(self) -> list[str]:
        """The names of the archived segments, ascending."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.wal.glob(f"{'[0-9A-F]' * 24}{SUFFIX}"))

    def drop_older(self, keep: int) -> list[str]:
        """Delete all but the `keep` newest backups, and the log that only they needed; the ids of those that went."""
        assert keep >= 1
        known = self.all()
        old, kept = known[:-keep], known[-keep:]
        for backup in old:
            (self.base / backup.id / RECORD).unlink()  # from here on it isn't one
            shutil.rmtree(self.base / backup.id)
        if old:
            least = min(backup.first_segment[8:] for backup in kept)
            for name in self.archived():
                if name[8:] < least:
                    (self.wal / (name + SUFFIX)).unlink()
        return [backup.id for backup in old]


class Source(msgspec.Struct, frozen=True):
    """What is backed up, as its leader tells, and the node that it is read from."""

    shard: str
    incarnation: str
    migration: int
    ranges: list[tuple[int, int]]
    node: str
    host: str
    port: int


def take(folder: BackupFolder, source: Source, password: str, bin_dir: Path, report: Report) -> Backup:
    """Copy the node's data directory with the log that makes it whole, verify every file and the log, and record it.

    Raises BackupFailed, with the program's words, or BackupDamaged; nothing that looks like a backup is left then.
    """
    began_at = now()
    id = began_at.strftime("%Y%m%dT%H%M%SZ")
    place = folder.base / id
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        raise BackupFailed(f"{place} is there already: another backup began in the same second") from None
    try:
        report(f"copying {source.node}")
        command = [str(bin_dir / "pg_basebackup"), "-h", source.host, "-p", str(source.port), "-U", ROLE, "-w"]
        command += ["-D", str(place / "data"), "--wal-method=stream", "--checkpoint=fast", "--manifest-checksums=SHA256"]
        command += ["--label", f"oncepay {source.shard} {id}"]
        _run(command, {**os.environ, "PGPASSWORD": password})
        report("verifying it")
        backup = _described(verify(place / "data", bin_dir), id, source, began_at)
        record = place / f"{RECORD}.new"
        record.write_bytes(msgspec.json.format(msgspec.json.encode(backup), indent=2) + b"\n")
        record.rename(place / RECORD)
        return backup
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _described(manifest: Manifest, id: str, source: Source, began_at: dt.datetime) -> Backup:
    last = manifest.wal[-1]
    return Backup(
        id=id,
        shard=source.shard,
        incarnation=source.incarnation,
        node=source.node,
        began_at=began_at,
        ended_at=now(),
        timeline=last.timeline,
        start=position(manifest.wal[0].start),
        end=position(last.end),
        size_bytes=sum(file.size for file in manifest.files),
        migration=source.migration,
        ranges=source.ranges,
    )


def await_archived(folder: BackupFolder, segment: str) -> None:
    """Until the segment is in the archive. Raises BackupFailed after ARCHIVE_S."""
    deadline_s = time.monotonic() + ARCHIVE_S
    while not (folder.wal / (segment + SUFFIX)).exists():
        if time.monotonic() > deadline_s:
            raise BackupFailed(
                f"segment {segment} of the log didn't reach {folder.wal} within {ARCHIVE_S:.0f} s: see the node's log"
            )
        time.sleep(POLL_S)


def position(text: str) -> int:
    """A position as Postgres writes it (`16/B374D848`), in bytes."""
    if not re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", text):
        raise ValueError(f"{text!r} is no position in the log")
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def now() -> dt.datetime:
    """UTC, to the second: a backup's id is made of it."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.strip().splitlines()[-3:] or [f"exit code {done.returncode}"]
        raise BackupFailed(f"{Path(command[0]).name}: {' / '.join(words)}")
