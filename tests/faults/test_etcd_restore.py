"""etcd made anew from an old snapshot: nothing acknowledged is lost, no key comes twice, and the map is the shards' own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner

from cli.common import WRONG
from cli.etcd import etcd
from deploy.local import Cluster
from deploy.local.etcd import Gateway
from oncepay.keys import slot
from tests.faults.test_planned_work import ITEMS, key_of_s0, whole
from tests.faults.test_planned_work import run as run_shards
from tests.faults.witness import Witness

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SPLIT = 1000
PAYMENTS = 20
NEWER = 7
"""A map's version after the snapshot."""


async def run(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    result = await asyncio.to_thread(CliRunner().invoke, etcd, [*arguments, "--output", "json"], env=env)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


async def split_in_two(cluster: Cluster, version: int) -> None:
    """Cut the range of s0, in its own table and in the map, as a move does: a router with the old map is refused from then on."""
    shown = await run_shards(cluster, "show", "s0")
    leader = next(node for node in shown["nodes"] if node["name"] == shown["leader"])
    postgres = cluster.settings.postgres
    connection = await asyncpg.connect(
        host=leader["host"],
        port=leader["port"],
        user=postgres.superuser,
        password=postgres.superuser_password,
        database=postgres.database,
    )
    try:
        async with connection.transaction():
            await connection.execute("delete from oncepay.ranges")
            rows = [(0, SPLIT - 1, version), (SPLIT, 32_767, version)]
            await connection.executemany("insert into oncepay.ranges (first, last, map_version) values ($1, $2, $3)", rows)
    finally:
        await connection.close()
    ranges = [(0, SPLIT - 1, "s0"), (SPLIT, 32_767, "s0"), (32_768, 65_535, "s1")]
    record = {"version": version, "ranges": [{"first": first, "last": last, "shard": shard} for first, last, shard in ranges]}
    Gateway(cluster.settings.etcd.endpoints).put("/oncepay/map", json.dumps(record))


def the_map(cluster: Cluster) -> dict[str, Any]:
    text = Gateway(cluster.settings.etcd.endpoints).get("/oncepay/map")
    assert text is not None
    found: dict[str, Any] = json.loads(text)
    return found


async def pay(cluster: Cluster, count: int) -> dict[str, str]:
    """Payments of s0, beyond the cut; their ends by key."""
    keys: list[str] = []
    while len(keys) < count:
        key = key_of_s0("etcd")
        if slot(key) >= SPLIT:
            keys.append(key)
    async with Witness(await asyncio.to_thread(cluster.status)) as witness:
        pays = [
            witness.pay(key, buyer="b", currency="usd", items=ITEMS, payment_method="pm_card_visa", wait_s=30) for key in keys
        ]
        return {view.key: view.status for view in await asyncio.gather(*pays)}


async def take_keys(cluster: Cluster, count: int) -> list[str]:
    async with Witness(await asyncio.to_thread(cluster.status)) as client:
        return list(await client.keys(count))


async def test_etcd_made_anew_from_an_old_snapshot(cluster: Cluster, tmp_path: Path) -> None:
    await whole(cluster)
    issued = await take_keys(cluster, 1000)
    snapshot = tmp_path / "etcd.snapshot"
    saved = await run(cluster, "backup", str(snapshot))
    assert saved["keys"] > 0
    assert snapshot.stat().st_mode & 0o777 == 0o600
    refused = await run(cluster, "backup", str(snapshot), code=WRONG)
    assert "is there already" in refused["error"]["detail"]

    # What the snapshot doesn't know: another map, another leader, a standby that has been away.
    version = max(NEWER, the_map(cluster)["version"] + 1)
    await split_in_two(cluster, version)
    moved = await run_shards(cluster, "switchover", "s0")
    behind = next(name for name in ("s0-1", "s0-2", "s0-3") if name not in (moved["from"], moved["to"]))
    await whole(cluster)
    await asyncio.to_thread(cluster.supervisor().stop, [f"node-{behind}"])
    paid = await pay(cluster, PAYMENTS)
    assert set(paid.values()) == {"succeeded"}
    issued += await take_keys(cluster, 1000)

    done = await run(cluster, "restore", str(snapshot), "--yes")
    assert done["retired"] >= 1
    assert done["map_changed"]
    assert done["map_version"] == the_map(cluster)["version"] > version
    assert [item["first"] for item in the_map(cluster)["ranges"]] == [0, SPLIT, 32_768]
    assert Path(done["kept"]).is_dir()
    shown = await run_shards(cluster, "show", "s0")
    assert shown["leader"] != behind, "a node that lacks what was acknowledged doesn't lead"

    async with Witness(await asyncio.to_thread(cluster.status)) as witness:
        again = await witness.read_again(list(paid))
    assert {key: view.status for key, view in again.items()} == paid
    assert set((await pay(cluster, 5)).values()) == {"succeeded"}, "routers follow the map that was made from the shards"
    issued += await take_keys(cluster, 2000)
    assert len(set(issued)) == len(issued)
    settled = await run(cluster, "settle")
    assert not settled["map_changed"]
    await whole(cluster)


async def test_what_is_no_snapshot_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(b"nothing like a snapshot" * 1000)
    before = the_map(cluster)
    refused = await run(cluster, "restore", str(tmp_path / "no"), "--yes", code=WRONG)
    assert refused["error"]["type"] == "etcd-snapshot-failed"
    await run(cluster, "restore", str(tmp_path / "missing"), "--yes", code=WRONG)
    assert the_map(cluster) == before
    assert cluster.is_running()
