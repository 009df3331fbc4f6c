"""A shard's archive of its log: what Postgres calls for each finished segment, and for each that a restore needs.

    python -S archive.py put FOLDER PATH NAME         # archive_command = '… put FOLDER "%p" "%f"'
    python -S archive.py get FOLDER NAME PATH         # restore_command = '… get FOLDER "%f" "%p"'

All nodes of a shard archive into one folder (`archive_mode = always`): a leader that died before it archived a finished
segment leaves no gap, since its standbys have that segment too. A file is there as a whole or not at all, is never replaced,
and is compared when it comes again. Until FOLDER is there nothing is archived: the first backup makes it, and without a base
backup a log is of no use. Once something was archived a file in the data directory says so, and a FOLDER that isn't there is an
error from then on.

`get` exits with 1 when the archive ends there, and with FAILED when nobody knows: Postgres takes every code up to 125 as the end.

Only the standard library is imported: this runs for each 16 MiB of log.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib

LEVEL = 1
GZIP = 16 + zlib.MAX_WBITS
TRAILER_BYTES = 8
SUFFIX = ".gz"
BEGUN = "oncepay_archive_begun"
"""In the data directory, which Postgres calls this in."""
FAILED = 255


def compress(data: bytes) -> bytes:
    """As a gzip file, always the same for the same data."""
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
    return packer.compress(data) + packer.flush()


def trailer(data: bytes) -> bytes:
    """How a gzip file of `data` ends: its CRC and its length (RFC 1952)."""
    return struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def holds(path: str, data: bytes) -> bool:
    """Whether the archived file is one of the same data."""
    with open(path, "rb") as file:
        file.seek(-TRAILER_BYTES, os.SEEK_END)
        return file.read() == trailer(data)


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(folder: str, path: str, name: str) -> int:
    """Archive the file; 0 when the archive has it for good, 1 when it has another one of that name, or is gone."""
    try:
        os.stat(os.path.join(folder, ""))  # of a file that raises too
    except FileNotFoundError:
        if not os.path.exists(BEGUN):
            return 0
        sys.stderr.write(f"the archive {folder} is gone: mount it, or put it back; a backup makes a new one\n")
        return 1
    except OSError as error:  # it may be there: what it can't be seen to have is not archived
        sys.stderr.write(f"the archive {folder} can't be looked at ({error.strerror}): may Postgres' user read and write it?\n")
        return 1
    with open(path, "rb") as source:
        data = source.read()
    kept = os.path.join(folder, name + SUFFIX)
    if not os.path.exists(kept):
        unfinished = os.path.join(folder, f".{name}.{os.uname().nodename}.{os.getpid()}")
        with open(unfinished, "wb") as file:
            file.write(compress(data))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(unfinished, kept)
        except FileExistsError:
            pass  # another node was faster
        finally:
            os.unlink(unfinished)
        sync(folder)
    if holds(kept, data):
        with open(BEGUN, "ab"):
            return 0
    sys.stderr.write(f"the archive {folder} has another {name} already: nothing was replaced\n")
    return 1


def get(folder: str, name: str, path: str) -> int:
    """Fetch the file to `path`; 1 when the archive doesn't have it. Raises OSError, zlib.error."""
    try:
        with open(os.path.join(folder, name + SUFFIX), "rb") as file:
            packed = file.read()
    except FileNotFoundError:
        os.stat(folder)  # raises when the whole archive is gone
        return 1
    with open(path, "wb") as target:
        target.write(zlib.decompress(packed, GZIP))
    return 0


def main() -> int:
    call, *arguments = sys.argv[1:]
    if call not in ("put", "get") or len(arguments) != 3:
        sys.stderr.write("usage: archive.py put FOLDER PATH NAME | get FOLDER NAME PATH\n")
        return 2
    if call == "put":
        return put(*arguments)
    folder, name, _ = arguments
    try:
        return get(*arguments)
    except Exception as error:
        sys.stderr.write(f"{name} can't be fetched from the archive {folder}: {error!r}\n")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
