"""The local cluster's etcd, made anew from a snapshot.

What a snapshot remembers is old. What must not be believed of it, and what is done instead:

- who leads a shard, and who may be elected: the caller forgets it (`prepare`), and of each shard the node with the most log is
  started first
- whatever else has to be forgotten is the caller's to do too, while nothing but etcd runs

All of that is done beside etcd's data. From where the new data takes its place until the map is settled, a file in the home says
so, and nothing else starts the cluster: a restore that was cut off is made again, whole.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy import etcd_snapshot, processes, programs
from deploy.furthest import LogEnd, furthest, log_end
from deploy.local.bring_up import Hooks
from deploy.local.cluster import Cluster
from deploy.local.errors import ClusterError
from deploy.local.etcd import Gateway
from deploy.local.layout import KEPT_ETCD, Layout, write_secret
from deploy.local.parts import Plan, node_names
from deploy.local.ports import ETCD_MEMBERS
from oncepay.settings import Settings

UP_S = 240.0
START_S = 60.0
STOP_S = 10.0
POLL_S = 0.1


def members_of(plan: Plan) -> dict[str, int]:
    return {f"etcd-{n + 1}": n for n in range(ETCD_MEMBERS)}


def make_data(plan: Plan, snapshot: Path) -> Path:
    """All members' data out of the snapshot, beside what they have; where that is. Raises SnapshotFailed."""
    layout = plan.layout
    members = members_of(plan)
    peers = {name: f"http://127.0.0.1:{plan.ports.etcd_peer(n)}" for name, n in members.items()}
    initial = ",".join(f"{name}={url}" for name, url in peers.items())
    made = layout.home / "etcd.new"
    shutil.rmtree(made, ignore_errors=True)
    for name in members:
        etcd_snapshot.make_member(
            snapshot, made / name, name=name, peer_url=peers[name], initial_cluster=initial, token=str(plan.ports.base)
        )
    return made


def put_in_place(layout: Layout, made: Path) -> Path:
    """What was made becomes etcd's data, and the cluster is marked; where what etcd had before the first try is kept."""
    data = layout.home / "etcd"
    now = layout.home / f"{KEPT_ETCD}{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S.%fZ}"
    if not layout.restoring.exists():
        write_secret(layout.restoring, os.fsencode(now.name))
    kept = layout.home / os.fsdecode(layout.restoring.read_bytes())
    if not kept.exists():
        data.rename(kept)
    elif any(data.iterdir()):  # an earlier try got further, and something may have been served
        data.rename(now)
    made.rename(data)
    return kept


def is_over(cluster: Cluster) -> None:
    """The map was settled: the cluster may be started as any other. Raises AlreadyRunning while a restore starts it."""
    if cluster.layout.restoring.exists():
        with cluster.only_one_up():
            cluster.layout.restoring.unlink(missing_ok=True)


@contextmanager
def only_etcd(plan: Plan, data: Path) -> Iterator[None]:
    """The members alone with that data, as children of this process, until the block ends.

    Raises ClusterError when they don't come up.
    """
    running = []
    try:
        for program in plan.programs():
            if program.part == "etcd":
                marks = {processes.CLUSTER_ENV: str(plan.layout.home), processes.PROCESS_ENV: program.name}
                environment = {**os.environ, **program.environment, **marks}
                with open(plan.layout.log(program.name), "ab") as log:
                    command = [*program.command, f"--data-dir={data / program.name}"]  # the last one counts
                    running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment))
        gateway = Gateway(plan.settings.etcd.endpoints)
        deadline_s = time.monotonic() + START_S
        while not gateway.is_decided():
            if time.monotonic() > deadline_s or any(process.poll() is not None for process in running):
                raise ClusterError(f"etcd didn't come up from the snapshot: see {plan.layout.log('etcd-1')}")
            time.sleep(POLL_S)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def first_nodes(layout: Layout, shards: tuple[str, ...], report: Callable[[str], None]) -> tuple[str, ...]:
    """Of each shard the node with the most log; the nodes must be stopped. Raises NoLog."""
    bin_dir = programs.postgres_bin()
    found = []
    for shard in shards:
        ends: dict[str, LogEnd] = {}
        for node in node_names(shard):
            if (layout.node(node) / "data" / "pg_wal").is_dir():
                ends[node] = log_end(layout.node(node) / "data", bin_dir)
        if ends:
            found.append(first := furthest(ends))
            report(f"{first} has the most log of shard {shard}: it leads first")
    return tuple(found)


def restore_etcd(
    cluster: Cluster,
    snapshot: Path,
    *,
    prepare: Callable[[Settings], None],
    settle: Callable[[Settings], None],
    hooks: Hooks | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Path:
    """Stop everything, make etcd anew from the snapshot, and start again; where etcd's old data was put.

    `prepare` is called while only etcd runs, `settle` when all runs again. What fails up to `prepare` leaves the cluster down and
    its etcd as it was. After that the cluster starts only by another restore, until one is over. Raises ClusterError,
    SnapshotFailed, NoLog, and what `prepare` and `settle` raise.
    """
    etcd_snapshot.look(snapshot)
    plan = cluster.plan
    report("stopping everything")
    cluster.down()
    plan.layout.make()
    with cluster.only_one_up():
        first = first_nodes(plan.layout, plan.shards, report)
        report("making etcd anew")
        made = make_data(plan, snapshot)
        with only_etcd(plan, made):
            report("forgetting what is old")
            prepare(plan.settings)
        kept = put_in_place(plan.layout, made)
    report("starting")
    cluster.up(hooks=hooks, timeout_s=UP_S, first_nodes=first, restoring=True)
    settle(plan.settings)
    is_over(cluster)
    return kept
