"""The fees of a cart's sellers, cheaply: kept for FRESH_S, read in bulk, one read a shard at a time.

A change of a seller's fee takes effect within FRESH_S everywhere. While a seller's shard can't be read, the last fee known is
used (at most STALE_S old), so that one shard's failover holds up no payments on others; nobody can change the fee there
meanwhile either.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

from prometheus_client import Counter

from oncepay.cart import PLATFORM_SELLER, Fee, Item
from oncepay.errors import InvalidField, OncepayError, ShardUnavailable, TooBusy, Unavailable
from shard.store.sellers import Seller, by_shard, read_sellers
from shard.store.store import Shards

FRESH_S = 5.0
"""How long a seller's fee (or that there is no such seller) is used without a look."""
REFUSED_FRESH_S = 0.5
"""The same of a seller that isn't there, where its carts are refused: it may just be coming."""
STALE_S = 600.0
"""How old a fee may be that is used because its shard can't be read."""
STALE_WAIT_S = 1.0
"""How long a read may take before a fee that is known already is used."""
KNOWN_MAX = 100_000
"""Sellers kept in memory; the one that was read longest ago goes first."""
WANTED_MAX = 20_000
"""Sellers that may wait to be read from one shard; more are refused with TooBusy."""
READ_MAX = 1_000
"""Sellers in one read."""

READS = Counter("oncepay_router_seller_reads_total", "Sellers read for their fees.", ["outcome"])


class _Known:
    """What was read of a seller, by a read that began at `read_at_s`; `fee` is None for the default."""

    __slots__ = ("exists", "fee", "fresh_until_s", "read_at_s")

    def __init__(self, seller: Seller | None, read_at_s: float, fresh_s: float = FRESH_S) -> None:
        self.exists = seller is not None
        self.fee = seller.fee if seller else None
        self.read_at_s = read_at_s
        self.fresh_until_s = read_at_s + fresh_s


class Fees:
    """Fees by seller. With `refuse_unknown` a cart that names an unknown seller is refused; else the default holds."""

    def __init__(self, store: Shards, *, refuse_unknown: bool = False) -> None:
        self._store = store
        self._refuse_unknown = refuse_unknown
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._wanted: dict[str, dict[str, asyncio.Future[_Known]]] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def of(self, items: Collection[Item]) -> dict[str, Fee]:
        """The fees of those sellers of a cart that have one of their own.

        Raises InvalidField for an unknown seller where that is refused; ShardUnavailable after the store's hold when a
        seller that was never read can't be; TooBusy.
        """
        now_s = time.monotonic()
        found: dict[str, _Known] = {}
        due: set[str] = set()
        for item in items:
            seller = item.seller
            if seller == PLATFORM_SELLER or seller in found:
                continue
            known = self._known.get(seller)
            if known is not None and known.fresh_until_s >= now_s:
                found[seller] = known
            else:
                due.add(seller)
        if due:
            found |= await self._refreshed(due, now_s)
        if self._refuse_unknown:
            self._check_known(items, found)
        return {seller: known.fee for seller, known in found.items() if known.fee is not None}

    def learned(self, seller: Seller) -> None:
        """This process has just written the seller."""
        self._keep(seller.id, _Known(seller, time.monotonic()))

    async def stop(self) -> None:
        """End the reads."""
        for reader in list(self._readers.values()):
            reader.cancel()
        await asyncio.gather(*self._readers.values(), return_exceptions=True)

    def _check_known(self, items: Iterable[Item], found: Mapping[str, _Known]) -> None:
        for number, item in enumerate(items):
            if item.seller != PLATFORM_SELLER and not found[item.seller].exists:
                raise InvalidField(f"there is no seller {item.seller}", field=f"items[{number}].seller")

    async def _refreshed(self, due: Collection[str], now_s: float) -> dict[str, _Known]:
        """Read again what is due. What was read before is used as it was when that takes too long."""
        before = {s: known for s in due if (known := self._known.get(s)) and known.read_at_s > now_s - STALE_S}
        missing = [seller for seller in due if seller not in before]
        read: dict[str, _Known] = {}

        async def all_missing() -> None:
            read.update(await self._read([seller for seller in missing if seller not in read]))

        if before:
            try:
                async with asyncio.timeout(STALE_WAIT_S):
                    read.update(await self._read(list(before)))
            except (TimeoutError, Unavailable):
                for known in before.values():
                    known.fresh_until_s = time.monotonic() + FRESH_S
                READS.labels("stale").inc(len(before))
        if missing:
            await self._store.hold(all_missing)
        return before | read

    async def _read(self, sellers: list[str]) -> dict[str, _Known]:
        """Wait for the next read of each seller's shard. Raises NotOwner, ShardUnavailable, EtcdUnavailable or TooBusy."""
        shards = by_shard(self._store, sellers)
        futures = {seller: self._want(shard, seller) for shard, group in shards.items() for seller in group}
        await asyncio.wait(futures.values())  # a caller who gives up leaves them to the others
        return {seller: future.result() for seller, future in futures.items()}

    def _want(self, shard: str, seller: str) -> asyncio.Future[_Known]:
        wanted = self._wanted.setdefault(shard, {})
        future = wanted.get(seller)
        if future is None:
            if len(wanted) >= WANTED_MAX:
                raise TooBusy(f"{WANTED_MAX} sellers wait to be read from shard {shard}")
            future = wanted[seller] = asyncio.get_running_loop().create_future()
        if shard not in self._readers:
            self._readers[shard] = asyncio.create_task(self._read_all(shard), name=f"sellers-{shard}")
        return future

    async def _read_all(self, shard: str) -> None:
        """Read what is wanted, in as few reads as that takes, until nothing is."""
        try:
            while wanted := self._wanted.get(shard):
                batch = {seller: wanted.pop(seller) for seller in list(wanted)[:READ_MAX]}
                await self._read_batch(shard, batch)
        finally:
            del self._readers[shard]

    async def _read_batch(self, shard: str, batch: dict[str, asyncio.Future[_Known]]) -> None:
        began_s = time.monotonic()
        try:
            found = await read_sellers(self._store.batcher(shard), list(batch))
        except OncepayError as error:
            READS.labels("error").inc(len(batch))
            _fail(batch, error)
            return
        except BaseException:
            _fail(batch, ShardUnavailable("the read of the sellers was broken off"))
            raise
        READS.labels("done").inc(len(batch))
        for seller, future in batch.items():
            missing = found[seller] is None and self._refuse_unknown
            read = _Known(found[seller], began_s, REFUSED_FRESH_S if missing else FRESH_S)
            future.set_result(self._keep(seller, read))

    def _keep(self, seller: str, read: _Known) -> _Known:
        """What is known of the seller now: the read, unless a younger one is known."""
        known = self._known.get(seller)
        if known is not None and known.read_at_s > read.read_at_s:
            return known
        self._known[seller] = read
        self._known.move_to_end(seller)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return read


def _fail(batch: Mapping[str, asyncio.Future[_Known]], error: Exception) -> None:
    for future in batch.values():
        future.set_exception(error)
        future.exception()  # told, even when nobody waits any more
