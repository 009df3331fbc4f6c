"""The etcd client over three real members that are killed, frozen and started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
from aetcd import rpc

from oncepay.errors import EtcdUnavailable
from oncepay.etcd import (
    Delete,
    Etcd,
    EtcdOutcomeUnknown,
    EtcdRefused,
    Event,
    Get,
    KeyValue,
    LeaseNotFound,
    Mirror,
    Put,
    Resync,
    absent,
    mod_revision_is,
    present,
    value_is,
)
from oncepay.etcd.client import prefix_end
from tests.etcd_fixture import EtcdCluster, EtcdMember, etcd_cluster

__all__ = ["etcd_cluster"]

pytestmark = pytest.mark.cluster


@pytest.fixture
async def etcd(etcd_cluster: EtcdCluster) -> AsyncIterator[Etcd]:
    async with Etcd(etcd_cluster.settings()) as client:
        yield client


def current_member(cluster: EtcdCluster, etcd: Etcd) -> EtcdMember:
    return cluster.members[cluster.endpoints.index(etcd.members.current().endpoint)]


async def mirrored(mirror: Mirror, key: str, value: bytes | None, timeout_s: float = 10) -> None:
    """Wait until the mirror shows `value` (None: nothing) at `key`."""
    changed = asyncio.Event()
    mirror.on_change(lambda *_: changed.set())
    async with asyncio.timeout(timeout_s):
        while (kv.value if (kv := mirror.get(key)) else None) != value:
            await changed.wait()
            changed.clear()


async def put_surely(etcd: Etcd, key: str, value: bytes) -> int:
    """Put again until it's known to be done, for tests that break connections."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await etcd.put(key, value)
            except EtcdUnavailable:
                continue


async def test_reading_and_writing(etcd: Etcd) -> None:
    assert await etcd.get("a") is None
    revision = await etcd.put("a", b"1")
    assert await etcd.get("a") == KeyValue("a", b"1", revision, revision)
    await etcd.put("a/b", b"2")
    await etcd.put("b", b"3")
    kvs, read_at = await etcd.get_prefix("a")
    assert [(kv.key, kv.value) for kv in kvs] == [("a", b"1"), ("a/b", b"2")]
    assert read_at >= revision + 2
    assert await etcd.count("") == 3
    assert await etcd.delete("a")
    assert not await etcd.delete("a")
    assert await etcd.delete_prefix("") == 2


async def test_a_deployment_sees_its_own_prefix_only(etcd_cluster: EtcdCluster) -> None:
    async with Etcd(etcd_cluster.settings("/one")) as one, Etcd(etcd_cluster.settings("/one2")) as two:
        await one.put("k", b"1")
        await two.put("k", b"2")
        assert [kv.value for kv in (await one.get_prefix(""))[0]] == [b"1"]
        assert [kv.value for kv in (await two.get_prefix(""))[0]] == [b"2"]


async def test_compare_and_put(etcd: Etcd) -> None:
    first = await etcd.compare_and_put("k", b"1", 0)
    assert first is not None
    assert await etcd.compare_and_put("k", b"2", 0) is None
    second = await etcd.compare_and_put("k", b"2", first)
    assert second is not None
    assert await etcd.compare_and_put("k", b"3", first) is None
    assert not await etcd.compare_and_delete("k", first)
    assert await etcd.compare_and_delete("k", second)
    assert await etcd.get("k") is None


async def test_of_many_that_compare_one_wins(etcd: Etcd) -> None:
    results = await asyncio.gather(*(etcd.compare_and_put("k", bytes([n]), 0) for n in range(20)))
    assert sum(result is not None for result in results) == 1


async def test_transactions(etcd: Etcd) -> None:
    done = await etcd.txn([absent("a"), absent("b")], [Put("a", b"1"), Put("b", b"2"), Get("a")])
    assert done.succeeded
    assert [[kv.value for kv in read] for read in done.reads] == [[b"1"]]
    other = await etcd.txn([present("a"), value_is("b", b"x")], [Delete("a")], [Get("", prefix=True)])
    assert not other.succeeded
    assert [[kv.key for kv in read] for read in other.reads] == [["a", "b"]]
    last = await etcd.txn([value_is("b", b"2"), mod_revision_is("a", done.revision)], [Delete("", prefix=True)])
    assert last.succeeded
    assert await etcd.count("") == 0


@pytest.mark.parametrize(("key", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"ab/", b"ab0")])
def test_the_end_of_a_prefix(key: bytes, end: bytes) -> None:
    assert prefix_end(key) == end


