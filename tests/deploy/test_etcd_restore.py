"""A restore of etcd that is cut off between its steps: nothing starts on what it left, and it can be done again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy import etcd_snapshot
from deploy.local import Cluster, ClusterError, etcd_restore, supervisor
from deploy.local.bring_up import BringUp
from deploy.local.etcd_restore import restore_etcd
from deploy.local.layout import Layout, Memory
from deploy.local.ports import free_base


class Killed(BaseException):
    """The process ended here."""


class Setup:
    """A stopped cluster without programs; `fails` names the step at which a restore ends, `done` are those that were begun."""

    def __init__(self, home: Path) -> None:
        self.layout = Layout(home)
        self.layout.make()
        self.layout.remember(Memory(free_base(), ("s0",), ("etcd",)))
        (self.layout.home / "etcd" / "old").touch()
        self.cluster = Cluster(home)
        self.fails = ""
        self.done: list[str] = []

    def step(self, name: str) -> None:
        self.done.append(name)
        if name == self.fails:
            raise Killed(name)

    def restore(self, fails: str = "") -> Path:
        self.fails, self.done = fails, []
        return restore_etcd(
            self.cluster,
            Path("snapshot"),
            prepare=lambda _: self.step("prepare"),
            settle=lambda _: self.step("settle"),
        )

    def starts(self) -> bool:
        """Whether a plain `up` starts anything."""
        self.fails, self.done = "", []
        self.cluster.up()
        return self.done == ["start"]

    def data(self) -> list[str]:
        return sorted(path.name for path in (self.layout.home / "etcd").iterdir())


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    made = Setup(tmp_path / "home")
    rename = Path.rename

    def make_member(path: Path, data_dir: Path, **_: object) -> None:
        data_dir.mkdir(parents=True)

    def renamed(self: Path, target: Path) -> Path:
        if self.parent == made.layout.home and target.parent == made.layout.home:
            made.step("aside" if self.name == "etcd" else "in place")
        return rename(self, target)

    @contextmanager
    def only_etcd(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(etcd_snapshot, "look", lambda _: None)
    monkeypatch.setattr(etcd_snapshot, "make_member", make_member)
    monkeypatch.setattr(etcd_restore, "only_etcd", only_etcd)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(supervisor, "start", lambda _: made.step("start"))
    monkeypatch.setattr(BringUp, "run", lambda _: None)
    return made


NEW = ["etcd-1", "etcd-2", "etcd-3"]


def test_what_is_old_is_forgotten_before_it_is_in_place(setup: Setup) -> None:
    with pytest.raises(Killed):
        setup.restore("prepare")
    assert setup.data() == ["old"]
    assert setup.starts(), "nothing has changed"


@pytest.mark.parametrize("step", ["aside", "in place", "start", "settle"])
def test_nothing_starts_on_what_a_restore_left_undone(setup: Setup, step: str) -> None:
    with pytest.raises(Killed):
        setup.restore(step)
    assert setup.done[-1] == step
    with pytest.raises(ClusterError, match="etcd restore"):
        setup.starts()
    assert setup.done == []

    kept = setup.restore()
    assert setup.done[-2:] == ["start", "settle"]
    assert [path.name for path in kept.iterdir()] == ["old"]
    assert setup.data() == NEW
    assert setup.starts()


def test_what_served_in_between_is_kept_too(setup: Setup) -> None:
    with pytest.raises(Killed):
        setup.restore("settle")
    (setup.layout.etcd("etcd-1") / "since").touch()
    kept = setup.restore()
    assert [path.name for path in kept.iterdir()] == ["old"]
    assert len(list(setup.layout.home.glob("etcd.before-*/etcd-1/since"))) == 1


def test_a_map_that_is_settled_later_ends_the_restore(setup: Setup) -> None:
    with pytest.raises(Killed):
        setup.restore("settle")
    etcd_restore.is_over(setup.cluster)
    assert setup.starts()


def test_the_nodes_are_looked_at_anew(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that led since may have more log than the one that led first."""
    led: list[tuple[str, ...]] = []
    run: Any = lambda bring_up: led.append(bring_up.plan.first_nodes)  # noqa: E731
    monkeypatch.setattr(BringUp, "run", run)
    for first in ("s0-1", "s0-2"):
        monkeypatch.setattr(etcd_restore, "first_nodes", lambda *_, first=first: (first,))
        if first == "s0-1":
            with pytest.raises(Killed):
                setup.restore("settle")
        else:
            setup.restore()
    assert led == [("s0-1",), ("s0-2",)]
