"""The key service as processes over a real etcd: each key once, through kills, freezes and outages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from keygen.blocks import LEASE_TTL_S, RETIRED_KEPT
from keygen.pool import AHEAD_LEAST, LOW_LEAST, STEP_PART
from keygen.records import BlockRecord
from keygen.slots import NARROWEST_SLOTS, SEARCH_KEYS
from loadtest.bench.http_load import load
from oncepay.apikeys import ApiKey, Scope, digest, new_key
from oncepay.etcd import Etcd
from oncepay.keys import SLOTS, MacSecrets, origin, slot
from oncepay.settings import EtcdSettings
from tests.etcd_fixture import EtcdCluster, etcd_cluster
from tests.keygen.harness import Answer, Keygen, http

__all__ = ["etcd_cluster"]

pytestmark = pytest.mark.cluster

AHEAD_KEYS = AHEAD_LEAST + AHEAD_LEAST // STEP_PART
"""What a replica without demand has persisted as its own when it is ready."""
LEASE_GONE_S = LEASE_TTL_S + 5


def assert_distinct(keys: list[str]) -> None:
    assert len(set(keys)) == len(keys)


def wait_for_replicas(keygen: Keygen, count: int) -> None:
    """Until etcd knows `count` living replicas."""
    deadline = time.monotonic() + LEASE_GONE_S
    while len(keygen.pool()["replicas"]) != count:
        assert time.monotonic() < deadline, keygen.pool()
        time.sleep(0.1)


def read_all(settings: EtcdSettings, prefix: str) -> list[bytes]:
    async def read() -> list[bytes]:
        async with Etcd(settings) as etcd:
            return [kv.value for kv in (await etcd.get_prefix(prefix))[0]]

    return asyncio.run(read())


@pytest.fixture
def settings(etcd_cluster: EtcdCluster) -> EtcdSettings:
    return etcd_cluster.settings()


@pytest.fixture
def one(tmp_path: Path, settings: EtcdSettings) -> Iterator[Keygen]:
    with Keygen(tmp_path, settings, "keygen-1", "--block-keys", "200000") as keygen:
        yield keygen.wait()


def test_keys_are_distinct_and_issued(one: Keygen, settings: EtcdSettings) -> None:
    keys = [key for count in (1, 1, 7, 999, 10_000, 1) for key in one.issue(count)]
    assert_distinct(keys)
    secrets = msgspec.json.decode(read_all(settings, "keys/mac")[0], type=MacSecrets).secrets
    assert {origin(key, secrets) for key in keys} == {"issued"}


@pytest.mark.parametrize(
    "body",
    [
        *({"count": 0}, {"count": 10_001}, {"count": -1}, {"count": "1"}, {}, {"count": 1, "x": 1}, [1], 1),
        *({"count": 1, "slots": slots} for slots in ([], [0], [0, 65_536], [-1, 5_000], [0, 1, 2], ["0", "9000"], 7)),
    ],
)
def test_a_body_that_can_t_be(one: Keygen, body: object) -> None:
    answer = http("POST", one.url + "/v1/keys", body)
    assert answer.status == 400
    assert answer.body["type"].endswith("/malformed-body")


@pytest.mark.parametrize(("first", "last", "count"), [(0, SLOTS // 2 - 1, 5_000), (60_000, SLOTS - 1, 500), (4711, 4774, 20)])
def test_keys_for_the_slots_of_a_range(one: Keygen, first: int, last: int, count: int) -> None:
    """They lie in it, none comes twice, and those that didn't fit are given out later: none is lost."""
    before = one.pool()["available"]
    inside: list[str] = []
    for _ in range(3):
        answer = http("POST", one.url + "/v1/keys", {"count": count, "slots": [first, last]})
        assert answer.status == 201, answer
        inside += answer.body["keys"]
    assert all(first <= slot(key) <= last for key in inside)
    assert len(inside) == 3 * count
    pool = one.pool()
    assert pool["ready"] > 0
    # Whatever was searched through is still there: at most a raised watermark has added to it.
    assert pool["available"] >= before - 3 * count
    others = [key for _ in range(pool["ready"] // 10_000 + 1) for key in one.issue(10_000)]
    assert_distinct(inside + others)
    if last - first < SLOTS // 4:
        assert any(slot(key) < first or slot(key) > last for key in others)


@pytest.mark.parametrize(
    ("slots", "count", "field"),
    [
        ([100, 100 + NARROWEST_SLOTS - 2], 1, "slots"),
        ([200, 100], 1, "slots"),
        ([0, NARROWEST_SLOTS - 1], SEARCH_KEYS * NARROWEST_SLOTS // SLOTS + 1, "count"),
        ([0, 999], 10_000, "count"),
    ],
)
def test_a_range_too_narrow_is_refused_and_nothing_is_searched(one: Keygen, slots: list[int], count: int, field: str) -> None:
    answer = http("POST", one.url + "/v1/keys", {"count": count, "slots": slots})
    assert answer.status == 422
    assert answer.body["type"].endswith("/invalid-field")
    assert answer.body["field"] == field
    assert one.pool()["available"] == AHEAD_KEYS


def test_the_document_names_what_is_served(one: Keygen) -> None:
    paths = http("GET", one.url + "/openapi.json").body["paths"]
    served = {(path, method) for path, methods in paths.items() for method in methods}
    assert served == {("/v1/keys", "post"), ("/v1/keys/pool", "get")}
    schema = paths["/v1/keys/pool"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["$ref"] == "#/components/schemas/PoolState"
    assert set(one.pool()) == set(http("GET", one.url + "/openapi.json").body["components"]["schemas"]["PoolState"]["properties"])


def test_a_killed_owner_s_block_goes_on_past_its_watermark(tmp_path: Path, settings: EtcdSettings, one: Keygen) -> None:
    keys = one.issue(10_000)
    with Keygen(tmp_path, settings, "keygen-2", "--block-keys", "200000") as two:
        two.wait()
        one.kill()
        wait_for_replicas(two, 1)
        # More than two blocks' worth: it can't be had without the dead owner's.
        keys += [key for _ in range(45) for key in two.issue(10_000)]
        assert_distinct(keys)
        assert "block taken over" in two.log.read_text()


@pytest.mark.faults
def test_a_crash_wastes_one_step_at_most(tmp_path: Path, settings: EtcdSettings, one: Keygen) -> None:
    """What the dead replica had persisted ahead, and nothing else: its successor begins where the watermark is."""

    def watermarks() -> int:
        records = [msgspec.json.decode(value, type=BlockRecord) for value in read_all(settings, "keys/blocks/")]
        return sum(record.watermark for record in records)

    for _ in range(5):
        one.issue(10_000)
    one.kill()
    wasted = watermarks() - 50_000
    assert 0 < wasted <= AHEAD_KEYS
    with Keygen(tmp_path, settings, "keygen-2", "--block-keys", "200000", "--ahead-s", "1") as two:
        two.wait()
        wait_for_replicas(two, 1)
        for _ in range(45):
            two.issue(10_000)
        assert two.metrics()["oncepay_keys_takeovers_total"] == 1
        deadline = time.monotonic() + 10
        while watermarks() != 50_000 + wasted + 450_000 + two.pool()["available"]:  # until no watermark is being raised
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_an_operator_sees_how_long_keys_last(one: Keygen) -> None:
    metrics = one.metrics()
    assert metrics["oncepay_keys_available_seconds"] == float("inf")
    writes = metrics["oncepay_keys_etcd_writes_total"]
    assert writes >= 3
    assert metrics["oncepay_keys_takeovers_total"] == 0
    one.issue(10_000)
    deadline = time.monotonic() + 10
    while (metrics := one.metrics())["oncepay_keys_available_seconds"] == float("inf"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 0 < metrics["oncepay_keys_ready"] <= metrics["oncepay_keys_available"]
    assert metrics["oncepay_keys_issued_total"] == 10_000
    assert metrics["oncepay_keys_available_seconds"] == pytest.approx(one.pool()["available_s"], rel=0.5)
    assert metrics["oncepay_keys_etcd_writes_total"] < writes + 10


def test_a_frozen_owner_wakes_up_and_issues_nothing_twice(tmp_path: Path, settings: EtcdSettings, one: Keygen) -> None:
    keys = one.issue(10_000)
    with Keygen(tmp_path, settings, "keygen-2", "--block-keys", "200000") as two:
        two.wait()
        one.freeze()
        wait_for_replicas(two, 1)
        keys += [key for _ in range(45) for key in two.issue(10_000)]
        assert "block taken over" in two.log.read_text()
        one.thaw()
        # What it may still issue, and what it gets anew.
        keys += [key for _ in range(30) for key in one.issue(10_000)]
        keys += [key for _ in range(10) for key in two.issue(10_000)]
        assert_distinct(keys)
        wait_for_replicas(two, 2)


def test_an_owner_told_to_end_gives_its_lease_back_at_once(tmp_path: Path, settings: EtcdSettings, one: Keygen) -> None:
    with Keygen(tmp_path, settings, "keygen-2") as two:
        two.wait()
        began = time.monotonic()
        assert one.stop() == 0
        wait_for_replicas(two, 1)
        assert time.monotonic() - began < LEASE_TTL_S / 2


def test_without_etcd_it_issues_up_to_the_watermark_then_says_503(tmp_path: Path) -> None:
    with EtcdCluster(3) as cluster, Keygen(tmp_path, cluster.settings(), "keygen-1") as keygen:
        keygen.wait()
        keys = keygen.issue(10_000)
        cluster.kill()
        answers: list[Answer] = []
        not_ready_at: int | None = None
        while len(answers) < 30 and (not answers or answers[-1].status == 201):
            answers.append(http("POST", keygen.url + "/v1/keys", {"count": 5_000}))
            keys += answers[-1].body.get("keys", [])
            if len(keys) == 40_000:
                keygen.wait(ready=True)  # enough is left: an outage alone is no reason
            if AHEAD_KEYS - LOW_LEAST < len(keys) <= AHEAD_KEYS - LOW_LEAST + 5_000:
                keygen.wait(ready=False)
                not_ready_at = len(answers)
        assert not_ready_at is not None, "it was never called not ready before it stopped issuing"
        assert [answer.status for answer in answers[:-1]] == [201] * (len(answers) - 1)
        refused = answers[-1]
        assert refused.status == 503
        assert refused.body["type"].endswith("/no-keys")
        assert int(refused.headers["Retry-After"]) >= 1
        assert len(answers) > not_ready_at
        assert AHEAD_KEYS - 5_000 < len(keys) <= AHEAD_KEYS
        cluster.start()
        keygen.wait(ready=True)
        keys += keygen.issue(10_000)
        assert_distinct(keys)


def test_each_key_once_over_replicas_and_restarts(tmp_path: Path, etcd_cluster: EtcdCluster, settings: EtcdSettings) -> None:
    """Two replicas behind one port issue while members of etcd are killed and frozen, and a replica is killed and replaced."""
    keys: list[str] = []
    refused: list[int] = []
    lock = threading.Lock()
    stop = threading.Event()

    def client(url: str) -> None:
        while not stop.is_set():
            answer = http("POST", url + "/v1/keys", {"count": 100})
            with lock:
                if answer.status == 201:
                    keys.extend(answer.body["keys"])
                else:
                    refused.append(answer.status)
            stop.wait(0.03)

    more = ("--block-keys", "65536")
    with (
        Keygen(tmp_path, settings, "keygen-1", *more) as one,
        Keygen(tmp_path, settings, "keygen-2", *more, port=one.port) as two,
    ):
        one.wait()
        two.wait()
        with ThreadPoolExecutor(3) as threads:
            clients = [threads.submit(client, one.shared_url) for _ in range(3)]
            try:
                for member in etcd_cluster.members:
                    member.kill()
                    stop.wait(1)
                    etcd_cluster.start()
                etcd_cluster.members[0].freeze()
                stop.wait(4)
                etcd_cluster.members[0].thaw()
                one.kill()
                with Keygen(tmp_path, settings, "keygen-1", *more, port=two.port) as three:
                    three.wait()
                    stop.wait(2)
                    assert three.issue(1)
            finally:
                stop.set()
            for each in clients:
                each.result()
        assert len(keys) > 20_000
        assert_distinct(keys)
        assert set(refused) <= {0}, "only connections to the killed replica may fail"
    etcd_cluster.wait_healthy()


def test_few_records_stay_however_much_is_issued(tmp_path: Path, settings: EtcdSettings) -> None:
    keys = []
    with Keygen(tmp_path, settings, "keygen-1", "--block-keys", "65536", "--ahead-s", "1") as keygen:
        keygen.wait()
        for _ in range(200):
            keys += keygen.issue(10_000)
        assert_distinct(keys)
        pool = keygen.pool()
        assert pool["blocks_used_up"] <= RETIRED_KEPT + 3
        assert len(read_all(settings, "keys/blocks/")) < 30
        seeds = [msgspec.json.decode(value).get("seed", "") for value in read_all(settings, "keys/blocks/")]
        assert sum(seed != "" for seed in seeds) <= pool["blocks_free"] + pool["blocks_held"] + 3


async def test_etcd_is_written_rarely(tmp_path: Path, settings: EtcdSettings) -> None:
    """However much is asked for while a watermark is being raised."""
    with Keygen(tmp_path, settings, "keygen-1") as keygen:
        await asyncio.to_thread(keygen.wait)
        async with Etcd(settings) as etcd:
            before = (await etcd.get_prefix("keys/"))[1]
            done = await load(keygen.own_port, "/v1/keys", {"count": 100}, seconds=2, status=201)
            assert done.failed == 0
            assert done.done > 500
            assert (await etcd.get_prefix("keys/"))[1] - before < 25


def test_scopes(tmp_path: Path, settings: EtcdSettings) -> None:
    pay, operate, slow = new_key(), new_key(), new_key()

    async def add() -> None:
        async with Etcd(settings) as etcd:
            records: list[tuple[str, tuple[Scope, ...], float]] = [
                (pay, ("pay",), 0),
                (operate, ("operate",), 0),
                (slow, ("pay",), 2),
            ]
            for key, scopes, limit in records:
                await etcd.put(f"apikeys/{digest(key)}", msgspec.json.encode(ApiKey("test", scopes, limit)))

    asyncio.run(add())

    def call(method: str, path: str, key: str | None, body: object = None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return http(method, keygen.url + path, body, headers).status

    with Keygen(tmp_path, settings, "keygen-1", auth=True) as keygen:
        keygen.wait()
        assert call("POST", "/v1/keys", pay, {"count": 1}) == 201
        assert call("POST", "/v1/keys", operate, {"count": 1}) == 403
        assert call("POST", "/v1/keys", None, {"count": 1}) == 401
        assert call("POST", "/v1/keys", new_key(), {"count": 1}) == 401
        assert call("GET", "/v1/keys/pool", operate) == 200
        assert call("GET", "/v1/keys/pool", pay) == 403
        assert [call("POST", "/v1/keys", slow, {"count": 1}) for _ in range(3)] == [201, 201, 429]
        for path in ("/livez", "/readyz", "/openapi.json"):
            assert call("GET", path, None) == 200
