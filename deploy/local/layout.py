"""Where everything of a local cluster lies below its home, and what the home remembers about itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploy.local.errors import WrongHome

SOCKET_PATH_BYTES = 107
SUPERVISOR_SUFFIX_BYTES = 9
"""The supervisor first binds the socket's name with a dot and its pid (up to 4194304) added."""
MEMORY, LOCK, REPORTS = "cluster.json", "up.lock", "chaos-reports"
FILES = ("oncepay.toml", "api_key", "etcd.restoring", MEMORY, LOCK)
FOLDERS = ("secrets", "logs", "state", "run", "aggregator-db", "etcd", "etcd.new", "nodes", "backups")
OWN = frozenset({*FILES, *(f"{name}.new" for name in FILES), *FOLDERS})
"""What a cluster has in its home, beside what its etcd had before a restore."""
KEPT_ETCD = "etcd.before-"
NOBODYS = frozenset({REPORTS, "lost+found"})
"""What may lie in a home before its cluster is made: the reports of campaigns, and what each disk has at its top."""
MARK = b"oncepay\n"
"""What a home's lock says."""
NAMED = 3
"""How many strange names an error tells."""


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
        return self.home / MEMORY

    @property
    def lock(self) -> Path:
        return self.home / LOCK

    @property
    def reports(self) -> Path:
        """Of campaigns of faults, whose clusters are in sub-folders."""
        return self.home / REPORTS

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
        """Make the folders, readable by their owner alone. Raises WrongHome, also when the folder is used for something else."""
        self.check_usable()
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.lock.write_bytes(MARK)  # first: it tells that the rest is a cluster's
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

    def names(self) -> list[str]:
        """All that is in the home; nothing when it isn't there. Raises WrongHome."""
        try:
            return sorted(os.listdir(self.home))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise WrongHome(f"can't use {self.home} (ONCEPAY_HOME): {error.strerror}") from error

    def holds_cluster(self) -> bool:
        """Whether a cluster was made here, or an `up` began to: what is named like a cluster's is one's then."""
        if os.path.lexists(self.memory_file) or self._is_marked():
            return True
        return os.path.lexists(self.lock) and not self.strange()  # of an earlier version, which didn't mark it

    def _is_marked(self) -> bool:
        try:
            return self.lock.read_bytes() == MARK
        except OSError:
            return False

    def below(self) -> list[Layout]:
        """The clusters in sub-folders, such as those of `demo` and of campaigns."""
        found = []
        for name in self.names():
            each = Layout(self.home / name)
            with contextlib.suppress(WrongHome):  # it can't be read
                if not is_own(name) and os.path.isdir(each.home) and not os.path.islink(each.home) and each.holds_cluster():
                    found.append(each)
        return found

    def homes(self) -> list[Layout]:
        """This one, and those of the clusters below it."""
        return [self, *(home for each in self.below() for home in each.homes())]

    def strange(self) -> list[str]:
        """What is in the home and neither a cluster's nor nobody's."""
        known = NOBODYS | {each.home.name for each in self.below()}
        return [name for name in self.names() if not is_own(name) and name not in known]

    def check_usable(self) -> None:
        """Raises WrongHome when no cluster can be made here, or started: the folder is used for something else."""
        there = self.home
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "it can't be written to" if there.is_dir() else f"{there} is no folder"
            raise WrongHome(f"can't use {self.home} (ONCEPAY_HOME): {why}")
        if os.path.lexists(self.memory_file):
            return
        if any(self.nodes.glob("*/data")):
            raise WrongHome(f"{self.memory_file} is missing, though {self.nodes} holds data")
        if not self.holds_cluster() and (taken := [name for name in self.names() if is_own(name)]):
            raise WrongHome(
                f"{self.home} holds no cluster, but other things that are named like its own ({some(taken)}): "
                "let ONCEPAY_HOME name a new or an empty folder, for instance one within it"
            )

    def check_purge(self) -> None:
        """Raises WrongHome when there is something here, and none of it is a cluster's."""
        if self.names() and not any(self.data()):
            raise WrongHome(f"{self.home} holds no cluster: nothing was stopped, and nothing was deleted")

    def data(self) -> Iterator[Path]:
        """What `purge` deletes: all that belongs to this cluster and to those below it. What marks a home comes last."""
        for each in self.below():
            yield from each.data()
        names, own = self.names(), self.holds_cluster()
        ours = [name for name in names if name == REPORTS or (own and is_own(name))]
        yield from (self.home / name for name in sorted(ours, key=lambda name: (name == LOCK, name == MEMORY, name)))

    def purge(self) -> None:
        """Delete the cluster's data and that of the clusters below, and each home that has nothing else. Raises WrongHome."""
        self.check_purge()
        homes = self.homes()
        for each in homes:
            each.clean_run()
        try:
            for path in list(self.data()):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise WrongHome(f"can't delete all of {self.home}: {error}") from error
        for each in reversed(homes):
            with contextlib.suppress(OSError):  # it isn't empty, or a disk of its own
                each.home.rmdir()


def is_own(name: str) -> bool:
    """Whether a cluster has something of that name in its home."""
    return name in OWN or name.startswith(KEPT_ETCD)


def some(names: list[str]) -> str:
    """The first of the names."""
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


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
