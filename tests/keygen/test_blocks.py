"""Blocks over a real etcd: owners that race, freeze, lose answers. No index may be granted twice."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import pairwise

import msgspec
import pytest

from keygen.blocks import RETIRED_KEPT, Blocks, Grant
from keygen.records import BlockRecord, block_key
from oncepay.errors import EtcdUnavailable
from oncepay.etcd import Etcd, EtcdOutcomeUnknown, TxnResult
from oncepay.settings import EtcdSettings
from tests.etcd_fixture import EtcdCluster, etcd_cluster

__all__ = ["etcd_cluster"]

pytestmark = pytest.mark.cluster

SIZE = 65_536


@pytest.fixture
async def etcd(etcd_cluster: EtcdCluster) -> AsyncIterator[Etcd]:
    async with Etcd(etcd_cluster.settings()) as client:
        yield client


async def started(etcd: Etcd, name: str, size: int = SIZE) -> Blocks:
    blocks = Blocks(etcd, name, size)
    blocks.mirror.start()
    await blocks.mirror.wait_synced(5)
    await blocks.register()
    return blocks


async def ended(*all_blocks: Blocks) -> None:
    for blocks in all_blocks:
        await blocks.mirror.stop()
        await blocks.leave()


def assert_disjoint(grants: list[Grant]) -> None:
    """No index of a seed is in two grants."""
    by_seed: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for grant in grants:
        by_seed[grant.seed].append((grant.first, grant.end))
    for ranges in by_seed.values():
        ranges.sort()
        for (_, end), (first, _) in pairwise(ranges):
            assert end <= first, ranges


async def granted(blocks: Blocks, count: int) -> Grant:
    while (grant := await blocks.grant(count)) is None:
        pass
    return grant


async def test_two_owners_never_share_an_index(etcd: Etcd) -> None:
    first, second = await started(etcd, "a"), await started(etcd, "b")
    grants: list[Grant] = []

    async def work(blocks: Blocks) -> None:
        grants.extend([await granted(blocks, 10_000) for _ in range(20)])

    await asyncio.gather(work(first), work(second))
    assert_disjoint(grants)
    assert sum(grant.end - grant.first for grant in grants) > 250_000
    await ended(first, second)


async def test_a_successor_begins_past_the_watermark_and_the_old_owner_gets_nothing_more(etcd: Etcd) -> None:
    old = await started(etcd, "old")
    first = await granted(old, 1_000)
    # Its lease ends without its noticing, as after a freeze.
    assert old._lease is not None
    await etcd._revoke_lease(old._lease.id)
    new = await started(etcd, "new")
    second = await granted(new, 1_000)
    assert (second.seed, second.first, second.end) == (first.seed, 1_000, 2_000)
    assert await old.grant(1_000) is None
    third = await granted(old, 1_000)
    assert third.seed != first.seed
    assert_disjoint([first, second, third])
    await ended(old, new)


async def test_a_block_of_a_living_owner_is_not_taken(etcd: Etcd) -> None:
    first, second = await started(etcd, "a"), await started(etcd, "b")
    one, two = await granted(first, 10), await granted(second, 10)
    assert one.seed != two.seed
    await ended(first, second)


class LosingEtcd(Etcd):
    """An etcd client that loses the answers of transactions: before or after they take effect, or long after."""

    def __init__(self, settings: EtcdSettings, plan: list[str]) -> None:
        super().__init__(settings)
        self.plan = plan
        self.late: list[asyncio.Future[TxnResult]] = []
        self._release = asyncio.Event()

    async def txn(self, *args: object, **kwargs: object) -> TxnResult:
        fate = self.plan.pop(0) if self.plan else "ok"
        if fate == "before":
            raise EtcdOutcomeUnknown("lost before")
        if fate == "late":
            self.late.append(asyncio.ensure_future(self._later(*args, **kwargs)))
            raise EtcdOutcomeUnknown("lost, and lands late")
        result = await super().txn(*args, **kwargs)  # type: ignore[arg-type]
        if fate == "after":
            raise EtcdOutcomeUnknown("lost after")
        return result

    async def _later(self, *args: object, **kwargs: object) -> TxnResult:
        await self._release.wait()
        return await super().txn(*args, **kwargs)  # type: ignore[arg-type]

    async def land_late(self) -> None:
        self._release.set()
        await asyncio.gather(*self.late)


@pytest.mark.parametrize(
    "plan",
    [
        ["after"],
        ["before"],
        ["late"],
        ["ok", "after", "after", "before", "ok"],
        ["ok", "late", "ok", "after"],
        ["late", "late", "ok"],
        ["ok", "before", "late", "after", "late", "ok"],
    ],
)
@pytest.mark.parametrize("step", [1_000, SIZE])
async def test_lost_answers_never_grant_twice(etcd_cluster: EtcdCluster, plan: list[str], step: int) -> None:
    settings = etcd_cluster.settings()
    async with LosingEtcd(settings, list(plan)) as losing, Etcd(settings) as plain:
        blocks = await started(losing, "losing")
        grants = [grant for _ in range(4) if (grant := await blocks.grant(step))]
        await losing.land_late()
        grants += [grant for _ in range(6) if (grant := await blocks.grant(step))]
        await blocks.mirror.stop()
        await blocks.leave()
        other = await started(plain, "other")
        grants += [await granted(other, step) for _ in range(6)]
        assert_disjoint(grants)
        assert sum(grant.end - grant.first for grant in grants) >= 6 * step
        await ended(other)


async def test_a_block_that_landed_late_is_found_and_used(etcd_cluster: EtcdCluster) -> None:
    async with LosingEtcd(etcd_cluster.settings(), ["late"]) as losing:
        blocks = await started(losing, "losing")
        assert await blocks.grant(1_000) is None
        await losing.land_late()
        kv = await losing.get(block_key("000000000001"))
        assert kv is not None
        await blocks.mirror.wait_revision(kv.mod_revision, 5)
        grant = await granted(blocks, 1_000)
        record = msgspec.json.decode(kv.value, type=BlockRecord)
        assert (grant.seed, grant.first, grant.end) == (record.seed, 1_000, 2_000)
        await ended(blocks)


async def test_used_up_blocks_lose_their_seed_and_few_records_stay(etcd: Etcd) -> None:
    blocks = await started(etcd, "a")
    for _ in range(RETIRED_KEPT + 5):
        grant = await granted(blocks, SIZE)
        assert (grant.first, grant.end) == (0, SIZE)
    for block in blocks.all():
        assert block.record.used_up
        assert block.record.seed == b""
    await blocks.tidy()
    kvs, _ = await etcd.get_prefix("keys/blocks/")
    assert len(kvs) == RETIRED_KEPT
    assert kvs[-1].key == block_key(f"{RETIRED_KEPT + 5:012}")
    await ended(blocks)


async def test_a_watermark_that_went_back_ends_the_block(etcd: Etcd) -> None:
    blocks = await started(etcd, "a")
    await granted(blocks, 1_000)
    before = await etcd.get(block_key("000000000001"))
    assert before is not None
    first = await granted(blocks, 1_000)
    await etcd.put(before.key, before.value)
    assert await blocks.grant(1_000) is None
    assert await etcd.get(before.key) is None
    after = await granted(blocks, 1_000)
    assert after.seed != first.seed
    await ended(blocks)


async def test_without_etcd_nothing_is_granted() -> None:
    with EtcdCluster(1) as cluster:
        async with Etcd(cluster.settings(), timeout_s=0.5) as client:
            blocks = await started(client, "a")
            await granted(blocks, 10)
            cluster.kill()
            with pytest.raises(EtcdUnavailable):
                await granted(blocks, 10)
            await blocks.mirror.stop()


async def test_the_first_mac_secret_is_everyone_s(etcd: Etcd) -> None:
    first, second = await started(etcd, "a"), await started(etcd, "b")
    await asyncio.gather(first.ensure_secrets(), second.ensure_secrets())
    kv = await etcd.get("keys/mac")
    assert kv is not None
    for blocks in (first, second):
        await blocks.mirror.wait_revision(kv.mod_revision, 5)
    assert first.secrets() == second.secrets() is not None
    await ended(first, second)


async def test_registering_again_after_a_lost_lease(etcd: Etcd) -> None:
    blocks = await started(etcd, "a")
    assert blocks._lease is not None
    await etcd._revoke_lease(blocks._lease.id)
    await asyncio.wait_for(blocks._lease.lost.wait(), 10)
    assert not blocks.registered
    await blocks.register()
    assert blocks.registered
    kv = await etcd.get(f"keys/owners/{blocks.owner}")
    assert kv is not None
    assert kv.lease == blocks._lease.id
    await ended(blocks)


async def test_a_stale_mirror_grants_nothing_twice(etcd: Etcd) -> None:
    blocks = await started(etcd, "a")
    first = await granted(blocks, SIZE // 2)
    await blocks.mirror.stop()
    second = await granted(blocks, SIZE)
    assert second.end == SIZE
    third = await blocks.grant(SIZE)
    assert third is None or third.first == third.end or third.seed != first.seed
    await blocks.leave()