async def test_a_lease_is_kept_and_its_keys_go_with_it(etcd: Etcd) -> None:
    lease = await etcd.grant_lease(2)
    await etcd.put("leased", b"", lease.id)
    await asyncio.sleep(4)  # twice its life: only keepalives can have kept it
    assert lease.held
    assert await etcd.get("leased") is not None
    assert lease.id in await etcd.lease_ids()
    lost = asyncio.Event()
    lease.on_lost(lost.set)
    await lease.revoke()
    assert lost.is_set()
    assert not lease.held
    assert await etcd.get("leased") is None
    with pytest.raises(LeaseNotFound):
        await etcd.put("leased", b"", lease.id)


async def test_a_lease_that_etcd_ended_is_lost(etcd: Etcd) -> None:
    lease = await etcd.grant_lease(3)
    await etcd._revoke_lease(lease.id)
    await asyncio.wait_for(lease.lost.wait(), 3)


async def test_a_lease_is_lost_by_the_clock_when_etcd_is_away() -> None:
    with EtcdCluster(1) as cluster:
        async with Etcd(cluster.settings()) as etcd:
            lease = await etcd.grant_lease(3)
            cluster.members[0].freeze()
            began = time.monotonic()
            await asyncio.wait_for(lease.lost.wait(), 4)
            assert not lease.held
            assert time.monotonic() - began < 3.5
            cluster.members[0].thaw()


async def test_watching(etcd: Etcd) -> None:
    first = await etcd.put("w/a", b"1")
    await etcd.put("x", b"not watched")
    await etcd.put("w/b", b"2")
    await etcd.delete("w/a")
    seen: list[tuple[str, str, bytes]] = []
    async with aclosing(aiter(etcd.watch_prefix("w/", first))) as events:  # type: ignore[type-var]
        async for event in events:
            assert isinstance(event, Event)
            seen.append((event.kind, event.kv.key, event.kv.value))
            if len(seen) == 3:
                break
    assert seen == [("put", "w/a", b"1"), ("put", "w/b", b"2"), ("delete", "w/a", b"")]


async def test_a_watch_that_missed_compacted_revisions_begins_anew(etcd: Etcd) -> None:
    first = await etcd.put("w/a", b"1")
    await etcd.put("w/a", b"2")
    last = await etcd.put("w/b", b"3")
    await etcd.members.current().kv.Compact(rpc.CompactionRequest(revision=last))
    after = await etcd.put("w/c", b"4")
    async with aclosing(aiter(etcd.watch_prefix("w/", first))) as events:  # type: ignore[type-var]
        event = await anext(events)
    assert isinstance(event, Resync)
    assert event.revision >= after
    assert [(kv.key, kv.value) for kv in event.kvs] == [("w/a", b"2"), ("w/b", b"3"), ("w/c", b"4")]


async def test_no_event_is_missed_or_doubled_while_members_die(etcd_cluster: EtcdCluster, etcd: Etcd) -> None:
    start = await etcd.put("w/start", b"")
    seen: list[KeyValue] = []
    last_seen = asyncio.Event()

    async def watch() -> None:
        async for event in etcd.watch_prefix("w/", start + 1):
            assert isinstance(event, Event)
            seen.append(event.kv)
            if event.kv.key == "w/last":
                last_seen.set()
                return

    watching = asyncio.create_task(watch())
    async with Etcd(etcd_cluster.settings(etcd._prefix.rstrip("/"))) as writer:
        acknowledged = {}
        for number, member in enumerate(etcd_cluster.members):
            for step in range(20):
                key = f"w/{number}-{step}"
                acknowledged[key] = await put_surely(writer, key, b"")
                if step == 5:
                    member.kill()
                if step == 15:
                    etcd_cluster.start()
        await put_surely(writer, "w/last", b"")
    await asyncio.wait_for(last_seen.wait(), 20)
    await watching
    revisions = [kv.mod_revision for kv in seen]
    assert all(earlier < later for earlier, later in pairwise(revisions))
    assert set(acknowledged.values()) <= set(revisions)


async def test_a_frozen_member_is_left_behind(etcd_cluster: EtcdCluster, etcd: Etcd) -> None:
    async with Mirror(etcd, "m/") as mirror:
        await mirror.wait_synced(5)
        member = current_member(etcd_cluster, etcd)
        member.freeze()
        try:
            began = time.monotonic()
            assert await etcd.get("m/x") is None
            await put_surely(etcd, "m/x", b"1")
            await mirrored(mirror, "x", b"1")
            assert time.monotonic() - began < 8
            assert current_member(etcd_cluster, etcd) is not member
        finally:
            member.thaw()
            etcd_cluster.wait_healthy()


