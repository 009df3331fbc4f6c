"""Sellers: single rows, written as a whole and read in bulk, in the shard that each one's key hashes to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal

import msgspec

from oncepay.cart import Fee
from oncepay.keys import seller_key
from oncepay.keys import slot as slot_of
from shard.store.batch import Batcher
from shard.store.rows import milliseconds, moment
from shard.store.store import Shards

_FOLDER = resources.files("shard.store") / "sql"
_PUT = (_FOLDER / "put_seller.sql").read_text()
_READ = (_FOLDER / "read_sellers.sql").read_text()


class Seller(msgspec.Struct, frozen=True):
    """A seller: its payee at Tipalti, the currency that it is paid in, its own fee (None: the deployment's).

    `version` grows by one with each change; times in milliseconds since 1970.
    """

    id: str
    payee: str
    currency: str
    fee: Fee | None = None
    version: int = 0
    created_at_ms: int = 0
    updated_at_ms: int = 0


Outcome = Literal["created", "replaced", "same"]


async def put_seller(store: Shards, actor: str, seller: Seller) -> tuple[Seller, Outcome]:
    """Commit the seller as a whole; the row as it is then. The same again changes nothing.

    Raises ShardUnavailable or OutcomeUnknown after the hold, TooBusy at once.
    """
    key = seller_key(seller.id)
    slot = slot_of(key)
    fee = (seller.fee.basis_points, seller.fee.fixed_minor) if seller.fee else (None, None)

    async def attempt() -> tuple[Seller, Outcome]:
        owner = store.maps.current.range_of(slot)
        now = moment(time.time_ns() // 1_000_000)
        batcher = store.batcher(owner.shard)
        row = await batcher.write(
            _PUT, batcher.first_of(slot), actor, f"{actor} seller", slot, key, seller.payee, seller.currency, *fee, now
        )  # fmt: skip
        if row["outcome"] == "moved":
            raise batcher.not_owner(key)
        return _seller_of(row), row["outcome"]

    return await store.hold(attempt)


async def get_seller(store: Shards, seller: str) -> Seller | None:
    """The seller, read behind the barrier. Raises ShardUnavailable after the hold."""

    async def attempt() -> Seller | None:
        (shard,) = by_shard(store, [seller])
        return (await read_sellers(store.batcher(shard), [seller]))[seller]

    return await store.hold(attempt)


def by_shard(store: Shards, sellers: Iterable[str]) -> Mapping[str, list[str]]:
    """The sellers by the shard that owns them as the map says now. Raises EtcdUnavailable when none was read yet."""
    shards: dict[str, list[str]] = defaultdict(list)
    for seller in sellers:
        shards[store.maps.current.range_of(slot_of(seller_key(seller))).shard].append(seller)
    return shards


async def read_sellers(batcher: Batcher, sellers: list[str]) -> dict[str, Seller | None]:
    """Sellers of one shard in one read behind the barrier; None for each that isn't known.

    Raises NotOwner when one of them is not this shard's, and ShardUnavailable.
    """
    keys = [seller_key(seller) for seller in sellers]
    rows = await batcher.read(_READ, [slot_of(key) for key in keys], keys)
    found: dict[str, Seller | None] = {}
    for seller, row in zip(sellers, rows, strict=True):
        if not row["owned"]:
            raise batcher.not_owner(f"seller {seller}")
        found[seller] = _seller_of(row) if row["key"] is not None else None
    return found


def _seller_of(row: Mapping[str, Any]) -> Seller:
    own = row["basis_points"] is not None
    return Seller(
        id=row["key"].removeprefix("seller:"),
        payee=row["payee"],
        currency=row["currency"],
        fee=Fee(row["basis_points"], row["fixed_minor"]) if own else None,
        version=row["version"],
        created_at_ms=milliseconds(row["created_at"]),
        updated_at_ms=milliseconds(row["updated_at"]),
    )
