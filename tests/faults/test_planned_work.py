"""Planned work on a shard that takes payments: nobody sees an error, and nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.main import main
from cli.shards import shards
from deploy.local import Cluster
from oncepay.keys import slot
from tests.faults.witness import Witness, until_status

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

BUYERS = 4
ITEMS = [{"seller": "s", "amount": 1000}]
BACK_S = 60.0


async def run(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    result = await asyncio.to_thread(CliRunner().invoke, shards, [*arguments, "--output", "json"], env=env)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def key_of_s0(prefix: str) -> str:
    return next(key for key in (f"{prefix}-{os.urandom(6).hex()}" for _ in range(1000)) if slot(key) < 32_768)


@asynccontextmanager
async def paying(cluster: Cluster) -> AsyncIterator[tuple[Witness, list[float]]]:
    """Buyers pay on s0 meanwhile, and how long each answer took. An answer that is an error fails the test."""
    stop = asyncio.Event()
    took_s: list[float] = []

    async def buyer(witness: Witness) -> None:
        while not stop.is_set():
            began_s = time.monotonic()
            await witness.pay(key_of_s0("p"), buyer="b", currency="usd", items=ITEMS, payment_method="pm_card_visa", wait_s=30)
            took_s.append(time.monotonic() - began_s)

    async with Witness(await asyncio.to_thread(cluster.status)) as witness:
        buyers = [asyncio.create_task(buyer(witness)) for _ in range(BUYERS)]
        try:
            yield witness, took_s
        finally:
            stop.set()
            await asyncio.gather(*buyers)


async def whole(cluster: Cluster) -> None:
    """Until all nodes of s0 may be elected again."""
    async with asyncio.timeout(BACK_S):
        while True:
            shown = await run(cluster, "show", "s0")
            voting = [
                standby for standby in (shown["facts"] or {"standbys": []})["standbys"] if standby["sync_state"] == "quorum"
            ]
            if len(voting) == 2 and len(shown["voters"]) == 2:
                return
            await asyncio.sleep(0.5)


async def test_a_rolling_restart_costs_nobody_an_error(cluster: Cluster) -> None:
    await whole(cluster)
    before = {node.name: node.pid for shard in cluster.status().shards for node in shard.nodes if shard.name == "s0"}
    async with paying(cluster) as (witness, took_s):
        done = await run(cluster, "restart", "s0")
        assert len([step for step in done["steps"] if step.startswith("restart")]) == 3
        await whole(cluster)
    after = {node.name: node.pid for shard in cluster.status().shards for node in shard.nodes if shard.name == "s0"}
    assert all(after[name] not in (None, pid) for name, pid in before.items())
    assert took_s
    acknowledged = witness.acknowledged()
    async with Witness(await asyncio.to_thread(cluster.status)) as reader:
        again = await reader.read_again(list(acknowledged))
    assert {key: view.status for key, view in again.items()} == {key: view.status for key, view in acknowledged.items()}
    assert witness.contradictions() == []
    print(f"rolling restart: {done['seconds']} s, {len(took_s)} payments, longest answer {max(took_s):.1f} s")


async def test_a_planned_switchover_goes_where_it_was_asked_to(cluster: Cluster) -> None:
    await whole(cluster)
    planned = await run(cluster, "switchover", "s0", "--dry-run")
    other = next(name for name in ("s0-1", "s0-2", "s0-3") if name not in (planned["from"], planned["to"]))
    async with paying(cluster) as (witness, took_s):
        done = await run(cluster, "switchover", "s0", "--to", other)
        await whole(cluster)
    assert (done["from"], done["to"]) == (planned["from"], other)
    await until_status(cluster, lambda status: any(shard.leader == other for shard in status.shards))
    assert witness.contradictions() == []
    print(f"switchover: acknowledged again after {done['seconds']} s, longest answer {max(took_s):.1f} s")
    refused = await run(cluster, "switchover", "s0", "--to", other, code=WRONG)
    assert "leads already" in refused["error"]["detail"]


async def test_a_shard_restored_to_a_moment_names_what_stripe_knows_beyond_it(cluster: Cluster) -> None:
    await whole(cluster)
    status = await asyncio.to_thread(cluster.status)

    async def pay(witness: Witness, prefix: str, count: int) -> set[str]:
        keys = [key_of_s0(prefix) for _ in range(count)]
        done = [
            witness.pay(key, buyer="b", currency="usd", items=ITEMS, payment_method="pm_card_visa", wait_s=30) for key in keys
        ]
        assert {view.status for view in await asyncio.gather(*done)} == {"succeeded"}
        return set(keys)

    async with Witness(status) as witness:
        early = await pay(witness, "early", 5)
        backup = (await run(cluster, "backup", "s0"))["backup"]
        between = await pay(witness, "between", 5)
        moment = dt.datetime.now(dt.UTC)
        late = await pay(witness, "late", 5)
    try:
        restored = await run(cluster, "restore", "s0", "--as", "s5", "--to-time", moment.isoformat())
        assert restored["backup"] == backup["id"]
        found = await run(cluster, "compare", "s5", code=WRONG)
        assert found["owns"] == []
        missing = {each["key"] for each in found["stripe"]["differences"] if each["what"] == "missing"}
        assert late <= missing, "each payment that Stripe knows and the shard doesn't is named"
        assert not missing & (early | between), "what was there at the moment is there"
        [beside] = [each for each in found["beside_owners"] if each["owner"] == "s0"]
        assert late <= {each["key"] for each in beside["differences"] if each["what"] == "missing"}
        assert set(beside["counts"]) <= {"same", "missing", "older"}, "it has nothing that the owner hasn't"
        facts = (await run(cluster, "show", "s5"))["facts"]
        assert facts["incarnation"] == restored["incarnation"]
        assert facts["ranges"] == []
        env = {"ONCEPAY_HOME": str(cluster.home)}
        move = ["reshard", "plan", "--range", "0-99", "--to", "s5", "--dry-run", "--output", "json"]
        refused = await asyncio.to_thread(CliRunner().invoke, main, move, env=env)
        assert "may take slots" in json.loads(refused.stdout)["error"]["detail"], "nothing moves to a shard with others' rows"
        async with Witness(status) as witness:
            key = key_of_s0("after")
            view = await witness.pay(key, buyer="b", currency="usd", items=ITEMS, payment_method="pm_card_visa", wait_s=30)
            assert view.status == "succeeded", "the original works on"
    finally:
        await run(cluster, "remove", "s5", "--yes")
    assert "s5" not in {shard["name"] for shard in (await run(cluster, "list"))["shards"]}
    assert not (cluster.layout.node("s5-1")).exists()


async def test_a_shard_is_added_with_its_workers_and_removed_again(cluster: Cluster) -> None:
    await whole(cluster)
    added = await run(cluster, "add", "s5")
    try:
        shown = await run(cluster, "show", "s5")
        assert shown["ranges"] == shown["facts"]["ranges"] == []
        workers = [process for process in cluster.status().processes if process.name.startswith("worker-s5-")]
        assert workers
        assert all(process.pid for process in workers)
        assert [slot["active"] for slot in shown["facts"]["slots"] if slot["slot"] == "oncepay_feed"] == [True]
    finally:
        await run(cluster, "remove", "s5", "--yes")
    assert not [process for process in cluster.status().processes if "s5" in process.name]
    assert "s5" not in {shard["name"] for shard in (await run(cluster, "list"))["shards"]}
    print(f"added in {added['seconds']} s")
