"""`oncepay shards check-cache`: the comparison, and a whole cluster whose caches are right, then wrong."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from click.testing import CliRunner

from cli.common import UNREACHABLE, USAGE, WRONG
from cli.needed import Part
from cli.resnapshot import _all
from cli.shards import shards
from cli.shards.check_cache import differing
from deploy.local import Cluster
from oncepay.etcd import Etcd
from oncepay.moves import MOVES_PREFIX, Move


def test_differing_names_what_is_missing_extra_or_in_another_state() -> None:
    cache = {"same": (1, "created"), "extra": (1, "created"), "older": (1, "created"), "status": (2, "created")}
    table = {"same": (1, "created"), "missing": (1, "created"), "older": (2, "created"), "status": (2, "attempted")}
    assert differing(cache, table) == {"extra", "missing", "older", "status"}
    assert differing({}, {}) == set()


def test_without_a_cluster(tmp_path: Path) -> None:
    result = CliRunner().invoke(shards, ["check-cache", "--output", "json"], env={"ONCEPAY_HOME": str(tmp_path)})
    assert result.exit_code == UNREACHABLE
    assert json.loads(result.stdout)["ok"] is False


async def carts(cluster: Cluster, count: int) -> list[str]:
    """Payments that wait for their buyers."""
    status = cluster.status()
    headers = {"Authorization": f"Bearer {status.api_key}"}
    body = {"buyer": "b", "currency": "usd", "items": [{"seller": "s", "amount": 1000}]}
    keys = [f"cart-{os.urandom(6).hex()}" for _ in range(count)]
    async with aiohttp.ClientSession(headers=headers) as http:
        for key in keys:
            async with http.post(f"{status.urls['router']}/v1/payments", json=body, headers={"Idempotency-Key": key}) as answer:
                assert answer.status == 201, await answer.text()
    return keys


async def touch(cluster: Cluster, shard: str, key: str = "", *, unseen: bool) -> str:
    """Raise a pending payment's version; `unseen` by the feed (as if another node had written it), as a lost change is."""
    postgres = cluster.settings.postgres
    found = next(each for each in cluster.status().shards if each.name == shard)
    port = next(node.port for node in found.nodes if node.name == found.leader)
    connection = await asyncpg.connect(
        host="127.0.0.1", port=port, user="postgres", password=postgres.superuser_password, database=postgres.database
    )
    try:
        key = key or await connection.fetchval("select key from oncepay.payments where status = 'attempted' limit 1")
        if unseen:
            await connection.execute("select pg_replication_origin_create('unseen')")
            await connection.execute("select pg_replication_origin_session_setup('unseen')")
        try:
            await connection.execute("update oncepay.payments set version = version + 1 where key = $1", key)
        finally:
            if unseen:
                await connection.execute("select pg_replication_origin_session_reset()")
                await connection.execute("select pg_replication_origin_drop('unseen')")
    finally:
        await connection.close()
    return key


@pytest.mark.cluster
def test_caches_of_a_whole_cluster(cluster: Cluster) -> None:
    env = {"ONCEPAY_HOME": str(cluster.home)}
    asyncio.run(carts(cluster, 12))
    result = CliRunner().invoke(shards, ["check-cache", "--output", "json"], env=env)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["differences"] == []
    assert found["pending"] >= 12
    shard = cluster.status().shards[0].name
    key = asyncio.run(touch(cluster, shard, unseen=True))
    try:
        result = CliRunner().invoke(shards, ["check-cache", "--wait", "1", "--output", "json"], env=env)
        text = CliRunner().invoke(shards, ["check-cache", "--wait", "1"], env=env)
    finally:
        asyncio.run(touch(cluster, shard, key, unseen=False))
    assert result.exit_code == WRONG
    found = json.loads(result.stdout)
    assert not found["ok"]
    [difference] = found["differences"]
    assert (difference["shard"], difference["key"]) == (shard, key)
    assert difference["cache"][0] + 1 == difference["table"][0]
    assert text.exit_code == WRONG
    assert key in text.stdout
    result = CliRunner().invoke(shards, ["check-cache", "--output", "json"], env=env)
    assert result.exit_code == 0, "the next change of the payment brings its whole row"


@pytest.mark.cluster
def test_a_healthy_shard_is_rebuilt_while_it_works(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))
    asyncio.run(carts(cluster, 3))
    planned = CliRunner().invoke(shards, ["resnapshot", "s0", "--dry-run", "--output", "json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["shards"][0]["worker"].startswith("worker-s0-")
    done = CliRunner().invoke(shards, ["resnapshot", "s0", "--output", "json"])
    assert done.exit_code == 0, done.output
    [result] = json.loads(done.stdout)["shards"]
    assert (result["shard"], result["state"]) == ("s0", "done")
    assert result["rows"] >= 0
    assert "/" in result["position"]


async def put_move(cluster: Cluster, move: Move, *, there: bool = True) -> None:
    """A move's record, as if it had been made."""
    async with Etcd(cluster.settings.etcd) as etcd:
        if there:
            await etcd.put(MOVES_PREFIX + move.id, msgspec.json.encode(move))
        else:
            await etcd.delete(MOVES_PREFIX + move.id)


@pytest.mark.cluster
def test_what_a_shard_gave_away_before_its_feed_was_applied_is_rebuilt_first(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONCEPAY_HOME", str(cluster.home))
    move = Move(
        id="mtest", first=60_000, last=60_009, source="s0", target="s1", state="finished", goal="finished", drain_lsn="FFFFFFFF/0"
    )
    asyncio.run(put_move(cluster, move))
    try:
        planned = CliRunner().invoke(shards, ["resnapshot", "s0", "--dry-run"])
        done = CliRunner().invoke(shards, ["resnapshot", "s0", "--output", "json"])
        asyncio.run(put_move(cluster, msgspec.structs.replace(move, drain_lsn="0/1")))
        applied = CliRunner().invoke(shards, ["resnapshot", "s0", "--dry-run", "--output", "json"])
    finally:
        asyncio.run(put_move(cluster, move, there=False))
    why = "it has slots 60000-60009, which s0 gave away while its feed stood still"
    assert planned.output.startswith(f"s1 too: {why}\ns1: worker-s1-"), planned.output
    assert done.exit_code == 0, done.output
    assert [(each["shard"], each["state"], each["why"]) for each in json.loads(done.stdout)["shards"]] == [
        ("s1", "done", why), ("s0", "done", ""),
    ]  # fmt: skip
    assert [each["shard"] for each in json.loads(applied.stdout)["shards"]] == ["s0"]


async def test_a_giver_is_not_rebuilt_when_that_of_the_owner_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its position is what tells, the next time, that the owner has to be rebuilt."""

    async def failed(http: object, status: object, shard: str, dry_run: bool, output: str) -> dict[str, str]:
        return {"shard": shard, "state": "failed"}

    monkeypatch.setattr("cli.resnapshot._one", failed)
    nothing: Any = None

    async def tried(*parts: Part) -> list[str]:
        return [result["shard"] for result in await _all(nothing, "", list(parts), False, "json")]

    assert await tried(Part("s1", "it has slots"), Part("s0")) == ["s1"]
    assert await tried(Part("s1"), Part("s0")) == ["s1", "s0"]


@pytest.mark.parametrize("arguments", [[], ["s0", "--all"]])
def test_a_rebuild_names_its_shards(arguments: list[str]) -> None:
    assert CliRunner().invoke(shards, ["resnapshot", *arguments]).exit_code == USAGE
