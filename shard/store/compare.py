"""Comparing a shard with what others know of the same payments: the shards that own them, and Stripe.

A shard that was restored to a moment lacks what came later. Stripe's PaymentIntents carry the payment's key, so that what it
lacks of them can be named; so can what the owners' rows have beyond its own, and what they lack.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Literal, NamedTuple, Protocol

import asyncpg

from oncepay.keys import slot
from oncepay.stripe_objects import IntentList, IntentObject

PAGE_ROWS = 2_000
TERMINAL = frozenset({"succeeded", "failed", "canceled"})
UNCONFIRMED = frozenset({"requires_payment_method", "requires_confirmation", "canceled"})
"""Statuses of an intent that has moved no money."""
_FOLDER = resources.files("shard.store") / "sql"
_ROWS = (_FOLDER / "compare_rows.sql").read_text()
_KEYS = (_FOLDER / "compare_keys.sql").read_text()

Ranges = Sequence[tuple[int, int]]


class Row(NamedTuple):
    """A payment's state in a shard. Rows sort by (slot, key)."""

    slot: int
    key: str
    status: str
    version: int
    intent: str | None


Difference = Literal["missing", "older", "newer", "only_here", "forked"]
"""Of a payment here beside the owner's: not here; an older or newer version; unknown to the owner; the same version, and yet
another state."""


def difference(here: Row | None, there: Row | None) -> Difference | None:
    """How a payment differs from what the owner has; None when it doesn't."""
    if here is None or there is None:
        return "only_here" if there is None else "missing"
    if here.version != there.version:
        return "older" if here.version < there.version else "newer"
    return None if here == there else "forked"


class IntentDifference(NamedTuple):
    """An intent at Stripe that the shard doesn't have (`missing`), or whose outcome it doesn't have (`behind`).

    `money`: whether Stripe has moved money for it, or is about to. `amount` is in minor units, `created` in seconds since 1970.
    """

    what: Literal["missing", "behind"]
    key: str
    intent: str
    status: str
    row_status: str | None
    amount: int
    created: int
    money: bool


def intent_difference(intent: IntentObject, row: Row | None) -> IntentDifference | None:
    """What the shard lacks of an intent that carries a key of its slots."""
    key = (intent.metadata or {})["oncepay_key"]
    money = intent.status not in UNCONFIRMED
    about = (key, intent.id, intent.status, row.status if row else None, intent.amount, intent.created, money)
    if row is None or row.intent != intent.id:
        # An intent that lost the race for its row is known to nobody, and was canceled.
        return None if row is not None and intent.status == "canceled" else IntentDifference("missing", *about)
    over = intent.status in ("succeeded", "canceled")
    return IntentDifference("behind", *about) if over and row.status not in TERMINAL else None


async def rows(connection: asyncpg.Connection, ranges: Ranges) -> AsyncIterator[Row]:
    """Every payment in those ranges of slots (first, last), in order, page by page."""
    for first, last in ranges:
        at, key = first - 1, "\x7f"  # after every key of the slot before
        while True:
            page = [Row(*each) for each in await connection.fetch(_ROWS, at, key, last, PAGE_ROWS)]
            for row in page:
                yield row
            if len(page) < PAGE_ROWS:
                break
            at, key = page[-1].slot, page[-1].key


async def paired(here: AsyncIterator[Row], there: AsyncIterator[Row]) -> AsyncIterator[tuple[Row | None, Row | None]]:
    """Both, joined by (slot, key). Both must be in order."""
    mine, theirs = await anext(here, None), await anext(there, None)
    while mine is not None or theirs is not None:
        left = (mine.slot, mine.key) if mine is not None else None
        right = (theirs.slot, theirs.key) if theirs is not None else None
        if left is not None and (right is None or left <= right):
            yield mine, theirs if left == right else None
        else:
            yield None, theirs
        take_mine = left is not None and (right is None or left <= right)
        take_theirs = right is not None and (left is None or right <= left)
        mine = await anext(here, None) if take_mine else mine
        theirs = await anext(there, None) if take_theirs else theirs


class Intents(Protocol):
    """The list of `oncepay.stripe_client.StripeGateway`."""

    async def intents(self, *, created_gte: int, created_lte: int | None = None, starting_after: str = "") -> IntentList: ...


async def unknown_intents(
    connection: asyncpg.Connection, stripe: Intents, ranges: Ranges, *, since: int
) -> AsyncIterator[tuple[int, list[IntentDifference]]]:
    """Page by page of Stripe's intents since then (seconds since 1970): how many were of these slots, and what differs."""
    after = ""
    while True:
        page = await stripe.intents(created_gte=since, starting_after=after)
        ours = {(intent.metadata or {}).get("oncepay_key", ""): intent for intent in page.data}
        slots = {key: slot(key) for key in ours if key}
        keys = [key for key, number in slots.items() if any(first <= number <= last for first, last in ranges)]
        found = await connection.fetch(_KEYS, [slots[key] for key in keys], keys)
        known = {row["key"]: Row(*row) for row in found}
        differences = [intent_difference(ours[key], known.get(key)) for key in keys]
        yield len(keys), [each for each in differences if each is not None]
        if not page.has_more or not page.data:
            return
        after = page.data[-1].id
