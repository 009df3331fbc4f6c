"""The wrapper of a shard's node: it starts Patroni and holds the rule that Postgres must not outlive its Patroni.

    python -S -m deploy.node FOLDER TIMEOUT_S COMMAND...

FOLDER holds `data`, the pipe `watchdog` and `patroni.pid`; COMMAND starts Patroni. The wrapper is the watchdog that
Patroni's configuration calls for: a leader's Patroni opens the pipe, names its timeout and beats with every renewal
of its lease. When the beat stops for the timeout, or when Patroni ends in whatever way, all of this node's Postgres
is killed at once. Otherwise a leader without a Patroni could go on acknowledging commits after another was elected.

A wrapper that comes after one that was killed first ends what that one left.

A leader whose disk is nearly full gives way while its Postgres can still stop properly: Patroni doesn't see a full disk, and
would let it lead on while no payment can be written.

A node that was not stopped properly neither leads nor votes until it has replayed its own log (`deploy/replay.py`).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import stat
import sys
import time

from deploy import processes, replay

PR_SET_CHILD_SUBREAPER = 36
STOP_S = 20.0
"""How long a clean stop of Patroni and its Postgres may take before they are killed."""
LEFTOVER_STOP_S = 3.0
"""How long a leftover Patroni gets to hand its lease back before it is killed."""
READ_BYTES = 4096
DISK_LOOK_S = 1.0
LEAVE_BELOW_BYTES = 64 * 1024 * 1024
"""A leader with less room than this, four segments of log, gives way."""
LEAVE_AGAIN_S = 600.0
"""But not again so soon: where all disks are full, leading wouldn't go round and round."""
GAVE_WAY_FILE = "gave-way"
SMALL_DISK_FILE = "small-disk-mib"
"""In the node's folder: the data lie on a memory disk of that many MiB, in a mount namespace. For trying a full disk."""
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000