async def test_a_write_that_was_cut_off_is_unknown_and_one_never_sent_is_not() -> None:
    with EtcdCluster(1) as cluster:
        async with Etcd(cluster.settings(), timeout_s=1.0) as etcd:
            await etcd.put("k", b"1")
            cluster.members[0].freeze()
            with pytest.raises(EtcdOutcomeUnknown):
                await etcd.put("k", b"2")
            cluster.members[0].thaw()
            cluster.kill()
            with pytest.raises(EtcdUnavailable, match="can't be read"):
                await etcd.get("k")
            with pytest.raises(EtcdUnavailable) as caught:
                await etcd.put("k", b"3")
            assert not isinstance(caught.value, EtcdOutcomeUnknown)
            cluster.start()
            kv = await etcd.get("k")
            assert kv is not None
            assert kv.value in (b"1", b"2")


async def test_a_mirror_follows_and_outlives_etcd() -> None:
    with EtcdCluster(3) as cluster:
        async with Etcd(cluster.settings(), timeout_s=1.0) as etcd, Mirror(etcd, "m/") as mirror:
            await mirror.wait_synced(5)
            changes: list[tuple[str, bytes | None]] = []
            mirror.on_change(lambda key, kv: changes.append((key, kv.value if kv else None)))
            await etcd.put("m/a", b"1")
            await etcd.put("m/b", b"2")
            last = await etcd.put("m/a", b"3")
            await mirror.wait_revision(last, 5)
            await etcd.delete("m/b")
            await mirrored(mirror, "b", None)
            assert changes == [("a", b"1"), ("b", b"2"), ("a", b"3"), ("b", None)]
            assert mirror.stale_s < 4
            cluster.kill()
            with pytest.raises(EtcdUnavailable):
                await etcd.get("m/a")
            kv = mirror.get("a")
            assert kv is not None
            assert kv.value == b"3"
            cluster.start()
            await put_surely(etcd, "m/c", b"4")
            await mirrored(mirror, "c", b"4")
            assert mirror.stale_s < 4


async def test_a_mirror_reads_everything_again_now_and_then(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the watch tells nothing, as etcd has done around compactions."""

    class DeafWatch:
        def __init__(self, *_: object) -> None:
            self.heard_at = 0.0

        async def __aiter__(self) -> AsyncIterator[Event]:
            await asyncio.Event().wait()
            yield Event("put", KeyValue("", b"", 0))

    monkeypatch.setattr("oncepay.etcd.client.Watch", DeafWatch)
    async with Mirror(etcd, "m/", resync_s=0.2) as mirror:
        await mirror.wait_synced(5)
        await etcd.put("m/a", b"1")
        await mirrored(mirror, "a", b"1")
        await etcd.delete("m/a")
        await mirrored(mirror, "a", None)


async def test_a_mirror_outlives_a_refusal_and_a_record_that_cant_be_read(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its process would believe for ever what it read before."""
    get_prefix, refused = Etcd.get_prefix, [EtcdRefused("internal error"), EtcdRefused("internal error")]

    async def refusing(self: Etcd, prefix: str, **options: Any) -> Any:
        if prefix == "mirror3/" and refused:
            raise refused.pop()
        return await get_prefix(self, prefix, **options)

    def unreadable(key: str, kv: KeyValue | None) -> None:
        if kv is not None and kv.value == b"?":
            raise ValueError(key)

    monkeypatch.setattr(Etcd, "get_prefix", refusing)
    async with Mirror(etcd, "mirror3/", on_change=unreadable, resync_s=0.3) as mirror:
        await mirror.wait_synced(5)
        assert not refused
        await etcd.put("mirror3/a", b"?")
        await mirrored(mirror, "a", b"?")
        refused.append(EtcdRefused("internal error"))
        async with asyncio.timeout(5):
            while refused:
                await asyncio.sleep(0.05)
        await etcd.put("mirror3/b", b"1")
        await mirrored(mirror, "b", b"1")


async def test_a_mirror_that_was_never_filled_says_so() -> None:
    with EtcdCluster(1) as cluster:
        cluster.kill()
        async with Etcd(cluster.settings(), timeout_s=0.3) as etcd, Mirror(etcd, "m/") as mirror:
            with pytest.raises(EtcdUnavailable):
                await mirror.wait_synced(0.5)
            assert not mirror.synced
            assert mirror.stale_s == float("inf")
            cluster.start()
            await mirror.wait_synced(10)


async def test_versions(etcd_cluster: EtcdCluster, etcd: Etcd) -> None:
    versions = await etcd.member_versions()
    assert set(versions) == set(etcd_cluster.endpoints)
    assert all(version.startswith("3.") for version in versions.values())
