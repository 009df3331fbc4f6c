"""Whole workers on a real shard of three nodes, with the aggregator and the stand-in for Stripe."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import psutil
import pytest

from deploy.local import Cluster
from deploy.local.ports import free_base
from oncepay.cart import Item, Share
from oncepay.etcd import Etcd
from oncepay.payment import Key, Payment, Status, Terms
from oncepay.settings import PollSettings, Settings, dump
from shard.store.batch import _CALL
from shard.store.rows import Put, change_arrays, entry_arrays, new_arrays
from shard.store.store import Shards
from shard.worker.lease import Seat
from tests.etcd_fixture import dying_with_parent
from tests.sandbox.process import stripe_client
from tests.shard.worker.harness import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SHARD = "s0"
API_VERSION = "2026-10-28.endive"
PARTS = ("etcd", "nodes", "aggregator-db", "stripe", "aggregator")


class WorkerProcess:
    """One worker, started with settings that look after payments soon."""

    def __init__(self, cluster: Cluster, replica: int) -> None:
        self.name = f"worker-{SHARD}-{replica + 1}"
        self.port = cluster.ports.worker(0, replica)
        self.log = cluster.home / f"{self.name}.log"
        self._settings = settings_of(cluster)
        self._config = cluster.home / "worker.toml"
        self._config.write_bytes(dump(self._settings))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "shard.worker", "--config", str(self._config), "--name", self.name]
        command += ["--shard", SHARD, "--own-port", str(self.port)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(dying_with_parent(*command), stdout=log, stderr=log)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    async def get(self, path: str) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self._settings.internal_token}"}
        try:
            async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=2)) as http:
                async with http.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                    text = await answer.text()
                    return answer.status, msgspec.json.decode(text) if text.startswith("{") else text
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return 0, repr(error)

    async def active(self) -> bool:
        return (await self.get("/v1/cache"))[0] == 200

    async def metric(self, line: str) -> float:
        _, text = await self.get("/metrics")
        return sum(float(at.rpartition(" ")[2]) for at in str(text).splitlines() if at.startswith(line))

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log's lines with that event."""
        found = [msgspec.json.decode(line) for line in self.log.read_bytes().splitlines() if line.startswith(b"{")]
        return [line for line in found if line["event"] == event]


def settings_of(cluster: Cluster) -> Settings:
    return msgspec.structs.replace(cluster.settings, poll=PollSettings(first_s=1.0, max_s=4.0))


@pytest.fixture(scope="module")
def shard_cluster(cluster_folder: Path) -> Iterator[Cluster]:
    from cli.up import hooks

    if running := os.environ.get("ONCEPAY_TEST_WORKER_HOME"):
        yield Cluster(Path(running))
        return
    made = Cluster(cluster_folder / "worker", free_base(), shards=(SHARD,), parts=PARTS)
    made.up(hooks=hooks(made))
    try:
        yield made
    finally:
        made.down(purge=True)


@pytest.fixture
def workers(shard_cluster: Cluster) -> Iterator[list[WorkerProcess]]:
    """Two workers, not started."""
    made = [WorkerProcess(shard_cluster, 0), WorkerProcess(shard_cluster, 1)]
    try:
        yield made
    finally:
        for worker in made:
            worker.stop(signal.SIGKILL)


@pytest.fixture
async def store(shard_cluster: Cluster) -> AsyncIterator[Shards]:
    """What a router has."""
    settings = shard_cluster.settings
    async with Etcd(settings.etcd) as etcd:
        shards = Shards(etcd, settings, role="oncepay_router", password=settings.postgres.router_password, actor="router")
        await shards.start()
        try:
            yield shards
        finally:
            await shards.stop()