class Beat:
    """The watchdog's side of the pipe: what Patroni wrote, and until when the next beat must come.

    Patroni writes `Ctimeout=<seconds>\\n` when it starts to lead, `1` with every beat, `V` when it leads no longer.
    """

    __slots__ = ("_rest", "deadline_s", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.deadline_s: float | None = None
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take what was read from the pipe at `now_s` (of a monotonic clock)."""
        data = self._rest + data
        at = 0
        while at < len(data):
            code = data[at : at + 1]
            if code == b"C":
                end = data.find(b"\n", at)
                if end < 0:
                    break
                self._set_timeout(data[at + 1 : end])
                at = end
            at += 1
            self.deadline_s = None if code == b"V" else now_s + self.timeout_s
        self._rest = data[at:]

    def _set_timeout(self, assignment: bytes) -> None:
        name, _, value = assignment.partition(b"=")
        if name == b"timeout" and value.isdigit() and int(value) > 0:
            self.timeout_s = min(self.timeout_s, float(value))


class Wrapper:
    """One node's processes."""

    def __init__(self, folder: str, timeout_s: float, command: list[str]) -> None:
        self.folder = os.path.realpath(folder)
        self.data_dir = os.path.realpath(os.path.join(self.folder, "data"))  # what its Postgres is known by
        self.home = os.environ[processes.CLUSTER_ENV]
        self.name = os.environ[processes.PROCESS_ENV]
        self.command = command
        self.beat = Beat(timeout_s)
        self.hold = replay.Hold(os.path.join(self.folder, "watchdog"), command[-1], self.data_dir, self.say)
        self.patroni = 0
        self.patroni_status: int | None = None
        self.disk_look_s = 0.0
        self.stop_deadline_s: float | None = None
        self.again = False
        """Whether this process ends for another one to take its place."""

    def say(self, text: str) -> None:
        try:
            os.write(2, f"{self.name}: {text}\n".encode())
        except OSError:
            pass  # the reader of our log is gone; the rule holds all the same

    def is_ours(self, pid: int) -> bool:
        return processes.is_postgres_of(pid, self.data_dir) or processes.is_marked(pid, self.home, self.name)

    def kill_all(self) -> None:
        """Kill this node's Postgres, its postmaster first, and whatever else it runs."""
        postmaster = processes.postmaster_pid(self.data_dir)
        if postmaster is not None:
            handle = processes.send(postmaster, signal.SIGKILL, self.is_ours)
            if handle is not None:
                os.close(handle)
        if not processes.end(self.is_ours):
            self.say("some of this node's processes can't be killed")

    def end_leftovers(self) -> None:
        """End what an earlier wrapper of this node left. Its Patroni may hand back its lease, but has little time."""
        left = processes.find(self.is_ours)
        if not left:
            return
        self.say(f"ending {len(left)} processes that were left behind")

        def is_patroni(pid: int) -> bool:
            return "patroni" in processes.command(pid) and self.is_ours(pid)

        if processes.find(is_patroni, candidates=left):
            processes.end(is_patroni, number=signal.SIGTERM, wait_s=LEFTOVER_STOP_S)
        self.kill_all()

    def open_pipe(self) -> int:
        """The watchdog's pipe, held open for reading and writing, so that Patroni never waits to open it."""
        path = os.path.join(self.folder, "watchdog")
        if not (os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)):
            os.mkfifo(path, 0o600)
        owner = os.stat(self.folder)
        os.chown(path, owner.st_uid, owner.st_gid)
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._read(pipe)  # what an earlier Patroni wrote says nothing about this one
        return pipe

    @staticmethod
    def _read(pipe: int) -> bytes:
        data = b""
        while True:
            try:
                part = os.read(pipe, READ_BYTES)
            except BlockingIOError:
                return data
            data += part

    def mount_small_disk(self) -> None:
        """Hide the data behind an empty disk that only this node sees, and that is gone with it. Raises OSError."""
        try:
            with open(os.path.join(self.folder, SMALL_DISK_FILE), encoding="ascii") as file:
                mib = int(file.read())
        except FileNotFoundError:
            return
        os.makedirs(self.data_dir, mode=0o700, exist_ok=True)
        owner = os.stat(self.folder)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"size={mib}m,mode=0700,uid={owner.st_uid},gid={owner.st_gid}".encode()
        if (
            libc.unshare(CLONE_NEWNS)
            or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            or libc.mount(b"tmpfs", self.data_dir.encode(), b"tmpfs", 0, options)
        ):
            raise OSError(ctypes.get_errno(), f"no small disk for {self.name}")
        self.say(f"the data lie on a memory disk of {mib} MiB")

    def is_to_give_way(self, now_s: float) -> bool:
        """Whether this node leads, on a disk that is nearly full, and hasn't given way just before."""
        if self.beat.deadline_s is None or now_s < self.disk_look_s:
            return False
        self.disk_look_s = now_s + DISK_LOOK_S
        marker = os.path.join(self.folder, GAVE_WAY_FILE)
        try:
            disk = os.statvfs(self.data_dir)
            if disk.f_bavail * disk.f_frsize >= LEAVE_BELOW_BYTES or time.time() - os.stat(marker).st_mtime < LEAVE_AGAIN_S:
                return False
            os.utime(marker)  # it was made when there was room
        except OSError:
            return False
        return True

    def make_marker(self) -> None:
        """The file whose time tells when this node last gave way."""
        path = os.path.join(self.folder, GAVE_WAY_FILE)
        try:
            if not os.path.exists(path):
                with open(path, "xb"):
                    pass
                os.utime(path, (0, 0))
        except OSError as error:
            self.say(f"can't make {path}: {error}")

    def start(self) -> None:
        # A backend whose postmaster dies while its commit waits for a standby goes on to read commands from its standard input.
        # There it must find the end, and exit; else it holds the shared memory, and this node's Postgres never starts again.
        no_input = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        self.patroni = os.posix_spawnp(
            self.command[0], self.command, os.environ, file_actions=no_input, setsigdef=[signal.SIGPIPE]
        )
        with open(os.path.join(self.folder, "patroni.pid"), "w", encoding="ascii") as file:
            file.write(f"{self.patroni}\n")

    def reap(self) -> None:
        """Collect children that ended: Patroni, and the postmasters that it starts and lets go."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.patroni:
                self.patroni_status = status

    def run(self) -> int:
        """Start Patroni and watch it until it ends; the exit code of this process."""
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.end_leftovers()
        pipe = self.open_pipe()
        self.make_marker()
        self.mount_small_disk()
        wakeup = self._signals()
        self.hold.begin(time.monotonic())
        self.start()
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        poller.register(wakeup, select.POLLIN)
        while True:
            self.reap()
            now_s = time.monotonic()
            if self.patroni_status is not None:
                return self._patroni_ended()
            if self._is_over(self.beat.deadline_s, now_s):
                # What came in while this process waited for the processor counts.
                self.beat.feed(self._read(pipe), now_s)
            if self._is_over(self.beat.deadline_s, now_s):
                self.say(f"Patroni has not beaten for {self.beat.timeout_s:g} s: killing Postgres")
                self.kill_all()
                return 1
            if self._is_over(self.stop_deadline_s, now_s):
                self.say(f"not stopped within {STOP_S:g} s: killing Patroni and Postgres")
                self.kill_all()
                return 1
            if self.stop_deadline_s is None and self.is_to_give_way(now_s):
                self.say("the disk is nearly full: this leader gives way")
                self._stop()
            self.hold.look(now_s)
            if self.hold.given_up and self.stop_deadline_s is None:
                self.say("Patroni has no watchdog, since it wanted it too early: starting this node again")
                self.again = True
                self._stop()
            for descriptor, _ in poller.poll(self._wait_ms(now_s)):
                if descriptor == pipe:
                    self.beat.feed(self._read(pipe), time.monotonic())
                else:
                    self._on_signals(os.read(wakeup, READ_BYTES))

    @staticmethod
    def _is_over(deadline_s: float | None, now_s: float) -> bool:
        return deadline_s is not None and now_s >= deadline_s

    def _wait_ms(self, now_s: float) -> int | None:
        deadlines = [each for each in (self.beat.deadline_s, self.stop_deadline_s, self.hold.look_s) if each is not None]
        return max(0, int((min(deadlines) - now_s) * 1000) + 1) if deadlines else None

    @staticmethod
    def _signals() -> int:
        """A descriptor on which each signal's number arrives as one byte."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        return reader

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGHUP in numbers:
            os.kill(self.patroni, signal.SIGHUP)
        if (signal.SIGTERM in numbers or signal.SIGINT in numbers) and self.stop_deadline_s is None:
            self._stop()

    def _stop(self) -> None:
        self.stop_deadline_s = time.monotonic() + STOP_S
        os.kill(self.patroni, signal.SIGTERM)

    def _patroni_ended(self) -> int:
        assert self.patroni_status is not None
        self.kill_all()
        self.reap()
        if self.stop_deadline_s is not None:
            return int(self.again)
        self.say(f"Patroni ended (wait status {self.patroni_status}): Postgres was killed")
        return 1


def main() -> int:
    folder, timeout_s, *command = sys.argv[1:]
    if not command:
        sys.stderr.write("usage: python -m deploy.node FOLDER TIMEOUT_S COMMAND...\n")
        return 2
    return Wrapper(folder, float(timeout_s), command).run()


if __name__ == "__main__":
    sys.exit(main())
