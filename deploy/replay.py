"""A node that has not replayed its own log yet neither leads nor votes.

After a power cut of a whole shard a standby answers as soon as its data are consistent, long before it has replayed what it had
flushed and acknowledged. Patroni then takes how far it has replayed for how far its log goes: a node that lacks the last
acknowledged commits could be elected with its vote. So the watchdog's pipe has another name from before Patroni starts until
the log is replayed to the end, or a leader is followed: a Patroni that must have a watchdog and finds none takes no part in
elections.

A node that led isn't concerned: its Patroni has it replay everything before it answers. Nor may it be held: such a Patroni may
still own the leader's lease, would try the watchdog for it, and never again after it found none.

Without the packages of the virtual environment: the wrapper of a node uses it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable

SEGMENT = re.compile(r"[0-9A-F]{24}")
LOOK_S = 0.5
ANSWER_S = 1.0
HELD = ".held"
LED = ("shut down", "in production", "shutting down", "in crash recovery")
"""The states of a Postgres that led: nothing is left to be replayed, or Patroni has it done by a single-user Postgres first."""


def position(text: str) -> int:
    """A position as Postgres writes it (`16/B374D848`), in bytes."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def log_end(data_dir: str, bin_dir: str) -> tuple[int, int] | None:
    """Where the log of a stopped node ends, whether or not it was replayed: its newest timeline, and where its last whole record
    begins (bytes). None when it holds no log that can be read."""
    folder = os.path.join(data_dir, "pg_wal")
    segments = sorted((name for name in os.listdir(folder) if SEGMENT.fullmatch(name)), reverse=True)
    for segment in segments:  # segments that are kept for later use hold old pages, and show no record
        done = subprocess.run(
            [os.path.join(bin_dir, "pg_waldump"), os.path.join(folder, segment)],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if records := re.findall(r"lsn: ([0-9A-F]+/[0-9A-F]+),", done.stdout):
            return int(segment[:8], 16), position(records[-1])
    return None


class Hold:
    """Hides the pipe `pipe` from the Patroni that reads `config` (JSON), from `begin` until a `look` finds the log replayed."""

    def __init__(self, pipe: str, config: str, data_dir: str, say: Callable[[str], None]) -> None:
        self.look_s: float | None = None
        """When to look next; None: there is nothing to look for."""
        self.given_up = False
        """Whether Patroni wanted the watchdog while it was hidden: it never tries again, and has to be started again."""
        self._pipe = pipe
        self._config = config
        self._data_dir = data_dir
        self._say = say
        self._shown = False
        self._end = (0, 0)
        self._rest = ("", 0)

    def begin(self, now_s: float) -> None:
        """Before Patroni starts. A node whose log or configuration can't be read is left to Patroni, and that is said."""
        try:
            with open(self._config, encoding="utf-8") as file:
                config = json.load(file)
            end = self._unplayed(config["postgresql"]["bin_dir"])
            host, _, port = config["restapi"]["connect_address"].rpartition(":")
            if end is not None:
                os.replace(self._pipe, self._pipe + HELD)
                self._end, self._rest, self.look_s = end, (host.strip("[]"), int(port)), now_s + LOOK_S
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            self._say(f"a node that still replays its log may vote: {error!r}")

    def look(self, now_s: float) -> None:
        """Show the pipe again if it is time: the node has replayed its log, or follows a leader. The next look is for whether
        Patroni takes it."""
        if self.look_s is None or now_s < self.look_s:
            return
        self.look_s = now_s + LOOK_S
        state = self._asked()
        if state is None:
            return
        if not self._shown:
            if self._has_replayed(state):
                os.replace(self._pipe + HELD, self._pipe)
                self._shown = True
                self._say("the log is replayed: this node may lead and vote")
            return
        self.look_s = None
        self.given_up = bool(state.get("watchdog_failed"))

    def _unplayed(self, bin_dir: str) -> tuple[int, int] | None:
        if not os.path.exists(os.path.join(self._data_dir, "global", "pg_control")):
            return None
        control = subprocess.run(
            [os.path.join(bin_dir, "pg_controldata"), self._data_dir],
            capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        ).stdout  # fmt: skip
        state = re.search(r"^Database cluster state: *(.*)$", control, re.MULTILINE)
        if state is not None and state[1].strip() in LED:
            return None
        return log_end(self._data_dir, bin_dir)

    def _has_replayed(self, state: dict[str, object]) -> bool:
        """By what Patroni says of its Postgres."""
        timeline, log = state.get("timeline"), state.get("xlog")
        if state.get("role") in ("primary", "master") or state.get("replication_state") == "streaming":
            return True
        if not isinstance(timeline, int) or not isinstance(log, dict):
            return False
        replayed = log.get("replayed_location")
        return timeline > self._end[0] or (isinstance(replayed, int) and replayed > self._end[1])

    def _asked(self) -> dict[str, object] | None:
        """What this node's Patroni says; None when it says nothing yet."""
        data = b""
        try:
            with socket.create_connection(self._rest, ANSWER_S) as connection:
                connection.sendall(b"GET /patroni HTTP/1.0\r\n\r\n")
                while part := connection.recv(65_536):
                    data += part
            found = json.loads(data.partition(b"\r\n\r\n")[2])
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
