"""What holds payout runs: a shard that took a lost one's place, until what it lacks was worked off. Records in etcd."""

from __future__ import annotations

import datetime as dt

import msgspec

from oncepay.errors import OncepayError
from oncepay.etcd import Etcd

PREFIX = "payouts/held/"


class PayoutsHeld(OncepayError):
    """Payout runs are held until a restored shard was checked."""

    status = 409
    slug = "payouts-held"


class Hold(msgspec.Struct, frozen=True):
    """Why no run is made, and since when (UTC)."""

    shard: str
    why: str
    since: dt.datetime


async def hold(etcd: Etcd, shard: str, why: str) -> None:
    """Hold all runs because of a shard; again for another reason."""
    await etcd.put(PREFIX + shard, msgspec.json.encode(Hold(shard, why, dt.datetime.now(dt.UTC))))


async def holds(etcd: Etcd) -> list[Hold]:
    """All that holds runs."""
    found, _ = await etcd.get_prefix(PREFIX)
    return [msgspec.json.decode(kv.value, type=Hold) for kv in found]


async def release(etcd: Etcd, shard: str) -> bool:
    """End a shard's hold; whether there was one."""
    return await etcd.delete(PREFIX + shard)


async def check_not_held(etcd: Etcd) -> None:
    """Raises PayoutsHeld, or EtcdUnavailable when that isn't known."""
    if found := await holds(etcd):
        text = "; ".join(f"{each.shard}: {each.why}" for each in found)
        raise PayoutsHeld(f"{text}. When that was worked off: `oncepay payouts release {found[0].shard}`")
