"""As whom Postgres runs: it refuses to run as root.

As an ordinary user nothing is needed. As root it runs in a user namespace of its own, in which root looks like user
1000; where user namespaces are not allowed, as a dedicated user, who must be able to read the Python interpreter.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from oncepay.errors import OncepayError

USER_ENV = "ONCEPAY_OS_USER"
DEDICATED_USERS = ("oncepay", "postgres")
NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


STARTS_ITSELF = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', '']).returncode)"
"""What Patroni does: a Python that starts another."""


class NoUserForPostgres(OncepayError):
    """Started as root, and there is no way to run Postgres as somebody else."""

    slug = "no-user-for-postgres"


@dataclass(frozen=True)
class OsUser:
    """`prefix` goes before a command that must not run as root; `uid` and `gid` own its files (None: the caller)."""

    prefix: tuple[str, ...] = ()
    uid: int | None = None
    gid: int | None = None

    def own(self, path: Path) -> None:
        """Give a file or folder to the user as whom Postgres runs."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


def _runs(command: tuple[str, ...]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


def for_postgres() -> OsUser:
    """The way that works here. Raises NoUserForPostgres."""
    if os.geteuid() != 0:
        return OsUser()
    if _runs((*NAMESPACE, "true")):
        return OsUser(NAMESPACE)
    wanted = os.environ.get(USER_ENV)
    for name in (wanted,) if wanted else DEDICATED_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        prefix = ("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups")
        if _runs((*prefix, sys.executable, "-c", STARTS_ITSELF)):
            return OsUser(prefix, entry.pw_uid, entry.pw_gid)
    raise NoUserForPostgres(
        "Postgres doesn't run as root, and user namespaces are not allowed here: "
        f"run as an ordinary user, or name a dedicated one in {USER_ENV} who can run {sys.executable}"
    )
