"""`oncepay apikeys` against a real etcd, and keys made with it against real routers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from cli.apikeys import apikeys
from cli.common import WRONG
from deploy.local import Cluster
from oncepay.apikeys import PREFIX, digest
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings, Settings, dump
from tests.etcd_fixture import EtcdCluster, etcd_cluster
from tests.router.conftest import CART

__all__ = ["etcd_cluster"]

pytestmark = pytest.mark.cluster


@pytest.fixture
def config(tmp_path: Path, etcd_cluster: EtcdCluster) -> Path:
    """Settings with etcd's address and a prefix of its own."""
    found = etcd_cluster.settings()
    file = tmp_path / "oncepay.toml"
    file.write_bytes(dump(Settings(etcd=EtcdSettings(endpoints=found.endpoints, prefix=f"/test-{tmp_path.name}"))))
    return file


def run(config: Path, *args: str, code: int = 0) -> Any:
    """The object that the command prints."""
    result = CliRunner().invoke(apikeys, [*args, "--config", str(config), "--output", "json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_key_is_printed_once_and_only_its_hash_is_stored(config: Path) -> None:
    made = run(config, "create", "shop", "--scope", "read", "--scope", "pay", "--rate-limit", "2.5")
    assert made["key"].startswith("ok_")
    assert made["id"] == digest(made["key"])
    assert (made["scopes"], made["rate_limit_per_s"], made["slot_rate_limit_per_s"]) == (["pay", "read"], 2.5, None)
    (listed,) = run(config, "list")["apikeys"]
    assert listed == {name: made[name] for name in made if name not in {"key", "dry_run"}}

    async def stored() -> bytes:
        from oncepay.settings import load

        async with Etcd(load(config).etcd) as etcd:
            kvs, _ = await etcd.get_prefix("")
        assert [kv.key for kv in kvs] == [PREFIX + made["id"]]
        return b"".join(kv.value for kv in kvs)

    assert made["key"].encode() not in asyncio.run(stored())


def test_the_text_is_the_key_alone(config: Path) -> None:
    result = CliRunner().invoke(apikeys, ["create", "shop", "--config", str(config)])
    assert result.exit_code == 0
    assert digest(result.stdout.strip()) == run(config, "list")["apikeys"][0]["id"]
    shown = CliRunner().invoke(apikeys, ["list", "--config", str(config)]).stdout
    assert "shop: pay, read, refund, operate" in shown


def test_a_name_is_taken_once_and_revoked_by_name_or_id(config: Path) -> None:
    first = run(config, "create", "shop")
    assert run(config, "create", "shop", code=WRONG)["error"]["type"] == "name-taken"
    second = run(config, "create", "office")
    assert run(config, "revoke", "shop", "--dry-run")["revoked"]["id"] == first["id"]
    assert len(run(config, "list")["apikeys"]) == 2
    assert run(config, "revoke", "shop")["revoked"]["id"] == first["id"]
    assert run(config, "revoke", second["id"][:8])["revoked"]["name"] == "office"
    for name in ("shop", second["id"][:7], second["id"]):
        assert run(config, "revoke", name, code=WRONG)["error"]["type"] == "no-such-api-key"
    assert run(config, "list") == {"apikeys": []}


def test_a_sellers_own_key_reads(config: Path) -> None:
    made = run(config, "create", "seller-4", "--seller", "4")
    assert (made["scopes"], made["seller"]) == (["read"], "4")


def test_a_dry_run_makes_nothing(config: Path) -> None:
    assert "key" not in run(config, "create", "shop", "--dry-run")
    assert run(config, "list") == {"apikeys": []}


@pytest.mark.parametrize(
    "args",
    [
        ["create", ""],
        ["create", "n" * 65],
        ["create", "a", "--scope", "all"],
        ["create", "a", "--rate-limit", "-1"],
        ["create", "a", "--seller", "s", "--scope", "pay"],
    ],
)
def test_wrong_usage(config: Path, args: list[str]) -> None:
    assert CliRunner().invoke(apikeys, [*args, "--config", str(config)]).exit_code == 2


@asynccontextmanager
async def key_on(cluster: Cluster, name: str, *args: str) -> AsyncIterator[str]:
    """A key that the running cluster knows, until the end."""
    file = cluster.layout.settings
    made = await asyncio.to_thread(run, file, "create", name, *args)
    try:
        yield made["key"]
    finally:
        await asyncio.to_thread(run, file, "revoke", made["id"])


@asynccontextmanager
async def session(cluster: Cluster, key: str) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(cluster.status().urls["router"], headers=headers) as http:
        yield http


async def known(http: aiohttp.ClientSession, path: str) -> int:
    """The status of a GET, once the routers have heard of the key."""
    async with asyncio.timeout(10):
        while True:
            async with http.get(path) as answer:
                if answer.status != 401:
                    return answer.status
            await asyncio.sleep(0.02)


async def test_a_key_may_do_what_its_scopes_say_until_it_is_revoked(cluster: Cluster, tmp_path: Path) -> None:
    async with key_on(cluster, f"reader-{tmp_path.name}", "--scope", "read") as key:
        async with session(cluster, key) as http:
            assert await known(http, "/v1/payments?limit=1") == 200
            async with http.post("/v1/payments", json=CART, headers={"Idempotency-Key": f"apikeys-{tmp_path.name}"}) as answer:
                assert answer.status == 403
    async with session(cluster, key) as http, asyncio.timeout(10):
        while True:
            async with http.get("/v1/payments?limit=1") as answer:
                if answer.status == 401:
                    break
            await asyncio.sleep(0.02)


async def test_a_slot_takes_so_many_payments_of_one_key(cluster: Cluster, tmp_path: Path) -> None:
    async with key_on(cluster, f"pusher-{tmp_path.name}", "--slot-rate-limit", "0.01") as key:
        async with session(cluster, key) as http:
            await known(http, "/v1/payments?limit=1")

            async def pay(name: str) -> tuple[int, str | None]:
                headers = {"Idempotency-Key": f"{name}-{tmp_path.name}", "Prefer": "wait=0"}
                async with http.post("/v1/payments", json={**CART, "payment_method": "pm_card_visa"}, headers=headers) as answer:
                    return answer.status, answer.headers.get("Retry-After")

            answers = [await pay("slot") for _ in range(4)]  # two routers, one bucket in each
            assert {status for status, _ in answers} <= {200, 201, 202, 429}
            assert 1 <= sum(status != 429 for status, _ in answers) <= 2
            assert all(90 <= int(after or 0) <= 100 for status, after in answers if status == 429)
            assert (await pay("another"))[0] in {201, 202}
