"""Faults of a node's disk: full, a page gone bad, the end of the log torn off."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from deploy.local.cluster import Cluster
from deploy.local.faults.base import Fault
from deploy.local.faults.hands import FaultFailed
from deploy.node import SMALL_DISK_FILE

PAGE_BYTES = 8192
SEGMENT_BYTES = 16 * 1024 * 1024
SEGMENTS_PER_ID = 0x1_0000_0000 // SEGMENT_BYTES
TORN_BYTES = 3000
"""Less than a page of log, so that the tear is within it."""
SPARE_MIB = 256
"""What a small disk has beyond the data, for logs and a base backup."""
FILLER = "oncepay-filler"
REBUILT_S = 120.0
READ_ALL = "select coalesce(sum(length(payments::text)), 0) from oncepay.payments"
CHECKSUM_ERRORS = ("XX001", "XX002")


class CorruptPage(Fault):
    name = "corrupt-page"
    does = (
        "flips bytes of a page of a standby's payments: its checksum tells, and the node gives an error rather than a wrong row"
    )
    undoes = "makes the standby anew from the leader (Patroni's reinitialize)"

    def begin(self) -> None:
        leader, node = self.hands.leader(), self.hands.standbys()[0]
        self.hands.query(leader, "checkpoint")  # what is in files only is there on the standby after its restartpoint
        [(relation, size)] = self.hands.query(
            leader, "select pg_relation_filepath('oncepay.payments'), pg_relation_size('oncepay.payments')"
        )
        if size < PAGE_BYTES:
            raise FaultFailed("there are no payments yet whose page could go bad: make some first")
        self.hands.query(node, "checkpoint")
        self.target = node
        self.hands.take_down([f"node-{node}"])
        path = self.hands.cluster.layout.node(node) / "data" / str(relation)
        with open(path, "r+b") as file:
            file.seek(PAGE_BYTES // 2)
            before = file.read(64)
            file.seek(PAGE_BYTES // 2)
            file.write(bytes(byte ^ 0xFF for byte in before))
        self.hands.bring_up([f"node-{node}"])

    def is_done(self) -> bool:
        """A read of the page fails by its checksum, or the standby can't go on with it at all."""
        import psycopg2

        try:
            self.hands.query(self.target, READ_ALL)
        except psycopg2.OperationalError:
            return self._says_so()
        except psycopg2.Error as error:
            return error.pgcode in CHECKSUM_ERRORS
        return False

    def _says_so(self) -> bool:
        log = self.hands.cluster.layout.log(f"node-{self.target}").read_text(errors="replace")
        return "invalid page in block" in log[-200_000:]

    def undo(self) -> None:
        if self.target:
            rebuild(self)


def rebuild(fault: Fault) -> None:
    """Make the node anew from a base backup of the leader."""

    def is_taken() -> bool:
        with contextlib.suppress(OSError):
            status, _ = fault.hands.patroni(fault.target, "POST", "/reinitialize", {"force": True})
            return status == 200
        return False

    fault.hands.until(is_taken, f"{fault.target}'s Patroni makes it anew", REBUILT_S, look_s=1.0)


class TornLog(Fault):
    name = "torn-wal"
    does = "kills a standby's whole node and tears off the end of its log, which it had acknowledged; the leader sends it again"

    def begin(self) -> None:
        node = self.hands.standbys()[0]
        [(timeline, lsn)] = self.hands.query(
            node,
            "select received_tli, (pg_last_wal_receive_lsn() - '0/0'::pg_lsn)::bigint from pg_stat_wal_receiver",
        )
        self.target = node
        self.hands.take_down([f"node-{node}"])
        tear(self.hands.cluster.layout.node(node) / "data" / "pg_wal", int(timeline), int(lsn))
        self.torn_at = int(lsn) - TORN_BYTES
        self.hands.bring_up([f"node-{node}"])

    def is_done(self) -> bool:
        state = self.hands.view().nodes.get(self.target)
        return state is not None and state.streaming and (state.lsn or 0) > self.torn_at + TORN_BYTES


def tear(folder: Path, timeline: int, lsn: int) -> None:
    """Write nonsense over the last TORN_BYTES of the log before `lsn`, as a disk that lied about its flush leaves it."""
    number, end = divmod(lsn, SEGMENT_BYTES)
    start = max(0, end - TORN_BYTES)
    if end == 0:
        number, start, end = number - 1, SEGMENT_BYTES - TORN_BYTES, SEGMENT_BYTES
    path = folder / f"{timeline:08X}{number // SEGMENTS_PER_ID:08X}{number % SEGMENTS_PER_ID:08X}"
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * (end - start))


class FullDisk(Fault):
    name = "full-disk"
    does = "moves a node onto a small disk of its own (a tmpfs), has it lead, and fills that disk to the last byte"
    undoes = "deletes what filled it, and puts the node back on its own disk"
    gap_s = 30.0

    @classmethod
    def is_possible(cls, cluster: Cluster) -> bool:
        del cluster
        return os.geteuid() == 0

    def prepare(self) -> None:
        if os.geteuid() != 0:
            raise FaultFailed("a small disk in a mount namespace needs root")
        node = self.hands.standbys()[0]
        self._marker = self.hands.cluster.layout.node(node) / SMALL_DISK_FILE
        self.target = node
        self._settle(node)
        self._lead(node)

    def begin(self) -> None:
        with open(self._folder() / FILLER, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()

    def _settle(self, node: str) -> None:
        """Start the standby anew, on an empty small disk: Patroni copies the leader onto it."""
        [(size,)] = self.hands.query(self.hands.leader(), "select sum(pg_database_size(oid))::bigint from pg_database")
        self.hands.take_down([f"node-{node}"])
        self._marker.write_text(str((int(size) >> 20) + SPARE_MIB), encoding="ascii")
        self.hands.bring_up([f"node-{node}"])
        self.hands.until(self.hands.is_whole, f"{node} is there on its small disk", REBUILT_S, look_s=0.5)

    def _lead(self, node: str) -> None:
        leader = self.hands.leader()

        def is_taken() -> bool:
            body = {"leader": leader, "candidate": node}
            status, _ = self.hands.patroni(leader, "POST", "/switchover", body)
            return status == 200 or self.hands.leader() == node

        self.hands.until(is_taken, f"{node} may lead", 60.0, look_s=1.0)
        self.hands.until(self.hands.is_whole, f"{node} leads", REBUILT_S, look_s=0.5)
        if self.hands.leader() != node:
            raise FaultFailed(f"{node} should lead, but doesn't")

    def _folder(self) -> Path:
        """The small disk, as the node sees it."""
        wrapper = self.hands.tree(f"node-{self.target}")[0]
        inside = f"/proc/{wrapper.pid}/root{self.hands.cluster.layout.node(self.target) / 'data'}"
        return Path(inside)

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)

    def undo(self) -> None:
        if not self.target:
            return
        with contextlib.suppress(OSError, IndexError):
            (self._folder() / FILLER).unlink()
        self._marker.unlink(missing_ok=True)
        self.hands.take_down([f"node-{self.target}"])
        self.hands.bring_up([f"node-{self.target}"])
