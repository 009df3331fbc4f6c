"""Faults on purpose on a running local cluster, by hand (`oncepay chaos`), in tests and in campaigns.

from deploy.local.faults import FAULTS, Hands, inflict

fault = FAULTS["kill-node"](Hands(cluster, "s0"))
inflict(fault)      # breaks it, waits until another node leads, mends it, waits until all is whole
"""

from __future__ import annotations

from deploy.local.faults.base import Fault, Moment, OnMoment, inflict
from deploy.local.faults.cuts import CutLeader, CutLeaderIn, CutLeaderOut
from deploy.local.faults.disks import CorruptPage, FullDisk, TornLog
from deploy.local.faults.hands import FaultFailed, Hands, View
from deploy.local.faults.mend import mend, would_mend
from deploy.local.faults.nodes import (
    FreezeNode,
    FreezePatroni,
    FreezePatroniSlowVoter,
    FreezeStandbys,
    FreezeStandbysKillLeader,
    KillNode,
    KillPatroni,
    KillPostgres,
    LoseStandby,
    RestartEverything,
    Switchover,
)
from deploy.local.faults.parts import KillAggregator, KillEtcd, KillEtcdMember, KillKeygen, KillRouter, KillWorker

_KINDS: tuple[type[Fault], ...] = (
    KillPostgres,
    KillPatroni,
    FreezePatroni,
    FreezePatroniSlowVoter,
    KillNode,
    FreezeNode,
    LoseStandby,
    FreezeStandbys,
    FreezeStandbysKillLeader,
    Switchover,
    CutLeader,
    CutLeaderOut,
    CutLeaderIn,
    KillEtcdMember,
    KillEtcd,
    FullDisk,
    CorruptPage,
    TornLog,
    RestartEverything,
    KillRouter,
    KillWorker,
    KillKeygen,
    KillAggregator,
)
FAULTS: dict[str, type[Fault]] = {kind.name: kind for kind in _KINDS}

__all__ = ["FAULTS", "Fault", "FaultFailed", "Hands", "Moment", "OnMoment", "View", "inflict", "mend", "would_mend"]
