"""Makes a node's data directory out of a backup: what Patroni calls to bootstrap a shard that is restored.

    python -S restore.py PLAN --scope=SHARD --datadir=FOLDER

PLAN is a JSON file: `backup` (the base backup's data directory), `archive` (the folder of the log), `to_time` (empty: as far
as the archive goes), `sql`, `database`, `user`, `bin_dir`.

The backup is brought up to that moment by a Postgres that nobody can reach, which sends nothing, applies no subscription and
archives nothing; `sql` is committed there, which makes it a new incarnation that owns nothing. Only then Patroni gets to see
the data. Only the standard library is imported.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

POLL_S = 0.2
STOP_S = 300.0
LEFT_BY_THE_SOURCE = (
    "postmaster.pid",
    "postmaster.opts",
    "patroni.dynamic.json",
    "standby.signal",
    "backup_manifest",
    "oncepay_archive_begun",
)
PRODUCTION = "in production"
CONNECT_S = 60.0
NO_CONNECTION = 2
"""With this psql says that there was no connection, or that it ended."""
PORT = "5432"
"""Of a Unix socket in a folder of its own."""


def say(text: str) -> None:
    sys.stderr.write(f"restore: {text}\n")


class Restore:
    """One restore, into `data_dir`."""

    def __init__(self, plan: dict[str, str], data_dir: str) -> None:
        self.plan = plan
        self.data_dir = data_dir
        self.sockets = tempfile.mkdtemp(prefix="restore-")

    def run(self) -> int:
        """0 when the directory is ready for Patroni."""
        try:
            self._copy()
            postgres = self._start()
            try:
                if not self._recovered(postgres):
                    return 1
                say("recovered; making it a new incarnation")
                done = self._execute(self.plan["sql"])
            finally:
                self._stop(postgres)
            return done
        finally:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def _copy(self) -> None:
        say(f"copying {self.plan['backup']}")
        shutil.rmtree(self.data_dir, ignore_errors=True)
        shutil.copytree(self.plan["backup"], self.data_dir, symlinks=True)
        os.chmod(self.data_dir, 0o700)
        for name in LEFT_BY_THE_SOURCE:
            if os.path.exists(path := os.path.join(self.data_dir, name)):
                os.unlink(path)
        self._forget_targets()
        with open(self._signal(), "w", encoding="ascii"):
            pass

    def _forget_targets(self) -> None:
        """A standby's configuration names every recovery target as empty, and Postgres then refuses the one that is set."""
        path = os.path.join(self.data_dir, "postgresql.conf")
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line for line in lines if not line.lstrip().startswith("recovery_target"))

    def _signal(self) -> str:
        return os.path.join(self.data_dir, "recovery.signal")

    def _program(self, name: str) -> str:
        return os.path.join(self.plan["bin_dir"], name)

    def _settings(self) -> dict[str, str]:
        hba = os.path.join(self.sockets, "hba")
        with open(hba, "w", encoding="ascii") as file:
            file.write("local all all trust\n")
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "archive.py")
        fetch = shlex.join([sys.executable, "-S", script, "get", self.plan["archive"]])
        settings = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": self.sockets,
            "hba_file": hba,
            "restore_command": f'{fetch.replace("%", "%%")} "%f" "%p"',
            "recovery_target_timeline": "latest",
            "recovery_target_action": "promote",
            "primary_conninfo": "",
            "primary_slot_name": "",
            "synchronous_standby_names": "",
            "archive_mode": "off",
            "max_logical_replication_workers": "0",
            "hot_standby": "on",
        }
        if self.plan["to_time"]:
            settings["recovery_target_time"] = self.plan["to_time"]
        return settings

    def _start(self) -> subprocess.Popen[bytes]:
        options = [part for name, value in self._settings().items() for part in ("-c", f"{name}={value}")]
        command = [self._program("postgres"), "-D", self.data_dir, *options]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=self.data_dir)

    def _recovered(self, postgres: subprocess.Popen[bytes]) -> bool:
        """Wait until it has ended its recovery, however long that takes; False when it gave up.

        A backup of a leader says that it is in production from the start: Postgres removes the signal before it says so anew,
        so the signal is looked at first.
        """
        while postgres.poll() is None:
            over = not os.path.exists(self._signal())
            control = subprocess.run([self._program("pg_controldata"), self.data_dir], capture_output=True, check=False)
            if over and PRODUCTION.encode() in control.stdout:
                return True
            time.sleep(POLL_S)
        say(f"Postgres ended with {postgres.returncode} before it was there: see its log above")
        return False

    def _execute(self, sql: str) -> int:
        command = [self._program("psql"), "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-h", self.sockets, "-p", PORT]
        command += ["-U", self.plan["user"], "-d", self.plan["database"], "-f", "-"]
        deadline_s = time.monotonic() + CONNECT_S
        while True:
            done = subprocess.run(command, input=sql.encode(), capture_output=True, check=False)
            # It has just been promoted, and may not take connections yet.
            if done.returncode != NO_CONNECTION or time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        if done.returncode:
            say(done.stderr.decode(errors="replace").strip())
        return done.returncode

    def _stop(self, postgres: subprocess.Popen[bytes]) -> None:
        if postgres.poll() is None:
            postgres.send_signal(signal.SIGINT)
            postgres.wait(STOP_S)


def main() -> int:
    path, *options = sys.argv[1:]
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    with open(path, encoding="utf-8") as file:
        plan: dict[str, str] = json.load(file)
    return Restore(plan, given["datadir"]).run()


if __name__ == "__main__":
    sys.exit(main())
