"""The shards, as a reconciliation needs them: what belongs to no payment is booked there, and rows are found by intent."""

from __future__ import annotations

from oncepay.ledger import transaction_entries
from shard.store.booking import book_transaction
from shard.store.payouts import PayoutStore
from shard.store.store import Shards

_BY_INTENT = "select key, status from oncepay.payments where intent = any ($1::text[])"


class ShardBooks:
    """`Books` of a run, over all shards. `actor` names the process."""

    def __init__(self, store: Shards, actor: str) -> None:
        self._store = store
        self._actor = actor
        self._payouts = PayoutStore(store, actor)

    async def book(self, transaction: str, currency: str, amount: int, fee: int, *, bank: bool) -> str:
        """Commit a transaction's entries, once."""
        entries = transaction_entries(transaction, currency, amount, fee, bank=bank)
        return await book_transaction(self._store, self._actor, transaction, entries)

    async def book_funding(self, funding: str, currency: str, amount: int) -> str:
        """Commit the entry of money from the bank to Tipalti, once."""
        return await self._payouts.book_funding(funding, currency, amount)

    async def has_payout(self, ref_code: str) -> bool:
        """Asks all shards."""
        return await self._payouts.by_ref_code(ref_code) is not None

    async def payment_of(self, intent: str) -> tuple[str, str] | None:
        """Asks all shards, each behind its barrier."""
        for shard in self._store.maps.current.shards():
            for row in await self._store.batcher(shard).read(_BY_INTENT, [intent]):
                return row["key"], row["status"]
        return None
