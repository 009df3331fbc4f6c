"""Faults of a shard's nodes: killed, frozen, alone or together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import psutil

from deploy.local.faults.base import Fault
from deploy.local.faults.hands import FaultFailed

SLOW_STILL_S, SLOW_RUNNING_S = 0.9, 0.1
"""A slow Patroni stands still for most of each second: it answers late, and its loop takes ten times as long."""
COMMITS_WAIT_S = 5.0


class KillPostgres(Fault):
    name = "kill-postgres"
    does = "kills the leader's postmaster (SIGKILL)"
    gap_s = 8.0

    def begin(self) -> None:
        self.target = self.hands.leader()
        self._postmaster = self.hands.postmaster_pid(self.target)
        os.kill(self._postmaster, signal.SIGKILL)

    def is_done(self) -> bool:
        if self.hands.another_leads(self.target):
            return True
        now = self.hands.cluster.postmaster_pid(self.target)
        return now not in (None, self._postmaster) and self.hands.view().leader == self.target


class _WithoutPatroni(Fault):
    """The leader's Patroni is gone or stands still, alone: its Postgres must die before another may lead."""

    gap_s = 30.0

    def begin(self) -> None:
        self.target = self.hands.leader()
        self._patroni = psutil.Process(self.hands.patroni_pid(self.target))
        self.postmaster = psutil.Process(self.hands.postmaster_pid(self.target))
        self.lived_on = False
        self.stop(self._patroni)

    def stop(self, patroni: psutil.Process) -> None:
        raise NotImplementedError

    def is_done(self) -> bool:
        another = self.hands.another_leads(self.target)
        alive = _is_alive(self.postmaster)
        if another and alive:
            self.lived_on = True
            raise FaultFailed(f"{self.target}'s Postgres lives on though another node leads")
        return another or (not alive and self._leads_again())

    def _leads_again(self) -> bool:
        now = self.hands.cluster.postmaster_pid(self.target)
        return now not in (None, self.postmaster.pid) and self.hands.view().is_whole(self.hands.names)

    def undo(self) -> None:
        if self.target:
            self.hands.thaw([self._patroni])


class KillPatroni(_WithoutPatroni):
    name = "kill-patroni"
    does = "kills the leader's Patroni alone (SIGKILL): its wrapper kills Postgres at once"

    def stop(self, patroni: psutil.Process) -> None:
        patroni.kill()


class FreezePatroni(_WithoutPatroni):
    name = "freeze-patroni"
    does = "freezes the leader's Patroni alone: its wrapper kills Postgres after 15 s without a beat, before the lease ends"
    undoes = "thaws it, if it is still there"

    def stop(self, patroni: psutil.Process) -> None:
        self.hands.freeze([patroni])


class FreezePatroniSlowVoter(FreezePatroni):
    name = "freeze-patroni-slow-voter"
    does = "freezes the leader's Patroni alone, while a standby's Patroni is so slow that it follows the old leader for long"
    undoes = "thaws it, and lets the standby's Patroni run"

    def begin(self) -> None:
        self.voter = self.hands.standbys()[0]
        self._over = threading.Event()
        self._slow = threading.Thread(target=self._slow_down, args=(psutil.Process(self.hands.patroni_pid(self.voter)),))
        self._slow.start()
        super().begin()

    def _slow_down(self, patroni: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._over.is_set():
                patroni.suspend()
                self._over.wait(SLOW_STILL_S)
                patroni.resume()
                self._over.wait(SLOW_RUNNING_S)

    def undo(self) -> None:
        if hasattr(self, "_slow"):
            self._over.set()
            self._slow.join()
        super().undo()


class KillNode(Fault):
    name = "kill-node"
    does = "kills the leader's whole node: wrapper, Patroni and Postgres at once, and keeps it down"
    undoes = "starts the node again"
    gap_s = 25.0

    def begin(self) -> None:
        self.target = self.hands.leader()
        self.hands.take_down([f"node-{self.target}"])

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)

    def undo(self) -> None:
        if self.target:
            self.hands.bring_up([f"node-{self.target}"])


