"""When a node's watchdog is hidden from its Patroni, and when it is shown again."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.programs import postgres_bin
from deploy.replay import HELD, LOOK_S, Hold, log_end
from tests.postgres_fixture import PostgresServer

pytestmark = pytest.mark.cluster


@contextmanager
def patroni(state: dict[str, object]) -> Iterator[str]:
    """Something that answers as Patroni's API does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.0 503 x\r\n\r\n" + json.dumps(state).encode())

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def hold(folder: Path, data: Path, address: str) -> tuple[Hold, Path]:
    pipe, config = folder / "watchdog", folder / "patroni.yml"
    pipe.touch()
    config.write_text(json.dumps({"postgresql": {"bin_dir": str(postgres_bin())}, "restapi": {"connect_address": address}}))
    return Hold(str(pipe), str(config), str(data), print), pipe


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """The data of a standby that was killed, with something in its log."""
    with PostgresServer() as server:
        server.new_database()
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        server.stop()
        yield server.data_dir


def test_a_node_that_was_killed_is_held_until_its_log_is_replayed(tmp_path: Path, killed: Path) -> None:
    end = log_end(str(killed), str(postgres_bin()))
    assert end is not None
    state: dict[str, object] = {"role": "replica", "timeline": end[0], "xlog": {"replayed_location": end[1]}}
    with patroni(state) as address:
        held, pipe = hold(tmp_path, killed, address)
        held.begin(0.0)
        assert not pipe.exists()
        assert Path(f"{pipe}{HELD}").exists()
        held.look(LOOK_S)
        assert not pipe.exists()
        state["xlog"] = {"replayed_location": end[1] + 1}
        held.look(LOOK_S + 0.1)
        assert not pipe.exists(), "it is looked at twice a second"
        held.look(2 * LOOK_S)
        assert pipe.exists()
        held.look(3 * LOOK_S)
        assert held.look_s is None
        assert not held.given_up


def test_a_patroni_that_wanted_the_watchdog_meanwhile_is_found_out(tmp_path: Path, killed: Path) -> None:
    state: dict[str, object] = {"role": "replica", "timeline": 1, "xlog": {"replayed_location": 0}, "watchdog_failed": True}
    with patroni(state) as address:
        held, _ = hold(tmp_path, killed, address)
        held.begin(0.0)
        held.look(LOOK_S)
        state["replication_state"] = "streaming"
        held.look(2 * LOOK_S)
        assert not held.given_up, "what it said was from before it was shown"
        held.look(3 * LOOK_S)
        assert held.given_up
        assert held.look_s is None


def test_a_node_that_led_is_not_held(tmp_path: Path) -> None:
    """Patroni has it replayed first, and wants the watchdog at once where the node owns the lease still."""
    with PostgresServer() as server:
        server.stop()
        held, pipe = hold(tmp_path, server.data_dir, "127.0.0.1:1")
        held.begin(0.0)
        assert pipe.exists()
        assert held.look_s is None


@pytest.mark.parametrize("change", [{"replication_state": "streaming"}, {"role": "primary"}, {"timeline": 9}])
def test_whom_a_leader_leads_is_held_no_longer(tmp_path: Path, killed: Path, change: dict[str, object]) -> None:
    state: dict[str, object] = {"role": "replica", "timeline": 1, "xlog": {"replayed_location": 0}}
    with patroni(state) as address:
        held, pipe = hold(tmp_path, killed, address)
        held.begin(0.0)
        held.look(LOOK_S)
        assert not pipe.exists()
        state.update(change)
        held.look(2 * LOOK_S)
        assert pipe.exists()


def test_nobody_is_held_without_data(tmp_path: Path) -> None:
    held, pipe = hold(tmp_path, tmp_path / "data", "127.0.0.1:1")
    held.begin(0.0)
    assert pipe.exists()
    assert held.look_s is None
