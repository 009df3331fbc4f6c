"""All nodes of a shard are lost: one that was restored from its backup and its log takes its place, and nothing is missing."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.main import main
from cli.up import hooks
from deploy.local import Cluster
from deploy.local.ports import free_base
from tests.faults.witness import Witness

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

ITEMS = [{"seller": "s", "amount": 1000}]
GONE_S = 60.0
"""Patroni's records of nodes that are gone live on for their time in etcd."""


@pytest.fixture
async def lonely(cluster_folder: Path) -> AsyncIterator[Cluster]:
    """A cluster of its own with one shard, which is going to be lost."""
    made = Cluster(cluster_folder / "lost", free_base(), shards=("s0",))
    await asyncio.to_thread(made.up, hooks=hooks(made))
    try:
        yield made
    finally:
        await asyncio.to_thread(made.down, purge=True)


async def run(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    result = await asyncio.to_thread(CliRunner().invoke, main, [*arguments, "--output", "json"], env=env)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


async def pay(witness: Witness, count: int) -> None:
    keys = [f"lost-{os.urandom(6).hex()}" for _ in range(count)]
    pays = [witness.pay(key, buyer="b", currency="usd", items=ITEMS, payment_method="pm_card_visa", wait_s=30) for key in keys]
    assert {view.status for view in await asyncio.gather(*pays)} == {"succeeded"}


async def lose(cluster: Cluster) -> None:
    """All nodes and workers of s0 are gone, and Patroni's records of them."""
    names = [process.name for process in cluster.status().processes if process.name.startswith(("node-s0-", "worker-s0-"))]
    await asyncio.to_thread(cluster.supervisor().stop, names, wait=False)
    async with asyncio.timeout(GONE_S):
        while (await run(cluster, "shards", "list"))["shards"][0]["nodes"]:
            await asyncio.sleep(0.5)


async def test_a_restored_shard_takes_the_place_of_a_lost_one(lonely: Cluster) -> None:
    async with Witness(lonely.status()) as witness:
        await pay(witness, 10)
        await run(lonely, "shards", "backup", "s0")
        await pay(witness, 10)
        await run(lonely, "shards", "restore", "s0", "--as", "s5")
        compared = await run(lonely, "shards", "compare", "s5")
        assert compared["ok"]
        assert compared["payments"] == 20
        refused = await run(lonely, "shards", "accept", "s5", "--yes", code=WRONG)
        assert "in touch with etcd" in refused["error"]["detail"]

        await lose(lonely)
        planned = await run(lonely, "shards", "accept", "s5", "--dry-run")
        assert planned["ranges"] == [[0, 65_535]]
        accepted = await run(lonely, "shards", "accept", "s5", "--yes")
        assert accepted["map_version"] == planned["map_version"]
        assert accepted["payouts_held"] is None, "it lacks nothing"
        acknowledged = witness.acknowledged()
        assert len(acknowledged) == 20
        again = await witness.read_again(list(acknowledged))
        assert {key: view.status for key, view in again.items()} == {key: view.status for key, view in acknowledged.items()}
        await pay(witness, 5)
        assert witness.contradictions() == []
    await run(lonely, "shards", "remove", "s0", "--dead", "--yes")
    assert [shard["name"] for shard in (await run(lonely, "shards", "list"))["shards"]] == ["s5"]
    await run(lonely, "shards", "resnapshot", "s5")
    verified = await run(lonely, "verify")
    assert verified["ok"], verified["differences"]


async def test_a_refund_that_was_lost_holds_payout_runs_until_it_is_taken_in(lonely: Cluster) -> None:
    async with Witness(lonely.status()) as witness:
        await pay(witness, 2)
        key = next(iter(witness.acknowledged()))
        await run(lonely, "shards", "backup", "s0")
        await asyncio.sleep(1.5)  # a moment of the log that is between two commits for sure
        moment = dt.datetime.now(dt.UTC)
        await asyncio.sleep(1.5)
        refunded = await run(lonely, "payments", "refund", key, "--amount", "300", "--name", "r1")
        assert refunded["amount_refunded"] == 300
        await run(lonely, "shards", "backup", "s0", "--log-only")
    await lose(lonely)
    await run(lonely, "shards", "restore", "s0", "--as", "s5", "--to-time", moment.isoformat())
    compared = await run(lonely, "shards", "compare", "s5", code=WRONG)
    [missing] = compared["stripe"]["after"]
    assert (missing["what"], missing["kind"], missing["key"], missing["amount"]) == ("missing", "refund", key, 300)
    assert not compared["stripe"]["differences"]
    assert compared["tipalti"]["asked"]

    accepted = await run(lonely, "shards", "accept", "s5", "--yes")
    assert accepted["payouts_held"] == "1 refunds are missing"
    held = await run(lonely, "payouts", "run", code=WRONG)
    assert "payouts release s5" in held["error"]["detail"]
    assert (await run(lonely, "payments", "show", key))["amount_refunded"] == 0, "nobody takes it in by himself"
    adopted = await run(lonely, "shards", "adopt", "s5")
    assert (adopted["payments"], adopted["left"]) == (1, [])
    shown = await run(lonely, "payments", "show", key)
    assert [(each["key"], each["amount"]) for each in shown["refunds"]] == [("r1", 300)]
    assert (await run(lonely, "shards", "compare", "s5"))["ok"]
    again = await run(lonely, "payments", "refund", key, "--amount", "300", "--name", "r1")
    assert again["amount_refunded"] == 300

    await run(lonely, "shards", "remove", "s0", "--dead", "--yes")
    await run(lonely, "shards", "resnapshot", "s5")
    assert (await run(lonely, "payouts", "release", "s5"))["released"]
    await run(lonely, "payouts", "run")
    verified = await run(lonely, "verify")
    assert verified["ok"], verified["differences"]
