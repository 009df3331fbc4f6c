"""Refunds and disputes that Stripe has of a restored shard's payments, and that their rows don't know.

Nothing looks at a payment that is over: what was acknowledged after the moment that was restored stays unknown until somebody
asks for a look at it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from importlib import resources
from typing import Literal, NamedTuple, Protocol, TypeVar

import asyncpg

from oncepay.payment import DISPUTE_OVER, REFUND_RANK, Progress
from oncepay.payment_text import parse_progress
from oncepay.refunds import is_same
from oncepay.stripe_objects import DisputeList, DisputeObject, RefundList, RefundObject
from shard.store.compare import Ranges

_AFTER = (resources.files("shard.store") / "sql" / "compare_after.sql").read_text()

Kind = Literal["refund", "dispute"]
T = TypeVar("T", RefundObject, DisputeObject)


class AfterDifference(NamedTuple):
    """A refund or a dispute that the payment's row doesn't have (`missing`), or of which Stripe knows more (`behind`).

    `id` is Stripe's, `key` the payment's; `status` is Stripe's, `row_status` that in the row. `amount` is in minor units,
    `created` in seconds since 1970.
    """

    what: Literal["missing", "behind"]
    kind: Kind
    id: str
    key: str
    intent: str
    status: str
    row_status: str | None
    amount: int
    created: int


class Afters(Protocol):
    """The lists of `oncepay.stripe_client.StripeGateway`."""

    async def refunds_since(self, *, created_gte: int, starting_after: str = "") -> RefundList: ...

    async def disputes_since(self, *, created_gte: int, starting_after: str = "") -> DisputeList: ...


def refund_difference(refund: RefundObject, key: str, known: Progress) -> AfterDifference | None:
    """What the row of its payment lacks of a refund at Stripe."""
    view = refund.view()
    mine = next((each for each in known.refunds if is_same(each, view)), None)
    if mine is not None and REFUND_RANK[view.status] <= REFUND_RANK[mine.status]:
        return None
    kind: Kind = "refund"
    about = (refund.id, key, refund.payment_intent or "", refund.status or "unknown", mine.status if mine else None)
    return AfterDifference("behind" if mine else "missing", kind, *about, refund.amount, refund.created)


def dispute_difference(dispute: DisputeObject, key: str, known: Progress) -> AfterDifference | None:
    """What the row of its payment lacks of a dispute at Stripe: itself, its end, or money that it moved."""
    mine = next((each for each in known.disputes if each.id == dispute.id), None)
    if mine is not None:
        booked = {item.id for item in dispute.balance_transactions} <= set(mine.booked)
        if booked and (mine.status == dispute.status or mine.status in DISPUTE_OVER or dispute.status not in DISPUTE_OVER):
            return None
    kind: Kind = "dispute"
    about = (dispute.id, key, dispute.payment_intent or "", dispute.status, mine.status if mine else None)
    return AfterDifference("behind" if mine else "missing", kind, *about, dispute.amount, dispute.created)


async def unknown_refunds(
    connection: asyncpg.Connection, stripe: Afters, ranges: Ranges, *, since: int
) -> AsyncIterator[tuple[int, list[AfterDifference]]]:
    """Page by page of Stripe's refunds since then (seconds since 1970): how many were of these slots, and what differs."""
    after = ""
    while True:
        page = await stripe.refunds_since(created_gte=since, starting_after=after)
        yield await _differences(connection, ranges, page.data, refund_difference)
        if not page.has_more or not page.data:
            return
        after = page.data[-1].id


async def unknown_disputes(
    connection: asyncpg.Connection, stripe: Afters, ranges: Ranges, *, since: int
) -> AsyncIterator[tuple[int, list[AfterDifference]]]:
    """The same of disputes."""
    after = ""
    while True:
        page = await stripe.disputes_since(created_gte=since, starting_after=after)
        yield await _differences(connection, ranges, page.data, dispute_difference)
        if not page.has_more or not page.data:
            return
        after = page.data[-1].id


async def _differences(
    connection: asyncpg.Connection,
    ranges: Ranges,
    found: Sequence[T],
    difference: Callable[[T, str, Progress], AfterDifference | None],
) -> tuple[int, list[AfterDifference]]:
    """Those of an intent that no row has are of another shard, or of a payment that is missing itself."""
    intents = list({each.payment_intent for each in found if each.payment_intent})
    rows = {
        row["intent"]: (row["key"], parse_progress(row["progress"]))
        for row in await connection.fetch(_AFTER, intents)
        if any(first <= row["slot"] <= last for first, last in ranges)
    }
    ours = [each for each in found if each.payment_intent in rows]
    differences = [difference(each, *rows[each.payment_intent or ""]) for each in ours]
    return len(ours), [each for each in differences if each is not None]
