from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from deploy.local.errors import PortTaken
from deploy.local.ports import (
    BASES,
    MAX_SHARDS,
    NODES_PER_SHARD,
    SINGLE_PORTS,
    SPAN,
    Port,
    Ports,
    check_free,
    claim,
    free_base,
    free_port,
)


def all_ports(ports: Ports) -> list[int]:
    numbers = [ports.router, ports.keygen, ports.aggregator, ports.console, ports.stripe, ports.tipalti]
    numbers += [own(n) for own in (ports.router_own, ports.keygen_own) for n in range(2)]
    numbers += [ports.worker(shard, n) for shard in range(MAX_SHARDS) for n in range(2)]
    numbers += [of(n) for of in (ports.etcd_client, ports.etcd_peer) for n in range(3)]
    numbers += [ports.aggregator_postgres]
    for shard in range(MAX_SHARDS):
        numbers += [of(shard, n) for of in (ports.postgres, ports.patroni) for n in range(NODES_PER_SHARD)]
    return numbers


def test_every_listener_has_a_port_of_its_own_within_the_span() -> None:
    numbers = all_ports(Ports(9000))
    assert len(set(numbers)) == len(numbers)
    assert all(9000 <= number < 9000 + SPAN for number in numbers)


def test_the_agreed_ports() -> None:
    ports = Ports()
    assert (ports.router, ports.keygen, ports.aggregator, ports.console) == (8080, 8081, 8082, 8083)
    assert (ports.stripe, ports.tipalti) == (8090, 8091)
    assert [ports.worker(shard, n) - 8080 for shard in range(3) for n in range(2)] == [16, 17, 18, 19, 20, 21]
    assert ports.postgres(1, 2) == 8080 + 38
    assert ports.patroni(5, 2) == 8080 + 65


def test_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="port base"):
        Ports(65_500)
    with pytest.raises(ValueError, match="there are 6"):
        Ports().postgres(6, 0)


def test_a_taken_port_is_named_with_its_purpose_and_holder() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(PortTaken) as caught:
            check_free([Port(port, "the routers' shared port")])
    text = str(caught.value)
    assert str(port) in text
    assert "the routers' shared port" in text
    assert f"(pid {os.getpid()})" in text
    check_free([Port(port, "free again")])


def test_a_shared_listener_counts_as_taken() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(PortTaken):
            check_free([Port(listener.getsockname()[1], "shared")])


def test_a_free_base_is_below_the_ports_that_the_kernel_hands_out() -> None:
    assert free_base() + SPAN <= 32_768


def test_no_two_processes_are_given_the_same_ports() -> None:
    """Another process that looks before the first one's server listens."""
    port, base = free_port(), free_base()
    program = f"""
from deploy.local.ports import SPAN, claim
print(claim({port}), claim({base}, SPAN), claim({base} + SPAN - 1), claim({base} - SPAN, 2 * SPAN))
"""
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert asked.stdout.split() == ["False"] * 4
    assert not claim(port)
    assert not claim(base + 1)


def test_a_claim_ends_with_its_process() -> None:
    program = "from deploy.local.ports import free_port; print(free_port())"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert claim(int(made.stdout))


def test_a_port_that_somebody_listens_on_is_not_claimed() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not claim(listener.getsockname()[1])


def test_single_ports_are_of_another_range_than_bases() -> None:
    assert SINGLE_PORTS.stop <= BASES.start
