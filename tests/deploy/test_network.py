"""Namespaces of nodes: addresses that no two clusters share, and cuts that are silent and can be taken back."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.local.network import Network, NetworkFailed, Way, why_not
from deploy.local.ports import NODES_PER_SHARD, SPAN, free_base
from tests.needs import needs

SERVER = """import socket, sys
server = socket.create_server((sys.argv[1], 9))
print("ready", flush=True)
taken = [server.accept() for _ in range(9)]
"""
REACH_S = 0.5


def test_no_two_clusters_have_addresses_in_common() -> None:
    bases = range(1024, 65_536 - SPAN, SPAN)
    assert len({Network(base).subnet for base in bases}) == len(bases)
    network = Network(35_000)
    addresses = [network.host, *(network.address(shard, node) for shard in range(6) for node in range(3))]
    assert len(set(addresses)) == 19
    assert all(len(Network(base).namespace(5, 2)) <= 15 for base in bases)  # the length of an interface's name


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(free_base())
    made.make(1)
    try:
        yield made
    finally:
        made.remove()
        assert made.namespaces() == []


@needs(not why_not(), "root, ip and nsenter")
def test_what_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that the namespace refuses comes after its bridge and cable."""
    network = Network(free_base())
    monkeypatch.setattr(Network, "address", lambda *_: "256.0.0.1")
    with pytest.raises(NetworkFailed):
        network.make(1)
    assert network.namespaces() == []
    assert not os.path.exists(f"/sys/class/net/{network.bridge}")


@needs(not why_not(), "root, ip and nsenter")
def test_a_shard_gets_the_number_of_one_that_was_removed(network: Network) -> None:
    """Also when that one's namespaces were left behind."""
    network.add(1)
    network.add(1)
    assert len(network.namespaces()) == 2 * NODES_PER_SHARD
    network.remove_shard(1)
    network.remove_shard(1)
    assert network.namespaces() == [network.namespace(0, node) for node in range(NODES_PER_SHARD)]


@contextlib.contextmanager
def listening(network: Network, node: int) -> Iterator[None]:
    command = [*network.enter(0, node), sys.executable, "-S", "-c", SERVER, network.address(0, node)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            server.kill()


def reaches(network: Network, node: int) -> bool:
    """Whether the host can connect to the node."""
    try:
        socket.create_connection((network.address(0, node), 9), REACH_S).close()
    except TimeoutError:
        return False
    return True


@needs(not why_not(), "root, ip and nsenter")
@pytest.mark.parametrize("way", ["both", "in", "out"])
def test_a_node_that_is_cut_off_is_not_reached_until_it_is_joined(network: Network, way: Way) -> None:
    with listening(network, 0), listening(network, 1):
        assert reaches(network, 0)
        network.cut(0, 0, way)
        assert not reaches(network, 0)
        assert reaches(network, 1)
        network.join(0, 0)
        assert reaches(network, 0)
