"""Which Python `make install` takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "find_python.sh"


def python(folder: Path, name: str, *options: str, before: str = "") -> Path:
    """A command that is this Python with `options`. It only notes what it would make an environment with."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1 $2" = "-m venv" ] && echo "$4" > "{folder.parent}/made-by-{folder.name}-{name}" && exit\n'
        f'{before}exec "{sys.executable}" {" ".join(options)} "$@"\n',
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def made(home: Path, *folders: str, python: str = "") -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Run the script; who was asked to make the environment, and what it said."""
    path = os.pathsep.join(str(home / folder) for folder in folders)
    found = subprocess.run(
        ["/bin/sh", str(SCRIPT), str(home / ".venv")],
        env={"PATH": path, "PYTHON": python},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return sorted(each.name.removeprefix("made-by-") for each in home.glob("made-by-*")), found


def test_the_fastest_build_is_taken_wherever_it_stands(tmp_path: Path) -> None:
    python(tmp_path / "first", "python3", "-X", "tracemalloc=10")
    python(tmp_path / "second", "python3.11")
    by, found = made(tmp_path, "first", "second")
    assert by == ["second-python3.11"], found.stdout + found.stderr
    assert "second/python3.11 it is" in found.stdout
    assert (tmp_path / "made-by-second-python3.11").read_text().strip() == str(tmp_path / ".venv")


def test_the_one_that_is_asked_for_is_taken_however_slow(tmp_path: Path) -> None:
    slow = python(tmp_path / "first", "python3", "-X", "tracemalloc=10")
    python(tmp_path / "second", "python3")
    assert made(tmp_path, "first", "second", python=str(slow))[0] == ["first-python3"]


def test_one_that_is_asked_for_and_is_none_is_an_error(tmp_path: Path) -> None:
    python(tmp_path / "first", "python3")
    by, found = made(tmp_path, "first", python="/no/such/python")
    assert (by, found.returncode) == ([], 1)
    assert "/no/such/python is no Python 3.11 or later" in found.stderr


def test_what_cannot_make_an_environment_is_passed_over(tmp_path: Path) -> None:
    python(tmp_path / "first", "python3", before='case "$2" in *ensurepip*) exit 1;; esac\n')
    python(tmp_path / "second", "python3", "-X", "tracemalloc=10")
    assert made(tmp_path, "first", "second")[0] == ["second-python3"]


def test_without_any_the_error_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    by, found = made(tmp_path, "empty")
    assert (by, found.returncode) == ([], 1)
    assert "apt install python3-venv" in found.stderr
