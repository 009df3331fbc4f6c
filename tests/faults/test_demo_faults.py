"""Real purchases while processes are killed and Stripe misbehaves: each is charged once, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cli.demo import FAULTS
from cli.up import hooks
from cli.verify import verify_cluster
from deploy.local import Cluster
from loadtest.purchases import GOOD_CARD, Purchase, purchases
from loadtest.replay import Tally, replay
from tests.faults.witness import Milestones, Witness, kill_process, misbehaving, put_faults, until_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

COUNT = 1_200
SEED = 7
KILLS = ("router-1", "worker-s0-1", "aggregator", "router-2", "worker-s1-1", "router-1", "aggregator")
"""Killed one after the other, evenly spread over what is settled."""
COUNT_AROUND_OUTAGE = 500
OUTAGE_DEADLINE_S = 180.0
MINIMUM_MINOR = 50


def is_charged(purchase: Purchase) -> bool:
    return purchase.amount_minor >= MINIMUM_MINOR and purchase.card(SEED) == GOOD_CARD


def assert_all_ended(tally: Tally, found: Sequence[Purchase]) -> None:
    """Each purchase had the end that its card and amount give it, whatever happened on the way."""
    refused = sum(purchase.amount_minor < MINIMUM_MINOR for purchase in found)
    charged = sum(map(is_charged, found))
    assert (tally.submitted, tally.pending, tally.canceled, tally.refused) == (len(found), 0, 0, refused)
    assert (tally.succeeded, tally.failed) == (charged, len(found) - charged - refused)
    assert tally.amount_minor == sum(purchase.amount_minor for purchase in found if is_charged(purchase))


async def assert_nothing_lost(client: Witness, tally: Tally) -> None:
    """One key is one payment, and what was acknowledged is still so."""
    assert len(client.answers) == tally.submitted - tally.refused
    acknowledged = client.acknowledged()
    assert acknowledged.keys() == client.answers.keys()
    shown = await client.read_again(list(acknowledged))
    assert {key: payment.status for key, payment in shown.items()} == {
        key: payment.status for key, payment in acknowledged.items()
    }
    assert client.contradictions() == []
    assert len({payment.payment_intent for payment in shown.values()}) == len(shown)


async def assert_verified(cluster: Cluster) -> None:
    status = await until_status(cluster, lambda status: status.healthy)
    verdict = await verify_cluster(status)
    assert verdict["ok"], verdict["differences"]


async def test_purchases_while_processes_are_killed(cluster: Cluster) -> None:
    found = list(purchases(COUNT))
    status = cluster.status()
    milestones = Milestones()
    killed: dict[int, str] = {}

    async def kill_one_after_the_other() -> None:
        for number, name in enumerate(KILLS, 1):
            await milestones.reach(COUNT * number // (len(KILLS) + 1))
            killed[await kill_process(cluster, name)] = name

    async with misbehaving(status, {"seed": SEED, **FAULTS}), Witness(status) as client:
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(kill_one_after_the_other())
            replaying = group.create_task(replay(client, found, seed=SEED, on_settled=milestones.advance))
            await killing
            assert milestones.settled < COUNT, "the last kill came too late to tell anything"
        tally = replaying.result()
        assert_all_ended(tally, found)
        await assert_nothing_lost(client, tally)
        await assert_verified(cluster)
    assert sorted(killed.values()) == sorted(KILLS)
    assert killed.keys().isdisjoint(process.pid for process in cluster.status().processes)


@pytest.mark.faults
async def test_purchases_around_a_kill_of_everything(cluster: Cluster) -> None:
    found = list(purchases(COUNT_AROUND_OUTAGE))
    status = cluster.status()
    faults = {"seed": SEED, **FAULTS}
    milestones = Milestones()
    async with misbehaving(status, faults), Witness(status, deadline_s=OUTAGE_DEADLINE_S) as client:
        async with asyncio.TaskGroup() as group:
            replaying = group.create_task(replay(client, found, seed=SEED, on_settled=milestones.advance))
            await milestones.reach(COUNT_AROUND_OUTAGE // 3)
            before = client.acknowledged()
            open_before = client.answers.keys() - before.keys()
            await asyncio.to_thread(cluster.kill)
            assert cluster.pids() == []
            assert milestones.settled < COUNT_AROUND_OUTAGE, "the kill came too late to tell anything"
            await asyncio.to_thread(cluster.up, hooks=hooks(cluster))
            await put_faults(status, faults)
        tally = replaying.result()
        shown = await client.read_again([*before, *open_before])
        assert {key: shown[key].status for key in before} == {key: payment.status for key, payment in before.items()}
        assert_all_ended(tally, found)
        await assert_nothing_lost(client, tally)
        await assert_verified(cluster)
