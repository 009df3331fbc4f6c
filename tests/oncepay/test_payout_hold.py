"""What holds payout runs, on a real etcd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oncepay.etcd import Etcd
from oncepay.payout_hold import PayoutsHeld, check_not_held, hold, holds, release
from tests.etcd_fixture import EtcdCluster


@pytest.fixture(scope="module")
def member() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as made:
        yield made


async def test_runs_wait_until_each_shard_is_released(member: EtcdCluster) -> None:
    async with Etcd(member.settings()) as etcd:
        await check_not_held(etcd)
        await hold(etcd, "s8", "it wasn't compared")
        await hold(etcd, "s9", "it wasn't compared")
        await hold(etcd, "s9", "1 refunds are missing")
        assert [(each.shard, each.why) for each in await holds(etcd)] == [
            ("s8", "it wasn't compared"),
            ("s9", "1 refunds are missing"),
        ]
        assert await release(etcd, "s8")
        assert not await release(etcd, "s8")
        with pytest.raises(PayoutsHeld, match="refunds are missing"):
            await check_not_held(etcd)
        assert await release(etcd, "s9")
        await check_not_held(etcd)
