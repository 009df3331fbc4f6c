"""Backups of a shard: base backups that were verified, beside the archive of its log.

A shard's folder holds `base/<id>/` (`data`, and `backup.json`, which is written last) and `wal/`. A backup whose `backup.json` is
missing was never finished, and is nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import gzip
import os
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from deploy.archive import SUFFIX
from deploy.manifest import Manifest, verify
from deploy.os_user import OsUser
from oncepay.errors import OncepayError

ROLE = "oncepay_backup"
RECORD = "backup.json"
ARCHIVE_S = 60.0
POLL_S = 0.2
HISTORY = ".history"
SEGMENT_BYTES = 16 * 2**20
SEGMENTS_EACH = 2**32 // SEGMENT_BYTES

Report = Callable[[str], None]


class BackupFailed(OncepayError):
    """The backup could not be made."""

    slug = "backup-failed"


class NoBackup(OncepayError):
    """There is no such backup."""

    status = 404
    slug = "no-backup"


class OtherShard(OncepayError):
    """The folder has backups of another shard."""

    status = 409
    slug = "other-shard"


class LogMissing(OncepayError):
    """The archive of the log has a hole."""

    status = 409
    slug = "log-missing"


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
    return numbered(timeline, position // SEGMENT_BYTES)


def numbered(timeline: int, number: int) -> str:
    """The name of a timeline's segment, counted from the log's beginning."""
    return f"{timeline:08X}{number // SEGMENTS_EACH:08X}{number % SEGMENTS_EACH:08X}"


def number_of(segment: str) -> int:
    return int(segment[8:16], 16) * SEGMENTS_EACH + int(segment[16:], 16)


class BackupFolder:
    """Where the backups of one shard are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.wal = folder / "wal"

    def make(self, user: OsUser | None = None) -> None:
        """Make it; from then on the shard's nodes archive their log, as `user`, who gets the folders."""
        for path in (self.folder, self.base, self.wal):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if user is not None:
                user.own(path)

    def all(self) -> list[Backup]:
        """Every finished backup, oldest first."""
        found = []
        for record in sorted(self.base.glob(f"*/{RECORD}")):
            found.append(msgspec.json.decode(record.read_bytes(), type=Backup))
        return found

    def check(self, shard: str) -> None:
        """Raises OtherShard when the folder has backups of another shard: what is the newest, or old, would be told of both."""
        others = sorted({backup.shard for backup in self.all()} - {shard})
        if others:
            raise OtherShard(
                f"{self.folder} has backups of {', '.join(others)}, and is asked for {shard}'s: each shard needs its own folder"
            )

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

    def missing(self, backup: Backup) -> list[str]:
        """What a restore of the backup needs, lies before the last archived segment, and isn't in the archive; ascending.

        The log up to the backup's end is in the backup itself. From there on each segment is needed of the newest timeline that
        had begun by then: what an older one goes on with never counted. Without a timeline's history Postgres doesn't know it.
        """
        archived = self.archived()
        histories = {path.name.removesuffix(HISTORY + SUFFIX) for path in self.wal.glob(f"{'[0-9A-F]' * 8}{HISTORY}{SUFFIX}")}
        newest = max(int(name[:8], 16) for name in [*archived, *histories, f"{backup.timeline:08X}"])
        needed = [f"{timeline:08X}" for timeline in range(backup.timeline + 1, newest + 1)]
        if unknown := [name + HISTORY for name in needed if name not in histories]:
            return unknown
        first = backup.end // SEGMENT_BYTES
        begins = self._begins(newest) if needed else []
        begins = [(timeline, number) for timeline, number in begins if timeline > backup.timeline]
        last = max(map(number_of, archived), default=first)
        wanted = []
        for number in range(first, last + 1):
            timeline = max((timeline for timeline, begin in begins if begin <= number), default=backup.timeline)
            wanted.append(numbered(timeline, number))
        there = set(archived)
        while wanted and wanted[-1] not in there:
            wanted.pop()
        return [name for name in wanted if name not in there]

    def _begins(self, timeline: int) -> list[tuple[int, int]]:
        """Of the timeline and those that it came from, each with the number of its first segment, but for the very first."""
        text = gzip.decompress((self.wal / f"{timeline:08X}{HISTORY}{SUFFIX}").read_bytes()).decode()
        lines = [line.split("\t") for line in text.splitlines() if line.strip() and not line.startswith("#")]
        switches = [position(line[1]) // SEGMENT_BYTES for line in lines]
        return list(zip([int(line[0]) for line in lines[1:]] + [timeline], switches, strict=True))

    def check_log(self, backup: Backup) -> None:
        """Raises LogMissing, naming what is missing between the backup and the last archived segment."""
        if missing := self.missing(backup):
            raise LogMissing(f"{self.wal} lacks {spoken(missing)}: backup {backup.id} can't be restored to a moment after that")

    def drop_unfinished(self) -> None:
        """Delete what backups have left that were never finished, but for those that somebody works on."""
        for place in self.base.iterdir():
            if (place / RECORD).exists():
                continue
            with contextlib.suppress(BlockingIOError, FileNotFoundError), working_on(place):
                shutil.rmtree(place, ignore_errors=True)

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


@contextmanager
def working_on(folder: Path, *, wait: bool = False) -> Iterator[int]:
    """The folder, open, is this process' own, and that of programs that get the descriptor. Raises BlockingIOError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


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

    Raises BackupFailed, with the program's words, or BackupDamaged; nothing is left then. It belongs into the main thread, where
    a signal interrupts it.
    """
    began_at = now()
    id = began_at.strftime("%Y%m%dT%H%M%SZ")
    place = folder.base / id
    with ExitStack() as stack:
        with working_on(folder.base, wait=True):
            folder.drop_unfinished()
            try:
                place.mkdir(mode=0o700)
            except FileExistsError:
                raise BackupFailed(f"{place} is there already: another backup began in the same second") from None
            kept = stack.enter_context(working_on(place))
        try:
            report(f"copying {source.node}")
            command = [str(bin_dir / "pg_basebackup"), "-h", source.host, "-p", str(source.port), "-U", ROLE, "-w"]
            command += ["-D", str(place / "data"), "--wal-method=stream", "--checkpoint=fast", "--manifest-checksums=SHA256"]
            command += ["--label", f"oncepay {source.shard} {id}"]
            _run(command, {**os.environ, "PGPASSWORD": password}, kept)
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


async def await_archived(
    folder: BackupFolder, segment: str, trouble: Callable[[], Awaitable[str]], since: Backup | None = None
) -> None:
    """Until the segment is in the archive, and all of the log `since` that backup, which another node may still bring.

    `trouble` asks the leader's archiver, which compares: a file of that name alone may be another shard's. Raises BackupFailed or
    LogMissing after ARCHIVE_S.
    """
    deadline_s = time.monotonic() + ARCHIVE_S
    while True:
        there = (folder.wal / (segment + SUFFIX)).exists()
        words = await trouble()
        if there and not words and (since is None or not folder.missing(since)):
            return
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(POLL_S)
    if there and not words and since is not None:
        folder.check_log(since)
    why = words or "it isn't there"
    raise BackupFailed(
        f"segment {segment} of the log didn't reach {folder.wal} within {ARCHIVE_S:.0f} s: {why}; see the node's log"
    )


def spoken(missing: Sequence[str]) -> str:
    """What is missing from the archive, in a few words."""
    return missing[0] if len(missing) == 1 else f"{len(missing)} segments from {missing[0]} to {missing[-1]}"


def position(text: str) -> int:
    """A position as Postgres writes it (`16/B374D848`), in bytes."""
    if not re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", text):
        raise ValueError(f"{text!r} is no position in the log")
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def now() -> dt.datetime:
    """UTC, to the second: a backup's id is made of it."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def _run(command: Sequence[str], environment: dict[str, str], kept: int) -> None:
    """Run it with the descriptor; when the caller is interrupted it is killed. Raises BackupFailed."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, pass_fds=(kept,)
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-3:] or [f"exit code {done.returncode}"]
        raise BackupFailed(f"{Path(command[0]).name}: {' / '.join(words)}")
