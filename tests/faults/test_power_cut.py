"""All nodes of a shard lose their power at once, or its leader dies far ahead: who is elected then, and that somebody is."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from contextlib import suppress

import psutil
import pytest

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.faults import Hands
from oncepay.client import Oncepay
from oncepay.keys import slot
from tests.shard.store.trouble import NODES, SHARD, receivers

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(420)]

DELAY_S = 75
"""More than the payments take, the lease of the leader that is gone (20 s), and the start of two nodes."""
PAYMENTS = 12
AHEAD_MB = 40
TOLD_S = 8.0
"""Patroni tells the others every 3 s how far the leader is."""


def keys() -> list[str]:
    prefix = f"cut-{os.urandom(6).hex()}"
    tried = (f"{prefix}-{number}" for number in itertools.count())
    return list(itertools.islice((key for key in tried if slot(key) < 32_768), PAYMENTS))


def delay_replay(cluster: Cluster, hands: Hands, node: str, delay: str) -> None:
    """Have the node replay each commit so long after it was made, by its Patroni's configuration; "": at once."""
    path = cluster.layout.node(node) / "patroni.yml"
    config = json.loads(path.read_text())
    if delay:
        config["postgresql"]["recovery_conf"] = {"recovery_min_apply_delay": delay}
    else:
        config["postgresql"].pop("recovery_conf", None)
    path.write_text(json.dumps(config))
    os.kill(hands.patroni_pid(node), signal.SIGHUP)

    def is_so() -> bool:
        with suppress(Exception):  # it starts, or has become the leader
            ((leads, found),) = hands.query(node, "select not pg_is_in_recovery(), current_setting('recovery_min_apply_delay')")
            return bool(leads) or (found == "0") is (not delay)
        return False

    hands.until(is_so, f"{node} replays as it is told", 60, 0.2)


async def test_who_lacks_acknowledged_commits_is_not_elected_while_another_replays_them(cluster: Cluster) -> None:
    hands = Hands(cluster, SHARD, hooks(cluster))
    await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", 120, 0.5)
    status = await asyncio.to_thread(cluster.status)
    slow, behind = await asyncio.to_thread(hands.standbys)
    programs = {name: f"node-{name}" for name in NODES}
    await asyncio.to_thread(delay_replay, cluster, hands, slow, f"{DELAY_S}s")
    try:
        (receiver,) = await receivers(cluster, [behind])
        receiver.send_signal(signal.SIGSTOP)
        async with Oncepay(router=status.urls["router"], api_key=status.api_key) as client:
            items = [{"seller": "s", "amount": 900}]
            told = await asyncio.gather(*(client.pay(key, buyer="b", currency="usd", items=items, wait_s=0) for key in keys()))
        await asyncio.to_thread(hands.take_down, list(programs.values()))
        await asyncio.to_thread(hands.bring_up, [programs[slow], programs[behind]])
        await asyncio.to_thread(hands.until, lambda: hands.view().leader in (slow, behind), "a standby leads", 180, 0.5)
        assert hands.view().leader == slow
        async with Oncepay(router=status.urls["router"], api_key=status.api_key) as client:
            found = await asyncio.gather(*(client.get(payment.key) for payment in told))
            assert [payment.key for payment in found] == [payment.key for payment in told]
    finally:
        states = cluster.supervisor().states()
        await asyncio.to_thread(hands.bring_up, [program for program in programs.values() if states[program].pid == 0])
        await asyncio.to_thread(delay_replay, cluster, hands, slow, "")
        await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole again", 180, 0.5)


def is_barred(hands: Hands, node: str) -> bool:
    """Whether the node's Patroni is one that neither leads nor votes."""
    with suppress(Exception):  # it starts, or is started again
        return bool(json.loads(hands.patroni(node, "GET", "/patroni")[1]).get("watchdog_failed"))
    return True


async def test_who_owns_the_lease_before_its_log_is_replayed_votes_again_afterwards(cluster: Cluster) -> None:
    """As a standby does that was chosen right before the power went: its Patroni wants the watchdog at once, and gives it up for
    good when there is none."""
    hands = Hands(cluster, SHARD, hooks(cluster))
    await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", 120, 0.5)
    status = await asyncio.to_thread(cluster.status)
    slow, _ = await asyncio.to_thread(hands.standbys)
    programs = [f"node-{name}" for name in NODES]
    await asyncio.to_thread(delay_replay, cluster, hands, slow, f"{DELAY_S}s")
    try:
        async with Oncepay(router=status.urls["router"], api_key=status.api_key) as client:
            items = [{"seller": "s", "amount": 900}]
            await asyncio.gather(*(client.pay(key, buyer="b", currency="usd", items=items, wait_s=0) for key in keys()))
        await asyncio.to_thread(hands.take_down, programs)
        hands.make_leader_in_etcd(slow)
        await asyncio.to_thread(hands.bring_up, programs)
        log = cluster.layout.log(f"node-{slow}")
        wanted = "watchdog could not be activated"
        await asyncio.to_thread(hands.until, lambda: wanted in log.read_text(), "its Patroni wants the watchdog", 60, 0.5)
        await asyncio.to_thread(
            hands.until, lambda: not any(is_barred(hands, node) for node in NODES), "all of them may lead and vote", 150, 0.5
        )
    finally:
        states = cluster.supervisor().states()
        await asyncio.to_thread(hands.bring_up, [program for program in programs if states[program].pid == 0])
        await asyncio.to_thread(delay_replay, cluster, hands, slow, "")
        await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole again", 180, 0.5)


async def test_a_leader_that_dies_far_ahead_of_what_was_acknowledged_is_followed(cluster: Cluster) -> None:
    """What waits for no quorum (an index that is built, a move's backlog) may be far more log than standbys have."""
    hands = Hands(cluster, SHARD, hooks(cluster))
    await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole before", 120, 0.5)
    leader = await asyncio.to_thread(hands.leader)
    standbys = await asyncio.to_thread(hands.standbys)
    frozen = await receivers(cluster, standbys)
    try:
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        fill = f"select pg_logical_emit_message(false, 'filled', repeat('x', 1000000)) from generate_series(1, {AHEAD_MB})"
        await asyncio.to_thread(hands.query, leader, fill)
        await asyncio.sleep(TOLD_S)
        await asyncio.to_thread(hands.take_down, [f"node-{leader}"])
    finally:
        for process in frozen:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    try:
        await asyncio.to_thread(hands.until, lambda: hands.another_leads(leader), "a standby leads", 60, 0.5)
    finally:
        await asyncio.to_thread(hands.bring_up, [f"node-{leader}"])
        await asyncio.to_thread(hands.until, hands.is_whole, "the cluster is whole again", 180, 0.5)
