"""`down --purge` ends and deletes what is a cluster's, and nothing else; `up` takes no folder that is used for something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from deploy import processes
from deploy.local import Cluster, WrongHome
from deploy.local.layout import Layout, Memory

Run = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a program that sleeps, with these variables beside the caller's."""
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str = "sleep", *, cwd: Path | None = None, **variables: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([program, "60"], cwd=cwd, env={**os.environ, **variables}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def postgres(tmp_path: Path, run: Run) -> Callable[[Path], subprocess.Popen[bytes]]:
    """Starts what looks like a Postgres with that data directory."""
    program = tmp_path / "bin" / "postgres"
    program.parent.mkdir()
    shutil.copy(shutil.which("sleep") or "", program)

    def start(data: Path) -> subprocess.Popen[bytes]:
        data.mkdir(parents=True)
        started = run(str(program), cwd=data)
        assert processes.is_postgres_of(started.pid, str(data))
        return started

    return start


def make_home(home: Path) -> Layout:
    layout = Layout(home)
    layout.make()
    layout.remember(Memory(9000, ("s0",)))
    return layout


def project(folder: Path) -> Path:
    """A folder with something of somebody's."""
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "visits").write_text("42")
    (folder / "letters").write_text("dear")
    return folder


def all_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_up_takes_no_folder_that_is_used_for_something_else(tmp_path: Path) -> None:
    home = project(tmp_path / "project")
    before = all_below(home)
    with pytest.raises(WrongHome, match=r"\(logs\).*ONCEPAY_HOME"):
        Cluster(home, parts=["etcd"]).up()
    assert all_below(home) == before


def test_folders_named_like_ours_are_no_cluster(tmp_path: Path) -> None:
    home = tmp_path / "service"
    (home / "logs").mkdir(parents=True)
    with pytest.raises(WrongHome, match="other things"):
        Layout(home).make()
    with pytest.raises(WrongHome, match="nothing was deleted"):
        Cluster(home).down(purge=True)
    assert all_below(home) == ["logs"]


def test_the_lock_of_a_refused_up_makes_no_home_of_a_project(tmp_path: Path) -> None:
    """Earlier versions left it."""
    home = project(tmp_path / "project")
    Layout(home).lock.touch()
    before = all_below(home)
    with pytest.raises(WrongHome, match="nothing was deleted"):
        Cluster(home).down(purge=True)
    with pytest.raises(WrongHome, match="other things"):
        Cluster(home).up()
    assert all_below(home) == before


def test_a_home_may_have_other_things_and_purge_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    Layout(tmp_path).make()
    (tmp_path / "nodes" / "s0-1").mkdir()
    Layout(tmp_path).make()
    Cluster(tmp_path).down(purge=True)
    assert all_below(tmp_path) == ["letters"]


def test_a_home_may_have_clusters_of_demos_and_reports_before_its_own(tmp_path: Path) -> None:
    make_home(tmp_path / "demo")
    Layout(tmp_path / "chaos").make()
    Layout(tmp_path).reports.mkdir()
    Layout(tmp_path).make()
    Layout(tmp_path).make()  # as it is


def test_purge_leaves_what_is_not_the_clusters(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home").home
    (home / "letters").write_text("dear")
    (home / "plans").mkdir()
    make_home(home / "demo")
    (home / "demo" / "drawing").write_text("a house")
    (home / "elsewhere").symlink_to(make_home(tmp_path / "another").home)
    result = CliRunner().invoke(main, ["down", "--purge", "--output", "json"], env={"ONCEPAY_HOME": str(home)})
    assert result.exit_code == 0
    left = ["demo", "elsewhere", "letters", "plans"]
    assert json.loads(result.stdout)["left"] == [str(home / name) for name in left]
    assert all_below(home) == sorted([*left, "demo/drawing"])
    assert Layout(tmp_path / "another").memory() is not None


def test_a_link_in_a_home_is_not_followed(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    disk = project(tmp_path / "disk")
    (home.home / "backups").symlink_to(disk)
    home.purge()
    assert not home.home.exists()
    assert (disk / "letters").exists()


def test_what_marks_a_home_is_deleted_last(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    assert [path.name for path in home.data()][-2:] == ["cluster.json", "up.lock"]


def test_nothing_is_killed_where_there_is_no_cluster(tmp_path: Path, run: Run, postgres: Callable[[Path], object]) -> None:
    another = make_home(tmp_path / "deep" / "another").home
    marked = [run(**{processes.CLUSTER_ENV: str(home)}) for home in (another, tmp_path / "deleted")]
    database = postgres(tmp_path / "mine" / "data")
    with pytest.raises(WrongHome, match="nothing was stopped"):
        Cluster(tmp_path).down(purge=True)
    assert all(isinstance(each, subprocess.Popen) and each.poll() is None for each in [*marked, database])


def test_purge_kills_what_is_a_clusters_alone(tmp_path: Path, run: Run, postgres: Callable[[Path], object]) -> None:
    home = make_home(tmp_path / "home").home
    make_home(home / "demo")
    another = make_home(home / "deep" / "another").home
    spared = [run(**{processes.CLUSTER_ENV: str(another)}), postgres(home / "mine" / "data")]
    ended = [
        run(**{processes.CLUSTER_ENV: str(home)}),
        run(**{processes.CLUSTER_ENV: str(home / "demo")}),
        run(**{processes.CLUSTER_ENV: str(home / "deleted")}),
        postgres(home / "nodes" / "s0-1" / "data"),
        postgres(home / "demo" / "aggregator-db" / "data"),
    ]
    assert Cluster(home).down(purge=True) is True
    assert all(isinstance(each, subprocess.Popen) and each.poll() is None for each in spared)
    assert all(isinstance(each, subprocess.Popen) and each.wait(5) for each in ended)
    assert Layout(another).memory() is not None


def test_a_database_below_a_folder_that_is_no_home_goes_on(tmp_path: Path, postgres: Callable[[Path], object]) -> None:
    database = postgres(tmp_path / "nodes" / "mine" / "data")
    assert Cluster(tmp_path).down() is False
    assert isinstance(database, subprocess.Popen)
    assert database.poll() is None


def test_the_cluster_of_a_demo_is_purged_with_its_parent(tmp_path: Path, run: Run) -> None:
    """Of `demo --keep` in a home that never saw an `up`."""
    home = tmp_path / "home"
    demo = make_home(home / "demo").home
    kept = run(**{processes.CLUSTER_ENV: str(demo)})
    Layout(home).reports.mkdir()
    assert Cluster(home).down(purge=True) is True
    assert kept.wait(5)
    assert not home.exists()
