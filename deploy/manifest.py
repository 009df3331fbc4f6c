"""Verifying a base backup against its manifest, as PostgreSQL's documentation describes it ("Backup Manifest Format").

`pg_verifybackup` does the same. It isn't used because the one in the package for development doesn't start (decision 0060), and a
check that is made in one place only is a check that is tested.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from oncepay.errors import OncepayError

MANIFEST = "backup_manifest"
UNLISTED = frozenset({MANIFEST, "postgresql.auto.conf", "recovery.signal", "standby.signal"})
"""What a backup may have beside the files in its manifest; so may `pg_wal`, whose records are read instead."""
MARK = b'"Manifest-Checksum":'
WORDS_MAX = 5


class BackupDamaged(OncepayError):
    """The backup is not what was backed up."""

    slug = "backup-damaged"


class WalRange(msgspec.Struct, rename={"timeline": "Timeline", "start": "Start-LSN", "end": "End-LSN"}):
    """The log that makes the backup whole; positions as Postgres writes them."""

    timeline: int
    start: str
    end: str


class File(
    msgspec.Struct,
    rename={"path": "Path", "encoded": "Encoded-Path", "size": "Size", "algorithm": "Checksum-Algorithm", "checksum": "Checksum"},
):
    """A file; the path is given in hexadecimal where it isn't UTF-8."""

    size: int
    path: str = ""
    encoded: str = ""
    algorithm: str = "NONE"
    checksum: str = ""

    @property
    def name(self) -> str:
        return self.path or os.fsdecode(bytes.fromhex(self.encoded))


class Manifest(msgspec.Struct, rename={"files": "Files", "wal": "WAL-Ranges", "checksum": "Manifest-Checksum"}):
    """What a backup has to hold."""

    files: list[File]
    wal: list[WalRange]
    checksum: str


def read(data: Path) -> Manifest:
    """The manifest of the backup in `data`, whose own checksum holds. Raises BackupDamaged."""
    try:
        text = (data / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(text, type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise BackupDamaged(f"{data / MANIFEST} can't be read: {error}") from error
    if hashlib.sha256(text[: text.rindex(MARK)]).hexdigest() != manifest.checksum:
        raise BackupDamaged(f"{data / MANIFEST} was changed: its own checksum differs")
    return manifest


def verify(data: Path, bin_dir: Path) -> Manifest:
    """Read every file, and the log that belongs to the backup. Raises BackupDamaged, naming what differs."""
    manifest = read(data)
    wrong = list(_differences(data, manifest))
    if wrong:
        more = f", and {len(wrong) - WORDS_MAX} more" if len(wrong) > WORDS_MAX else ""
        raise BackupDamaged(f"{data}: {', '.join(wrong[:WORDS_MAX])}{more}")
    for part in manifest.wal:
        command = [str(bin_dir / "pg_waldump"), "--quiet", f"--path={data / 'pg_wal'}", f"--timeline={part.timeline}"]
        command += [f"--start={part.start}", f"--end={part.end}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BackupDamaged(f"{data}: the log from {part.start} to {part.end} can't be read: {done.stderr.strip()}")
    return manifest


def _differences(data: Path, manifest: Manifest) -> Iterator[str]:
    listed = {file.name for file in manifest.files}
    for file in manifest.files:
        path = data / file.name
        if not path.is_file():
            yield f"{file.name} is missing"
        elif path.stat().st_size != file.size:
            yield f"{file.name} has {path.stat().st_size} bytes instead of {file.size}"
        elif file.algorithm != "SHA256":
            yield f"{file.name} has no SHA256 checksum"
        elif _digest(path) != file.checksum:
            yield f"{file.name} has another content"
    for folder, _, names in os.walk(data):
        for name in names:
            found = os.path.relpath(os.path.join(folder, name), data)
            if found not in listed and found not in UNLISTED and not found.startswith("pg_wal" + os.sep):
                yield f"{found} is not in the manifest"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