class Derived:
    """The aggregator's tables, and the shard's beside them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def keys(self) -> dict[str, tuple[int, str]]:
        return await self._read(self._cluster.settings.aggregator_dsn)

    async def shard_keys(self) -> dict[str, tuple[int, str]]:
        dsn = await asyncio.to_thread(lambda: self._cluster.status().shards[0].dsn)
        return await self._read(dsn) if dsn else {}

    async def _read(self, dsn: str) -> dict[str, tuple[int, str]]:
        try:
            connection = await asyncpg.connect(dsn)
            try:
                rows = await connection.fetch("select key, version, status from oncepay.payments")
            finally:
                await connection.close()
        except (OSError, asyncpg.PostgresError):
            return {}
        return {row["key"]: (row["version"], row["status"]) for row in rows}

    async def known_to_the_shard(self) -> bool:
        """Whether the shard knows that its feed was applied."""
        dsn = await asyncio.to_thread(lambda: self._cluster.status().shards[0].dsn)
        assert dsn is not None
        connection = await asyncpg.connect(dsn)
        try:
            return bool(await connection.fetchval("select fed from oncepay.worker_epoch"))
        finally:
            await connection.close()

    async def same(self, timeout_s: float = 30) -> None:
        async def equal() -> bool:
            return bool(mine := await self.shard_keys()) and mine == await self.keys()

        await eventually(equal, "the aggregator has what the shard has", timeout_s)


@pytest.fixture
def derived(shard_cluster: Cluster) -> Derived:
    return Derived(shard_cluster)


def payment(name: str, method: str = "", *, on_decline: str = "fail", expires_in_s: float = 86_400) -> Payment:
    now_ms = time.time_ns() // 1_000_000
    terms = Terms(
        (Item("ada", 1000),), (Share("ada", 1000, 100),), API_VERSION, on_decline=on_decline, payment_method=method  # type: ignore[arg-type]
    )  # fmt: skip
    key = Key(f"{name}-{os.urandom(6).hex()}")
    return Payment(
        key, Status.CREATED, 1, "buyer", "usd", 1000, terms, b"\1" * 32, now_ms, now_ms, now_ms + int(expires_in_s * 1000)
    )


async def accept(store: Shards, *names: str) -> list[str]:
    made = [payment(name) for name in names]
    await asyncio.gather(*(store.accept(each) for each in made))
    return [each.key for each in made]


async def started(*workers: WorkerProcess) -> WorkerProcess:
    """Start them; the one that became active."""
    for worker in workers:
        worker.start()
    return await active_of(*workers)


async def active_of(*workers: WorkerProcess, timeout_s: float = 30) -> WorkerProcess:
    found: list[WorkerProcess] = []

    async def any_active() -> bool:
        found[:] = [worker for worker in workers if await worker.active()]
        return bool(found)

    await eventually(any_active, "a worker is active", timeout_s)
    return found[0]


def holds(derived: Derived, *keys: str) -> Callable[[], Awaitable[bool]]:
    async def all_there() -> bool:
        return set(keys) <= (await derived.keys()).keys()

    return all_there


async def test_what_a_dead_router_left_behind_is_driven_to_its_end(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    await started(workers[0])
    paid, declined = payment("paid", "pm_card_visa"), payment("declined", "pm_card_visa_chargeDeclined")
    over, cart = payment("over", expires_in_s=3), payment("cart")
    for each in (paid, declined, over, cart):
        await store.accept(each)
    ends = {paid.key: "succeeded", declined.key: "failed", over.key: "canceled", cart.key: "attempted"}

    async def ended() -> bool:
        rows = await derived.shard_keys()
        return all(rows.get(key, (0, ""))[1] == status for key, status in ends.items())

    await eventually(ended, "all four came to their ends", 30)
    await derived.same()
    row = await store.get(paid.key)
    assert row is not None
    assert not row.open_work, "Stripe's fee is booked"
    _, listing = await workers[0].get("/v1/cache")
    pending = {key: (version, status) for key, version, status in listing["pending"]}
    table = {key: state for key, state in (await derived.shard_keys()).items() if state[1] not in ("failed", "canceled")}
    assert pending == {key: state for key, state in table.items() if state[1] != "succeeded"}


async def test_the_cache_is_filled_from_what_was_there_before(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards
) -> None:
    first = await started(workers[0])
    cart = payment("cart")
    await store.accept(cart)

    async def known(worker: WorkerProcess) -> bool:
        _, listing = await worker.get("/v1/cache")
        return any(key == cart.key and status == "attempted" for key, _, status in listing["pending"])

    await eventually(lambda: known(first), "the cart waits for its buyer")
    workers[0].stop()
    second = await started(workers[1])
    assert await known(second)
    await eventually(lambda: bool(second.lines("cache filled")), "its log tells")
    assert second.lines("cache filled")[-1]["rows"] >= 1


async def test_another_worker_takes_over_after_a_kill(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    first = await started(*workers)
    second = workers[1 - workers.index(first)]
    status, _ = await second.get("/readyz")
    assert status == 200, "standing by is being ready"
    async with Etcd(shard_cluster.settings.etcd) as etcd:
        assert await etcd.get(f"budget/{first.name}") is not None

        async def has_no_share() -> bool:  # one of that name that was killed keeps its share until its lease ends
            return await etcd.get(f"budget/{second.name}") is None

        await eventually(has_no_share, "a standby takes no share of the rate budget", 20)
    await accept(store, "before")
    await eventually(derived.known_to_the_shard, "the shard knows that its feed was applied")
    began_s = time.monotonic()
    first.stop(signal.SIGKILL)
    after = await accept(store, "after")
    await active_of(second, timeout_s=10)
    await eventually(holds(derived, *after), "the new one forwards", 10)
    print(f"taken over after {time.monotonic() - began_s:.1f} s")
    assert time.monotonic() - began_s < 10


@pytest.mark.faults
async def test_a_frozen_worker_is_replaced_and_does_no_harm_when_it_thaws(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    first = await started(*workers)
    second = workers[1 - workers.index(first)]
    await eventually(holds(derived, *await accept(store, "before")), "the first one forwards")
    first.send(signal.SIGSTOP)
    began_s = time.monotonic()
    frozen = await accept(store, *(f"while{n}" for n in range(20)))
    await active_of(second, timeout_s=15)
    await eventually(holds(derived, *frozen), "the new one forwards", 10)
    print(f"taken over after {time.monotonic() - began_s:.1f} s")
    first.send(signal.SIGCONT)
    thawed = await accept(store, *(f"thawed{n}" for n in range(20)))

    async def stood_down() -> bool:
        return bool(first.lines("standing down")) and not await first.active()

    await eventually(stood_down, "the old one stood down")
    await eventually(holds(derived, *thawed), "the new one goes on", 10)
    await derived.same()
    assert await second.active()
    assert not second.lines("standing down")
    second.stop(signal.SIGTERM)
    await active_of(first, timeout_s=10)
    await eventually(holds(derived, *await accept(store, "again")), "the old one has a new epoch")


async def test_a_thawed_worker_can_write_nothing(shard_cluster: Cluster, store: Shards) -> None:
    """Its epoch is compared in the transaction itself, whatever it believes of its seat."""
    settings = shard_cluster.settings
    async with Etcd(settings.etcd) as etcd:
        password = settings.postgres.worker_password
        old = Shards(etcd, settings, role="oncepay_worker", password=password, actor="old")
        new = Shards(etcd, settings, role="oncepay_worker", password=password, actor="new")
        try:
            for shards in (old, new):
                await shards.start()
                await shards.batcher(SHARD).take_epoch("test")
            from shard.store.batch import EpochOver

            with pytest.raises(EpochOver):
                await old.accept(payment("late"))
            row, made = await new.accept(payment("in time"))
            assert made
            assert row.version == 1
        finally:
            await old.stop()
            await new.stop()


async def test_the_seat_outlives_an_etcd_outage_and_is_given_up_at_the_end(shard_cluster: Cluster) -> None:
    async with Etcd(shard_cluster.settings.etcd) as etcd:
        one, other = (Seat(etcd, "seats/test", name, ttl_s=2) for name in ("one", "other"))
        await one.take()
        waiting = asyncio.create_task(other.take())
        lost = asyncio.create_task(one.lost())
        lease = one._lease
        assert lease is not None
        lease._lose()  # as when no keepalive was acknowledged in time
        await eventually(lambda: one._lease is not lease, "the seat is taken again under a new lease")
        assert not waiting.done()
        assert not lost.done()
        await one.leave()
        await asyncio.wait_for(waiting, 5)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        await other.leave()


async def leader_session(cluster: Cluster, store: Shards) -> asyncpg.Connection:
    node = store.leaders.current(SHARD)
    assert node is not None
    postgres = cluster.settings.postgres
    return await asyncpg.connect(
        host=node.host, port=node.port, user="postgres", password=postgres.superuser_password, database=postgres.database
    )


def walreceivers(cluster: Cluster, leader: str) -> list[psutil.Process]:
    """The processes of the standbys that receive the leader's log."""
    found = []
    for node in cluster.status().shards[0].nodes:
        if node.name != leader and node.pid is not None:
            children = psutil.Process(node.pid).children()
            found += [child for child in children if "walreceiver" in " ".join(child.cmdline())]
    return found


