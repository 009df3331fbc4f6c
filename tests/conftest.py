"""What all tests may use: a whole cluster, for tests that are marked `cluster`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import processes
from deploy.local import Cluster, ClusterError
from deploy.local.ports import free_base

PREFIX = "oncepay-test-"
WITH_THE_WHOLE = {"keygen", "oncepay"}
"""Folders of tests that run with those of the whole cluster, so that both of the runs side by side take about as long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what shares the run's cluster, so that only one of two runs side by side starts one."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) or item.path.parent.name in WITH_THE_WHOLE:
            item.add_marker(pytest.mark.whole)


def end_abandoned() -> None:
    """End clusters of test runs that were killed: the folder's name tells the run's pid."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not processes.is_alive(int(owner)):
            for memory in folder.glob("*/cluster.json"):
                with contextlib.suppress(ClusterError):
                    Cluster(memory.parent).down(purge=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """A folder for the homes of clusters. What still runs in it at the end is ended."""
    end_abandoned()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            yield folder
        finally:
            for memory in folder.glob("*/cluster.json"):
                Cluster(memory.parent).down(purge=True)


@pytest.fixture(scope="session")
def cluster(cluster_folder: Path) -> Iterator[Cluster]:
    """A whole cluster on free ports, with schemas and stand-ins, shared by all tests of the run.

    The environment variable ONCEPAY_TEST_HOME names a running cluster to use instead, which saves its start.
    """
    from cli.up import hooks

    if running := os.environ.get("ONCEPAY_TEST_HOME"):
        yield Cluster(Path(running))
        return
    made = Cluster(cluster_folder / "whole", free_base())
    made.up(hooks=hooks(made))
    try:
        yield made
    finally:
        made.down(purge=True)