class FreezeNode(Fault):
    name = "freeze-node"
    does = "freezes the leader's whole node, its watchdog too, until another leads"
    undoes = "thaws the node: it finds itself deposed"
    gap_s = 30.0

    def begin(self) -> None:
        self.target = self.hands.leader()
        self.frozen = self.hands.freeze(self.hands.tree(f"node-{self.target}"))

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)

    def undo(self) -> None:
        if self.target:
            self.hands.thaw(self.frozen)


class LoseStandby(Fault):
    name = "lose-standby"
    does = "kills one standby's whole node and keeps it down: writes go on with the other one"
    undoes = "starts the node again"
    hold_s = 10.0
    gap_s = 1.0
    slowest_s = 1.0

    def begin(self) -> None:
        self.target = self.hands.standbys()[0]
        self.hands.take_down([f"node-{self.target}"])

    def undo(self) -> None:
        if self.target:
            self.hands.bring_up([f"node-{self.target}"])


class FreezeStandbys(Fault):
    name = "freeze-standbys"
    does = "freezes both standbys: nothing is acknowledged"
    undoes = "thaws them"
    hold_s = 8.0

    def begin(self) -> None:
        names = self.hands.standbys()
        self.target = ", ".join(names)
        self.frozen = self.hands.freeze(process for name in names for process in self.hands.tree(f"node-{name}"))

    def undo(self) -> None:
        if self.target:
            self.hands.thaw(self.frozen)


class FreezeStandbysKillLeader(Fault):
    name = "freeze-standbys-kill-leader"
    does = "freezes both standbys, lets commits wait for them, kills the leader's whole node, and thaws the standbys"
    undoes = "starts the old leader again"

    def begin(self) -> None:
        standbys = self.hands.standbys()
        leader = self.hands.leader()
        frozen = self.hands.freeze(process for name in standbys for process in self.hands.tree(f"node-{name}"))
        try:
            self.commits_waited = self._await_waiting_commits(leader)
            self.target = leader
            self.hands.take_down([f"node-{leader}"])
        finally:
            self.hands.thaw(frozen)

    def _await_waiting_commits(self, leader: str) -> bool:
        """Whether some came; without traffic there is none."""
        deadline_s = time.monotonic() + COMMITS_WAIT_S
        while time.monotonic() < deadline_s:
            if self.hands.query(leader, "select 1 from pg_stat_activity where wait_event = 'SyncRep' limit 1"):
                return True
            time.sleep(0.05)
        return False

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)

    def undo(self) -> None:
        if self.target:
            self.hands.bring_up([f"node-{self.target}"])


class Switchover(Fault):
    name = "switchover"
    does = "has the leader hand over to a standby, as for planned work: nobody sees an error"
    undoes = "nothing"
    gap_s = 8.0
    slowest_s = 8.0

    def begin(self) -> None:
        self.target = self.hands.leader()
        self.hands.until(self._is_taken, f"{self.target} may hand over", 60.0, look_s=1.0)

    def _is_taken(self) -> bool:
        """Patroni refuses while it knows no standby that is fit."""
        status, text = self.hands.patroni(self.target, "POST", "/switchover", {"leader": self.target})
        if status not in (200, 412, 503):
            raise FaultFailed(f"{self.target}'s Patroni refuses a switchover: {status} {text}")
        return status == 200 or self.hands.another_leads(self.target)

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)


class RestartEverything(Fault):
    name = "restart-everything"
    does = "kills every process of the cluster at once, as if the machine had lost its power, and starts it again"
    undoes = "nothing"

    def begin(self) -> None:
        self.target = "every process"
        self.hands.cluster.kill()

    def undo(self) -> None:
        if self.target and not self.hands.cluster.is_running():
            self.hands.cluster.up(hooks=self.hands.hooks)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
