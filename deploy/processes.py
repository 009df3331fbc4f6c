"""Finding and ending the processes of a local cluster through /proc.

Every process of a cluster is started with ONCEPAY_CLUSTER=<absolute home> and ONCEPAY_PROCESS=<its name> in its
environment. Postgres' children overwrite theirs, but all of Postgres has the data directory as working directory. So
whatever was killed, and in whatever order, what is left can be told from other people's processes.

Only the standard library is imported here, and little of it: each node's wrapper holds this in memory.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable

CLUSTER_ENV = "ONCEPAY_CLUSTER"
PROCESS_ENV = "ONCEPAY_PROCESS"

Match = Callable[[int], bool]


def pids() -> list[int]:
    """All process ids that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    stat = _read(f"/proc/{pid}/stat")
    return bool(stat) and stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def parent(pid: int) -> int:
    """The parent's pid; 0 when the process is gone."""
    stat = _read(f"/proc/{pid}/stat")
    return int(stat.rpartition(b")")[2].split()[1]) if stat else 0


def command(pid: int) -> list[str]:
    """The command line; empty for a process that is gone or a zombie."""
    return [part.decode(errors="replace") for part in _read(f"/proc/{pid}/cmdline").rstrip(b"\0").split(b"\0") if part]


def working_dir(pid: int) -> str:
    """The working directory, also when it was deleted meanwhile; empty when it can't be read."""
    try:
        return os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
    except OSError:
        return ""


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that the process was started with; None when it has none, or can't be read."""
    start = f"{name}=".encode()
    for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(start):
            return os.fsdecode(entry[len(start) :])
    return None


def is_marked(pid: int, home: str, process: str | None = None) -> bool:
    """Whether the process was started for the cluster in `home` (and as `process`)."""
    if variable(pid, CLUSTER_ENV) != home:
        return False
    return process is None or variable(pid, PROCESS_ENV) == process


def is_postgres_of(pid: int, data_dir: str) -> bool:
    """Whether the process belongs to the Postgres of that data directory (postmaster or child)."""
    if working_dir(pid) != data_dir:
        return False
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("postgres")
    except OSError:
        return False


def postmaster_pid(data_dir: str) -> int | None:
    """The pid of the postmaster that runs on that data directory, None when none does."""
    first = _read(os.path.join(data_dir, "postmaster.pid")).split(b"\n", 1)[0].strip()
    if not first.isdigit():
        return None
    pid = int(first)
    return pid if is_alive(pid) and is_postgres_of(pid, data_dir) else None


def lock_holders(path: str | os.PathLike[str]) -> list[int]:
    """The processes of which one holds a lock (flock) on the file, as far as this user may see them."""
    try:
        file = os.stat(path)
    except OSError:
        return []
    found = []
    for line in _read("/proc/locks").decode(errors="replace").splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(file.st_ino) and words[4].isdigit():
            found.append(int(words[4]))
    return [pid for pid in found if is_alive(pid)]


def find(match: Match, *, candidates: Iterable[int] | None = None) -> list[int]:
    """The live processes that match, without this one."""
    own = os.getpid()
    return [pid for pid in (pids() if candidates is None else candidates) if pid != own and is_alive(pid) and match(pid)]


def send(pid: int, number: signal.Signals, match: Match) -> int | None:
    """Signal `pid` if it matches, without the race that its pid was taken over by another process.

    Returns an open pidfd (the caller closes it), or None when the process is gone or no longer matches.
    """
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return None
    if not match(pid):
        os.close(handle)
        return None
    try:
        signal.pidfd_send_signal(handle, number)
    except OSError:
        os.close(handle)
        return None
    return handle


def wait_for_end(handles: Iterable[int], wait_s: float | None) -> bool:
    """Wait until all processes behind the pidfds have ended, then close these; False when the time ran out."""
    left = set(handles)
    opened = tuple(left)
    poller = select.poll()
    for handle in left:
        poller.register(handle, select.POLLIN)
    deadline = None if wait_s is None else time.monotonic() + wait_s
    while left:
        remaining_s = None if deadline is None else deadline - time.monotonic()
        if remaining_s is not None and remaining_s <= 0:
            break
        for handle, _ in poller.poll(None if remaining_s is None else remaining_s * 1000):
            poller.unregister(handle)
            left.discard(handle)
    for handle in opened:
        os.close(handle)
    return not left


def end(match: Match, *, number: signal.Signals = signal.SIGKILL, wait_s: float = 5.0) -> bool:
    """Signal every process that matches until none is left; False when some are still there after `wait_s`.

    New ones that were forked meanwhile are found in the next round.
    """
    deadline = time.monotonic() + wait_s
    while found := find(match):
        handles = [handle for pid in found if (handle := send(pid, number, match)) is not None]
        if not handles and any(is_alive(pid) and match(pid) for pid in found):
            return False  # not ours to signal
        remaining_s = deadline - time.monotonic()
        if not wait_for_end(handles, max(remaining_s, 0.0)):
            return False
    return True
