"""Starts a Postgres that stands alone (the aggregator's), and makes its data directory first when there is none.

    python -S -m deploy.postgres FOLDER BIN_DIR PORT DATABASE [PREFIX...]

The variable ONCEPAY_AGGREGATOR_SHARED_BUFFERS says how much Postgres keeps in its own cache, for a machine that is there for it.

FOLDER holds `password` (the superuser's) and `data`. PREFIX goes before every Postgres command, because these refuse
to run as root. This process turns into the postmaster, so that the supervised pid is the postmaster's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from deploy import processes

PARAMETERS = {
    "max_connections": "100",
    # Not more: two gigabytes take 30 MB for their administration alone, on every machine that runs the local cluster.
    "shared_buffers": "256MB",
    # After each checkpoint a page that is touched is written to the log as a whole.
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "min_wal_size": "64MB",
    "wal_init_zero": "off",
    "io_method": "sync",
    "jit": "off",
    "password_encryption": "scram-sha-256",
    "idle_in_transaction_session_timeout": "30s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
}
BUFFERS_ENV = "ONCEPAY_AGGREGATOR_SHARED_BUFFERS"
HBA = "host all all 127.0.0.1/32 scram-sha-256\n"


class Instance:
    """One Postgres, in its folder."""

    def __init__(self, folder: Path, bin_dir: Path, port: str, database: str, prefix: list[str]) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.bin_dir = bin_dir
        self.port = port
        self.database = database
        self.prefix = prefix

    def command(self, program: str, *arguments: str) -> list[str]:
        return [*self.prefix, str(self.bin_dir / program), *arguments]

    def is_ours(self, pid: int) -> bool:
        home, process = os.environ[processes.CLUSTER_ENV], os.environ[processes.PROCESS_ENV]
        return processes.is_postgres_of(pid, str(self.data_dir)) or processes.is_marked(pid, home, process)

    def make(self) -> None:
        """initdb and the database, in a folder that gets its name only when it is complete."""
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ["-U", "postgres", "--encoding=UTF8", "--auth=scram-sha-256", "--data-checksums"]
        # Postgres' own C.UTF-8 sorts as the C library's, and compares texts, which lead every index, without a call into it.
        options += ["--locale=C.UTF-8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        initdb = self.command("initdb", "-D", str(unfinished), f"--pwfile={self.folder / 'password'}", *options)
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
        (unfinished / "pg_hba.conf").write_text(HBA, encoding="ascii")
        single = self.command("postgres", "--single", "-D", str(unfinished), "postgres")
        create = f'CREATE DATABASE "{self.database}"\n'.encode()
        subprocess.run(single, check=True, input=create, stdout=subprocess.DEVNULL)
        os.rename(unfinished, self.data_dir)

    def run(self) -> None:
        """Become the postmaster."""
        if not processes.end(self.is_ours):
            sys.exit("an earlier Postgres of this folder can't be ended")
        # Its pid may belong to another process by now, and Postgres would then refuse to start.
        (self.data_dir / "postmaster.pid").unlink(missing_ok=True)
        if not self.data_dir.exists():
            self.make()
        parameters = PARAMETERS | {"shared_buffers": os.environ.get(BUFFERS_ENV) or PARAMETERS["shared_buffers"]}
        settings = [part for name, value in parameters.items() for part in ("-c", f"{name}={value}")]
        command = self.command("postgres", "-D", str(self.data_dir), "-p", self.port, *settings)
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


def main() -> None:
    folder, bin_dir, port, database, *prefix = sys.argv[1:]
    Instance(Path(folder).resolve(), Path(bin_dir), port, database, prefix).run()


if __name__ == "__main__":
    main()
