from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deploy.local import Cluster, NotRunning, PortTaken, WrongHome
from deploy.local.layout import SOCKET_PATH_BYTES, SUPERVISOR_SUFFIX_BYTES, Layout, Memory
from deploy.local.ports import Ports
from deploy.local.secrets import read_key


def test_a_deep_home_gets_a_short_folder_for_its_socket(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ("deep" * 20) / ("deeper" * 10))
    layout.make_socket_folder()
    path = os.fsencode(layout.supervisor_socket)
    assert len(path) + SUPERVISOR_SUFFIX_BYTES <= SOCKET_PATH_BYTES
    assert layout.short_run.stat().st_mode & 0o777 == 0o700
    layout.clean_run()
    assert not layout.short_run.exists()


def test_another_home_gets_another_short_folder(tmp_path: Path) -> None:
    assert Layout(tmp_path / "a").short_run != Layout(tmp_path / "b").short_run


def test_a_short_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ("deep" * 30))
    layout.short_run.symlink_to(tmp_path)
    try:
        with pytest.raises(WrongHome, match="somebody else's"):
            layout.make_socket_folder()
    finally:
        layout.short_run.unlink()


def test_purge_deletes_a_home_and_nothing_else(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters").write_text("dear")
    with pytest.raises(WrongHome, match="nothing was deleted"):
        Layout(other).purge()
    assert (other / "letters").exists()
    home = Layout(tmp_path / "home")
    home.make()
    home.remember(Memory(9000, ("s0",)))
    home.purge()
    assert not home.home.exists()


def test_a_home_whose_first_up_was_refused_can_be_purged(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        base = listener.getsockname()[1] - Ports(9000).etcd_client(0) + 9000
        with pytest.raises(PortTaken):
            Cluster(tmp_path / "home", base, parts=["etcd"]).up()
    assert Cluster(tmp_path / "home").down(purge=True) is False
    assert not (tmp_path / "home").exists()


def test_a_home_remembers_its_cluster(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert layout.memory() is None
    memory = Memory(9000, ("s0", "s1"), ("etcd",), ("s0",))
    layout.remember(memory)
    assert layout.memory() == memory


def test_a_home_with_data_but_no_memory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "nodes" / "s0-1" / "data").mkdir(parents=True)
    with pytest.raises(WrongHome, match="holds data"):
        Cluster(tmp_path, 9000).up()
    assert (tmp_path / "nodes" / "s0-1" / "data").exists()


def test_other_ports_than_the_homes_are_refused(tmp_path: Path) -> None:
    Layout(tmp_path).make()
    Layout(tmp_path).remember(Memory(9000, ("s0",)))
    with pytest.raises(WrongHome, match="from 9000 on, not from 9100"):
        Cluster(tmp_path, 9100).up()


def test_nothing_runs_in_a_new_home(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "home")
    with pytest.raises(NotRunning):
        cluster.status()
    assert cluster.down() is False
    assert cluster.down(purge=True) is False
    assert not (tmp_path / "home").exists()


def test_other_books_are_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk_test_abc")
    home = Layout(tmp_path / "home")
    home.make()
    home.remember(Memory(9000, ("s0",), made=("s0",)))
    with pytest.raises(WrongHome, match="another Stripe account"):
        Cluster(home.home).up(stripe_key_file=key)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (b"sk_live_abc", "live key.*sk_test_"),
        (b"rk_live_abc\n", "live key"),
        (b"pk_test_abc", "doesn't hold"),
        (b"sk_abc", "doesn't hold"),
        (b"\xff\xfe", "doesn't hold"),
        (b"", "doesn't hold"),
    ],
)
def test_only_keys_of_test_accounts_are_taken(tmp_path: Path, key: bytes, why: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(key)
    with pytest.raises(WrongHome, match=why):
        Cluster(tmp_path / "home").up(stripe_key_file=file)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("key", ["sk_test_abc", "rk_test_abc\n"])
def test_a_restricted_key_of_a_test_account_is_one(tmp_path: Path, key: str) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    assert read_key(str(file)) == key.strip()


def test_shards_keep_their_numbers_when_one_before_them_is_removed() -> None:
    memory = Memory(9000, ("s0", "s1", "s2"), made=("s0", "s1", "s2"))
    assert memory.numbers == {"s0": 0, "s1": 1, "s2": 2}
    memory = memory.without_shard("s1")
    assert (memory.shards, memory.made) == (("s0", "s2"), ("s0", "s2"))
    assert memory.numbers == {"s0": 0, "s2": 2}
    memory = memory.with_shard("s3").with_shard("s4")
    assert memory.numbers == {"s0": 0, "s2": 2, "s3": 1, "s4": 3}
