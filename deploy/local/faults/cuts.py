"""Faults of the network: the leader cut off from all others, from etcd and from the services."""

from __future__ import annotations

from typing import ClassVar

from deploy.local.cluster import Cluster
from deploy.local.faults.base import Fault
from deploy.local.network import Way


class CutLeader(Fault):
    name = "cut-leader"
    does = "cuts the leader off both ways, until another leads (needs a cluster that was started with --netns)"
    undoes = "joins it again: it finds itself deposed"
    gap_s = 30.0
    way: ClassVar[Way] = "both"

    @classmethod
    def is_possible(cls, cluster: Cluster) -> bool:
        return cluster.network is not None

    def begin(self) -> None:
        leader = self.hands.leader()
        self.hands.cut(leader, self.way)
        self.target = leader

    def is_done(self) -> bool:
        return self.hands.another_leads(self.target)

    def undo(self) -> None:
        if self.target:
            self.hands.join(self.target)


class CutLeaderOut(CutLeader):
    name = "cut-leader-out"
    does = "loses every packet from the leader, while those to it arrive, until another leads (needs --netns)"
    way = "out"


class CutLeaderIn(CutLeader):
    name = "cut-leader-in"
    does = "loses every packet to the leader, while those from it arrive, until another leads (needs --netns)"
    way = "in"
