"""A real cluster of etcd and one shard, and what becomes of it when processes are killed, frozen or in the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from deploy import patroni, processes
from deploy.local import AlreadyRunning, Cluster, Hooks, PartFailed, PortTaken, WrongHome
from deploy.local.etcd import Gateway
from deploy.local.ports import free_base
from deploy.local.status import NodeStatus, ShardStatus
from oncepay.settings import load

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

PARTS = ("etcd", "nodes", "aggregator-db")


@pytest.fixture(scope="module")
def data_cluster(cluster_folder: Path) -> Iterator[Cluster]:
    made = Cluster(cluster_folder / "data", free_base(), shards=("s0",), parts=PARTS)
    made.up()
    try:
        yield made
    finally:
        made.down(purge=True)


def until(check: Callable[[], object], within_s: float) -> float:
    """Wait until `check` holds; the seconds that it took."""
    started_s = time.monotonic()
    while not check():
        assert time.monotonic() - started_s < within_s, "it never came to hold"
        time.sleep(0.05)
    return time.monotonic() - started_s


def shard_of(cluster: Cluster) -> ShardStatus:
    return cluster.status().shards[0]


def leader_of(cluster: Cluster) -> NodeStatus:
    shard = shard_of(cluster)
    return next(node for node in shard.nodes if node.name == shard.leader)


def is_whole(cluster: Cluster) -> bool:
    status = cluster.status()
    return status.healthy and {node.role for node in status.shards[0].nodes} == {"primary", "replica"}


def connect(cluster: Cluster, port: int) -> psycopg2.extensions.connection:
    postgres = cluster.settings.postgres
    connection = psycopg2.connect(
        host="127.0.0.1",
        port=port,
        dbname=postgres.database,
        user=postgres.superuser,
        password=postgres.superuser_password,
        connect_timeout=5,
    )
    connection.autocommit = True
    return connection


def execute(cluster: Cluster, statement: str) -> list[tuple[object, ...]]:
    connection = connect(cluster, leader_of(cluster).port)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def test_the_shard_is_as_promised(data_cluster: Cluster) -> None:
    shard = shard_of(data_cluster)
    assert shard.ranges == [(0, 65535)]
    assert sorted(node.role for node in shard.nodes) == ["primary", "replica", "replica"]
    for node in shard.nodes:
        assert node.pid is not None
        assert node.patroni_pid is not None
        assert "postgres" in processes.command(node.pid)[0]
        assert "patroni" in processes.command(node.patroni_pid)
        connection = connect(data_cluster, node.port)
        with connection.cursor() as cursor:
            cursor.execute("SELECT plugin, database FROM pg_replication_slots WHERE slot_name = %s", (patroni.FEED_SLOT,))
            assert cursor.fetchall() == [("pgoutput", "oncepay")], node.name
        connection.close()
    expected = {
        "data_checksums": "on",
        "synchronous_commit": "on",
        "wal_level": "logical",
        "wal_init_zero": "off",
        "hot_standby_feedback": "on",
        "unix_socket_directories": "",
        "idle_in_transaction_session_timeout": "10s",
    }
    for name, value in expected.items():
        assert execute(data_cluster, f"SHOW {name}") == [(value,)]
    names = str(execute(data_cluster, "SHOW synchronous_standby_names")[0][0])
    assert names.startswith("ANY 1 (")


def test_everything_listens_on_loopback_and_within_the_span(data_cluster: Cluster) -> None:
    import psutil

    base = data_cluster.ports.base
    pids = set(data_cluster.pids())
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in pids]
    assert listening
    for each in listening:
        assert each.laddr
        assert each.laddr.ip == "127.0.0.1"
        assert base <= each.laddr.port < base + 70


def test_status_is_complete(data_cluster: Cluster) -> None:
    until(lambda: data_cluster.status().healthy, 60)
    status = data_cluster.status()
    assert [each.name for each in status.etcd] == ["etcd-1", "etcd-2", "etcd-3"]
    for member in status.etcd:
        assert member.pid is not None
        assert os.path.basename(os.readlink(f"/proc/{member.pid}/exe")) == "etcd"


def test_files_with_secrets_are_their_owners_alone(data_cluster: Cluster) -> None:
    layout = data_cluster.layout
    secret = [layout.settings, layout.api_key, layout.passwords, layout.node("s0-1") / "patroni.yml"]
    assert [path.stat().st_mode & 0o777 for path in secret] == [0o600] * len(secret)
    assert load(layout.settings) == data_cluster.settings


def test_the_supervisor_holds_none_of_the_callers_files(data_cluster: Cluster) -> None:
    pid = data_cluster.supervisor().pid()
    opened = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # a connection that was closed meanwhile
            opened.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    assert opened
    own = {os.readlink(f"/proc/self/fd/{number}") for number in ("0", "1", "2")} - {"/dev/null"}
    assert not opened & own
    assert os.getsid(pid) != os.getsid(0)


def test_a_second_up_says_that_one_runs(data_cluster: Cluster) -> None:
    again = Cluster(data_cluster.home, parts=PARTS)
    with pytest.raises(AlreadyRunning, match=str(data_cluster.home)):
        again.up()
    until(lambda: data_cluster.status().healthy, 60)  # a probe may be slow on a busy machine


def test_another_home_on_the_same_ports_is_told_who_holds_them(data_cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(PortTaken) as caught:
        Cluster(tmp_path / "home", data_cluster.ports.base, parts=PARTS).up()
    assert str(data_cluster.ports.etcd_client(0)) in str(caught.value)
    assert "etcd-1, clients" in str(caught.value)
    assert f"(pid {data_cluster.status().etcd[0].pid})" in str(caught.value)
    until(lambda: data_cluster.status().healthy, 60)  # a probe may be slow on a busy machine


def test_postgres_dies_with_its_patroni(data_cluster: Cluster) -> None:
    before = leader_of(data_cluster)
    assert before.patroni_pid is not None
    assert before.pid is not None
    children = processes.find(lambda pid: processes.parent(pid) == before.pid)
    os.kill(before.patroni_pid, signal.SIGKILL)
    took_s = until(lambda: not any(map(processes.is_alive, [before.pid or 0, *children])), 5)
    assert took_s < 1.0
    # Its Patroni is started again at once, and may lead on with the lease that it still holds.
    until(lambda: is_whole(data_cluster), 60)


@pytest.mark.faults
def test_a_frozen_leaders_postgres_is_dead_before_its_lease_ends(data_cluster: Cluster) -> None:
    before = leader_of(data_cluster)
    assert before.patroni_pid is not None
    assert before.pid is not None
    os.kill(before.patroni_pid, signal.SIGSTOP)
    took_s = until(lambda: not processes.is_alive(before.pid or 0), patroni.TTL_S)
    assert patroni.WATCHDOG_TIMEOUT_S - patroni.LOOP_WAIT_S - 1 < took_s < patroni.TTL_S - 1
    until(lambda: not processes.is_alive(before.patroni_pid or 0), 5)
    until(lambda: is_whole(data_cluster), 60)


def test_a_killed_wrapper_is_started_again_and_its_node_comes_back(data_cluster: Cluster) -> None:
    shard = shard_of(data_cluster)
    standby = next(node for node in shard.nodes if node.role == "replica")
    wrapper = data_cluster.supervisor().states()[f"node-{standby.name}"].pid
    os.kill(wrapper, signal.SIGKILL)
    until(lambda: data_cluster.postmaster_pid(standby.name) not in (None, standby.pid), 30)
    assert not processes.is_alive(standby.patroni_pid or 0)
    until(lambda: is_whole(data_cluster), 60)
    assert shard_of(data_cluster).leader == shard.leader


def test_a_killed_postmaster_gives_way_and_nothing_is_lost(data_cluster: Cluster) -> None:
    execute(data_cluster, "CREATE TABLE IF NOT EXISTS kept (n int PRIMARY KEY)")
    execute(data_cluster, "INSERT INTO kept SELECT generate_series(1, 500)")
    before = leader_of(data_cluster)
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: (found := shard_of(data_cluster).leader) and found != before.name, 30)
    assert execute(data_cluster, "SELECT count(*) FROM kept") == [(500,)]
    until(lambda: is_whole(data_cluster), 60)


@pytest.mark.parametrize(
    "all_at_once", [True, pytest.param(False, marks=pytest.mark.faults)], ids=["everything", "supervisor alone"]
)
def test_all_data_is_there_after_a_kill_and_another_up(data_cluster: Cluster, all_at_once: bool) -> None:
    table = "all_killed" if all_at_once else "supervisor_killed"
    execute(data_cluster, f"CREATE TABLE {table} (n int PRIMARY KEY)")
    execute(data_cluster, f"INSERT INTO {table} SELECT generate_series(1, 1000)")
    aggregator = connect(data_cluster, data_cluster.ports.aggregator_postgres)
    with aggregator.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {table} AS SELECT generate_series(1, 1000) AS n")
    aggregator.close()
    settings = load(data_cluster.layout.settings)
    gateway, rules = Gateway(settings.etcd.endpoints), f"{settings.etcd.prefix}/patroni/s0/config"
    kept = json.loads(gateway.get(rules) or "")
    older = json.loads(json.dumps(kept))
    del older["postgresql"]["parameters"]["autovacuum_naptime"]
    gateway.put(rules, json.dumps(older))
    before = set(data_cluster.pids())
    if all_at_once:
        data_cluster.kill()
        assert data_cluster.pids() == []
    else:
        supervisor = data_cluster.supervisor().pid()
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: not data_cluster.is_running(), 5)
        assert len(data_cluster.pids()) > 10
    data_cluster.up()
    assert not before & set(data_cluster.pids())
    until(lambda: is_whole(data_cluster), 60)
    assert execute(data_cluster, f"SELECT count(*), sum(n) FROM {table}") == [(1000, 500_500)]
    assert json.loads(gateway.get(rules) or "") == kept, "a shard that was made by earlier code has the rules of this one"
    assert execute(data_cluster, "SHOW autovacuum_naptime") == [("15s",)]
    aggregator = connect(data_cluster, data_cluster.ports.aggregator_postgres)
    with aggregator.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {table}")
        assert cursor.fetchall() == [(1000,)]
    aggregator.close()


@pytest.mark.faults
def test_a_shard_is_added_while_the_others_run_on(data_cluster: Cluster) -> None:
    before = {name: state.pid for name, state in data_cluster.supervisor().states().items()}
    called: list[tuple[str, list[tuple[int, int]]]] = []
    hooks = Hooks(on_leader=lambda shard, dsn, ranges: called.append((shard, ranges)))
    data_cluster.add_shard("s1", hooks=hooks)
    assert called == [("s1", [])]
    status = data_cluster.status()
    assert [shard.name for shard in status.shards] == ["s0", "s1"]
    assert [shard.ranges for shard in status.shards] == [[(0, 65535)], []]
    assert status.shards[1].leader is not None
    after = {name: state.pid for name, state in data_cluster.supervisor().states().items()}
    assert {name: after[name] for name in before} == before
    with pytest.raises(WrongHome, match="there are s0, s1"):
        data_cluster.add_shard("s1")


@pytest.mark.faults
def test_a_shard_that_does_not_come_up_is_taken_away_again(data_cluster: Cluster) -> None:
    def refuse(shard: str, dsn: str, ranges: list[tuple[int, int]]) -> None:
        raise RuntimeError("no schema today")

    with pytest.raises(PartFailed, match="no schema today"):
        data_cluster.add_shard("s2", hooks=Hooks(on_leader=refuse))
    assert [shard.name for shard in data_cluster.status().shards] == ["s0", "s1"]
    assert not any(name.startswith("node-s2") for name in data_cluster.supervisor().states())
    until(lambda: data_cluster.status().healthy, 60)  # a probe may be slow on a busy machine


def test_down_leaves_nothing_running_and_keeps_the_data(data_cluster: Cluster) -> None:
    execute(data_cluster, "CREATE TABLE stopped (n int)")
    execute(data_cluster, "INSERT INTO stopped VALUES (7)")
    shards = [shard.name for shard in data_cluster.status().shards]
    assert data_cluster.down() is True
    assert data_cluster.pids() == []
    assert data_cluster.down() is False
    data_cluster.up()
    assert execute(data_cluster, "SELECT n FROM stopped") == [(7,)]
    assert [shard.name for shard in data_cluster.status().shards] == shards


COMMAND = [sys.executable, "-m", "cli.main"]


@pytest.mark.faults
def test_a_start_that_was_cut_off_starts_anew(cluster_folder: Path) -> None:
    """kill -9 of `up` and of everything while the shard is being made: the next `up` must not wait for its makers."""
    cluster = Cluster(cluster_folder / "cut off", free_base(), shards=("s0",), parts=("etcd", "nodes"))
    environment = {**os.environ, "ONCEPAY_HOME": str(cluster.home), "ONCEPAY_PORT_BASE": str(free_base())}
    starting = subprocess.Popen([*COMMAND, "up", "--only", "etcd,nodes"], env=environment, stdout=subprocess.DEVNULL)
    until(lambda: any(cluster.layout.nodes.glob("*/data/PG_VERSION")), 60)
    starting.kill()
    starting.wait()
    cluster.kill()
    try:
        Cluster(cluster.home, parts=("etcd", "nodes")).up()
        until(lambda: Cluster(cluster.home).status().healthy, 60)
    finally:
        cluster.down(purge=True)
    assert not cluster.home.exists()


@pytest.mark.faults
def test_an_interrupted_start_leaves_nothing_running(cluster_folder: Path) -> None:
    home = cluster_folder / "interrupted"
    environment = {**os.environ, "ONCEPAY_HOME": str(home), "ONCEPAY_PORT_BASE": str(free_base())}
    starting = subprocess.Popen(
        [*COMMAND, "up", "--only", "etcd,nodes"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        until(lambda: any(home.glob("nodes/*/data/PG_VERSION")), 60)
        starting.send_signal(signal.SIGINT)
        _, said = starting.communicate(timeout=60)
        assert starting.returncode == 130
        assert "interrupted" in said
        assert Cluster(home).pids() == []
    finally:
        starting.kill()
        Cluster(home).down(purge=True)


def test_foreground_stops_everything_on_sigterm(cluster_folder: Path) -> None:
    home = cluster_folder / "foreground"
    environment = {**os.environ, "ONCEPAY_HOME": str(home), "ONCEPAY_PORT_BASE": str(free_base())}
    command = [*COMMAND, "up", "--foreground", "--only", "etcd"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert any("Ctrl-C stops it" in line for line in process.stdout)
        assert len(Cluster(home).status().etcd) == 3
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert Cluster(home).pids() == []
    finally:
        process.kill()
        process.communicate()
        Cluster(home).down(purge=True)


@pytest.mark.faults
def test_a_part_that_does_not_come_up_is_named_with_its_log(cluster_folder: Path) -> None:
    home = cluster_folder / "broken"
    cluster = Cluster(home, free_base(), parts=("etcd",))
    cluster.layout.make()
    cluster.layout.etcd("etcd-2").write_text("in the way of its data directory")
    environment = {**os.environ, "ONCEPAY_HOME": str(home), "ONCEPAY_PORT_BASE": str(free_base())}
    done = subprocess.run([*COMMAND, "up", "--only", "etcd"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "etcd-2 didn't come up" in done.stderr
    assert "not a directory" in done.stderr
    assert cluster.pids() == []
    cluster.down(purge=True)


def test_a_deep_home_works(cluster_folder: Path) -> None:
    cluster = Cluster(cluster_folder / ("deep" * 30), free_base(), parts=("etcd",))
    cluster.up()
    try:
        assert cluster.layout.short_run.exists()
        with socket.create_connection(("127.0.0.1", cluster.ports.etcd_client(0)), 1):
            pass
        until(lambda: cluster.status().healthy, 60)
    finally:
        cluster.down(purge=True)
    assert not cluster.layout.short_run.exists()
