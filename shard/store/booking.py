"""Entries for what belongs to no payment, under reserved keys that are made of the provider's ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from oncepay.keys import slot as slot_of
from oncepay.keys import transaction_key
from oncepay.ledger import Entry
from shard.store.rows import moment
from shard.store.store import Shards

_BOOK = "select outcome from oncepay.book_transaction($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"

Booked = Literal["booked", "same", "differs"]


async def book_transaction(store: Shards, actor: str, transaction: str, entries: Sequence[Entry]) -> Booked:
    """Commit the entries of a balance transaction at Stripe that no payment caused, with their links. Once, by its id.

    Raises ShardUnavailable or OutcomeUnknown after the hold (the same again is safe), TooBusy at once.
    """
    key = transaction_key(transaction)
    slot = slot_of(key)
    columns = (
        [entry.entry_id for entry in entries],
        [entry.kind for entry in entries],
        [entry.currency for entry in entries],
        ["{" + ",".join(f'"{posting.account}"' for posting in entry.postings) + "}" for entry in entries],
        ["{" + ",".join(str(posting.amount_minor) for posting in entry.postings) + "}" for entry in entries],
    )

    async def attempt() -> Booked:
        batcher = store.batcher(store.maps.current.range_of(slot).shard)
        now = moment(time.time_ns() // 1_000_000)
        row = await batcher.write(_BOOK, batcher.first_of(slot), f"{actor} books", slot, key, transaction, now, *columns)
        if row["outcome"] == "moved":
            raise batcher.not_owner(key)
        outcome: Booked = row["outcome"]
        return outcome

    return await store.hold(attempt)