@pytest.mark.faults
async def test_what_a_failover_erases_was_never_forwarded(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    """A commit that no standby has is in the leader's log, so it is decoded and sent to the worker; then the leader dies.

    The standbys' receivers are frozen first, and die before they could read what the leader had already sent them.
    """
    worker = await started(workers[0])
    await eventually(holds(derived, *await accept(store, "kept")), "the feed works")
    node = store.leaders.current(SHARD)
    assert node is not None
    frozen = walreceivers(shard_cluster, node.name)
    assert len(frozen) == 2
    erased = payment("erased")
    session = await leader_session(shard_cluster, store)
    try:
        for process in frozen:
            process.suspend()
        await session.execute("set synchronous_commit = local")
        put = [Put(erased, 0, "accepted")]
        arrays = (*new_arrays(put), *change_arrays([]), *entry_arrays([]))
        await session.fetch(_CALL, [0], None, "test", "test:1", *arrays, [], [], [], [])
        lsn = await session.fetchval("select pg_current_wal_lsn()")

        async def received() -> bool:
            flushed = await session.fetchval(
                "select sent_lsn >= $1 from pg_stat_replication where application_name = $2", lsn, worker.name
            )
            return bool(flushed)

        await eventually(received, "the leader has sent the change to the worker")
        await asyncio.sleep(1.0)  # long enough for many barriers, if one could be acknowledged
        assert erased.key in await derived.shard_keys()
        assert erased.key not in await derived.keys()
    finally:
        postmaster = shard_cluster.postmaster_pid(node.name)
        assert postmaster is not None
        os.kill(postmaster, signal.SIGKILL)
        for process in frozen:
            process.kill()
        session.terminate()
    kept = await accept(store, *(f"after{n}" for n in range(5)))
    assert store.leaders.current(SHARD) != node
    await eventually(holds(derived, *kept), "the feed goes on from the new leader", 40)
    await derived.same(40)
    assert erased.key not in await derived.keys()
    assert await store.get(erased.key) is None
    status, body = await worker.get("/readyz")
    assert status == 200, body


async def test_a_failover_under_load_loses_and_doubles_nothing(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    await started(workers[0])
    node = store.leaders.current(SHARD)
    assert node is not None
    acknowledged: list[str] = []
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            acknowledged.extend(await accept(store, *(f"load{n}" for n in range(5))))

    writers = [asyncio.create_task(load()) for _ in range(3)]
    await eventually(lambda: len(acknowledged) > 50, "writes flow")
    postmaster = shard_cluster.postmaster_pid(node.name)
    assert postmaster is not None
    os.kill(postmaster, signal.SIGKILL)
    await eventually(lambda: store.leaders.current(SHARD) not in (None, node), "another node leads", 30)
    count = len(acknowledged)
    await eventually(lambda: len(acknowledged) > count + 50, "writes flow again", 30)
    stop.set()
    await asyncio.gather(*writers)
    await eventually(holds(derived, *acknowledged), "the aggregator has all that was acknowledged", 30)
    await derived.same(30)


@pytest.mark.faults
async def test_a_slot_that_is_lost_under_a_running_worker_costs_no_payment_and_no_restart(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    worker = await started(workers[0])
    await eventually(holds(derived, *await accept(store, "before")), "the feed works")
    await eventually(derived.known_to_the_shard, "the shard knows that its feed was applied")
    session = await leader_session(shard_cluster, store)
    missed = payment("missed")  # its router is dead
    try:
        worker.send(signal.SIGSTOP)

        async def dropped() -> bool:
            slot = "from pg_replication_slots where slot_name = 'oncepay_feed'"
            await session.execute(f"select pg_terminate_backend(active_pid, 5000) {slot} and active")
            try:
                await session.execute(f"select pg_drop_replication_slot(slot_name) {slot}")
            except asyncpg.ObjectInUseError:
                return False
            return True

        await eventually(dropped, "the slot is gone")
        await store.accept(missed)
    finally:
        worker.send(signal.SIGCONT)
        session.terminate()

    async def driven_on() -> bool:
        return (await derived.shard_keys())[missed.key][1] == "attempted"

    await eventually(driven_on, "what the feed never brought is looked after", 40)
    assert [line["reason"] for line in worker.lines("standing down") if "the slot begins at" in line["reason"]]

    async def answers(status: int, text: str) -> bool:
        found = await worker.get("/readyz")
        return found[0] == status and text in str(found[1])

    await eventually(lambda: answers(503, "jumped ahead"), "its feed is halted, and says so")
    assert await worker.metric("oncepay_feed_halted{") == 1
    headers = {"Authorization": f"Bearer {shard_cluster.settings.internal_token}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(f"http://127.0.0.1:{worker.port}/v1/resnapshot") as answer:
            assert answer.status == 202
    await derived.same()
    await eventually(lambda: answers(200, ""), "the feed moves")
    assert await worker.metric("oncepay_feed_halted{") == 0


async def test_a_payment_in_progress_is_polled_until_it_succeeds(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    """Many that Stripe works on: the lists answer for most of them."""
    worker = await started(workers[0])
    faults = f"{shard_cluster.settings.stripe.base_url}/_control/faults"
    async with aiohttp.ClientSession() as http:
        await http.put(faults, json={"processing": 1.0, "processing_s": [3, 3]})
        try:
            made = [payment("slow", "pm_card_visa") for _ in range(40)]
            await asyncio.gather(*(store.accept(each) for each in made))

            async def all_paid() -> bool:
                rows = await derived.shard_keys()
                return all(rows.get(each.key, (0, ""))[1] == "succeeded" for each in made)

            await eventually(all_paid, "all were paid", 40)
        finally:
            await http.put(faults, json={})
    await derived.same()
    assert await worker.metric('oncepay_polls_total{how="list"') > 0


async def test_what_webhooks_missed_comes_with_the_events(
    shard_cluster: Cluster, workers: list[WorkerProcess], store: Shards, derived: Derived
) -> None:
    """Nobody receives webhooks here. Refunds and disputes that somebody makes in the Dashboard are found all the same."""
    worker = await started(workers[0])
    given_back, failing, disputed = (
        payment(name, method)
        for name, method in (
            ("back", "pm_card_visa"), ("failing", "pm_card_refundFail"), ("disputed", "pm_card_createDispute"),
        )
    )  # fmt: skip
    for each in (given_back, failing, disputed):
        await store.accept(each)

    async def row(each: Payment) -> Payment:
        found = await store.get(each.key)
        assert found is not None
        return found

    async def settled() -> bool:
        return all([not (await row(each)).open_work for each in (given_back, failing)])

    await eventually(settled, "two are settled: nothing is polled any more", 30)
    base_url = shard_cluster.settings.stripe.base_url
    async with stripe_client(base_url) as dashboard:
        for each in (given_back, failing):
            await dashboard.v1.refunds.create_async({"payment_intent": (await row(each)).intent, "amount": 400})

        async def all_there() -> bool:
            states = [[item.status for item in (await row(each)).progress.refunds] for each in (given_back, failing)]
            return (
                states[0] == ["succeeded"]
                and states[1] in (["succeeded"], ["failed"])
                and bool((await row(disputed)).progress.disputes)
            )

        await eventually(all_there, "the refunds and the dispute are in the rows", 30)
        async with aiohttp.ClientSession() as http:
            await http.post(f"{base_url}/_control/clock", json={"advance_s": 7 * 86_400})

        async def failed_late() -> bool:
            return [item.status for item in (await row(failing)).progress.refunds] == ["failed"]

        await eventually(failed_late, "the refund that failed long after it had succeeded is booked back", 30)
    assert (await row(given_back)).amount_refunded == 400
    assert (await row(failing)).amount_refunded == 0
    assert await worker.metric("oncepay_worker_events_total") > 0
    await derived.same()
