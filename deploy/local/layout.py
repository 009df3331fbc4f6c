"""Where everything of a local cluster lies below its home, and what the home remembers about itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.local.errors import WrongHome

SOCKET_PATH_BYTES = 107
SUPERVISOR_SUFFIX_BYTES = 9
"""The supervisor first binds the socket's name with a dot and its pid (up to 4194304) added."""


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a home keeps about its cluster from the first `up` on (`cluster.json`).

    `parts` are those of the last `up`. `made` names the shards whose first leader was seen with its database: what
    others hold can't be anybody's data. `places` are the numbers, and so the ports, of shards that have another one than
    their place in `shards`, since one before them was removed. `restored` are those that were made from a backup: they get no
    worker. `stripe_key_file` is empty when the cluster talks to the stand-in. With `netns` each node has a network namespace
    of its own.
    """

    port_base: int
    shards: tuple[str, ...]
    parts: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    stripe_key_file: str = ""
    stripe_webhook_secret_file: str = ""
    netns: bool = False
    places: dict[str, int] = {}
    restored: tuple[str, ...] = ()

    @property
    def numbers(self) -> dict[str, int]:
        """Each shard's number, from which its ports follow. It never changes."""
        return {shard: self.places.get(shard, index) for index, shard in enumerate(self.shards)}

    def with_shard(self, shard: str, *, restored: bool = False) -> Memory:
        """With one more shard, which gets the lowest free number."""
        taken = self.numbers
        free = next(number for number in range(len(taken) + 1) if number not in taken.values())
        made_again = (*self.restored, shard) if restored else self.restored
        return msgspec.structs.replace(self, shards=(*self.shards, shard), places={**taken, shard: free}, restored=made_again)

    def without_shard(self, shard: str) -> Memory:
        """With that shard forgotten; the others keep their numbers."""
        places = {name: number for name, number in self.numbers.items() if name != shard}
        made = tuple(name for name in self.made if name != shard)
        restored = tuple(name for name in self.restored if name != shard)
        return msgspec.structs.replace(self, shards=tuple(places), places=places, made=made, restored=restored)


@dataclass(frozen=True)
class Layout:
    """The paths below `home`, which is absolute and has no links in it."""

    home: Path

    @property
    def memory_file(self) -> Path:
        return self.home / "cluster.json"

    @property
    def lock(self) -> Path:
        return self.home / "up.lock"

    @property
    def settings(self) -> Path:
        return self.home / "oncepay.toml"

    @property
    def api_key(self) -> Path:
        return self.home / "api_key"

    @property
    def secrets(self) -> Path:
        return self.home / "secrets"

    @property
    def passwords(self) -> Path:
        return self.secrets / "passwords.json"

    @property
    def stripe_webhook_secret(self) -> Path:
        return self.secrets / "stripe_webhook"

    @property
    def tipalti_notifications(self) -> Path:
        return self.secrets / "tipalti_notifications"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def state(self) -> Path:
        """Where the stand-ins keep theirs."""
        return self.home / "state"

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def supervisor_config(self) -> Path:
        return self.run / "supervisord.conf"

    @property
    def supervisor_pid(self) -> Path:
        return self.run / "supervisord.pid"

    @property
    def aggregator_db(self) -> Path:
        return self.home / "aggregator-db"

    def etcd(self, member: str) -> Path:
        return self.home / "etcd" / member

    @property
    def restoring(self) -> Path:
        """There while a restore of etcd isn't over: the name of the folder in which what etcd had before it is kept."""
        return self.home / "etcd.restoring"

    @property
    def nodes(self) -> Path:
        return self.home / "nodes"

    def node(self, name: str) -> Path:
        return self.nodes / name

    def backups(self, shard: str) -> Path:
        return self.home / "backups" / shard

    def log(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    @property
    def short_run(self) -> Path:
        """A folder for the socket when `run` is too deep for one. It is this home's alone."""
        name = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"oncepay-{os.geteuid()}-{name}"

    @property
    def supervisor_socket(self) -> Path:
        path = self.run / "supervisor.sock"
        if len(os.fsencode(path)) + SUPERVISOR_SUFFIX_BYTES <= SOCKET_PATH_BYTES:
            return path
        return self.short_run / "supervisor.sock"

    def make(self) -> None:
        """Make the folders, readable by their owner alone. Raises WrongHome."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            for folder in (self.secrets, self.logs, self.state, self.run, self.nodes, self.aggregator_db, self.home / "etcd"):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise WrongHome(f"can't use {self.home} (ONCEPAY_HOME): {error.strerror}") from error

    def make_socket_folder(self) -> None:
        """Make the folder of the supervisor's socket, when that isn't `run`. Raises WrongHome."""
        if self.supervisor_socket.parent == self.short_run:
            with contextlib.suppress(FileExistsError):
                self.short_run.mkdir(mode=0o700)
            found = os.lstat(self.short_run)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise WrongHome(f"{self.short_run} is somebody else's: remove it, or use a home with a shorter path")

    def clean_run(self) -> None:
        """Remove what only a running cluster needs."""
        shutil.rmtree(self.short_run, ignore_errors=True)
        for path in (self.run / "supervisor.sock", self.supervisor_pid):
            path.unlink(missing_ok=True)

    def remember(self, memory: Memory) -> None:
        write_secret(self.memory_file, msgspec.json.format(msgspec.json.encode(memory), indent=2) + b"\n")

    def memory(self) -> Memory | None:
        """What the home remembers; None for a home that never had a cluster. Raises WrongHome."""
        try:
            return msgspec.json.decode(self.memory_file.read_bytes(), type=Memory)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise WrongHome(f"can't read {self.memory_file}: {error}") from error

    def purge(self) -> None:
        """Delete the home with all data in it, if it is one. Raises WrongHome."""
        self.clean_run()
        if not self.home.exists():
            return
        if not self.lock.exists() and self.memory() is None and any(self.home.iterdir()):
            raise WrongHome(f"{self.home} holds no cluster: nothing was deleted")
        try:
            shutil.rmtree(self.home)
        except OSError as error:
            raise WrongHome(f"can't delete all of {self.home}: {error}") from error


def write_secret(path: Path, content: bytes) -> None:
    """Write the file as a whole or not at all, readable by its owner alone."""
    unfinished = path.with_name(path.name + ".new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
