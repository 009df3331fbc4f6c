"""Payouts that Tipalti has and a restored shard doesn't: told by their reference codes, which follow from their keys.

Each payout of a seller is on the shard that its own key hashes to. So after the last one that this shard has, the next few that
would be its own are asked for; where Tipalti has one of them, the next few after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import NamedTuple, Protocol

import asyncpg

from oncepay.keys import payout_key, slot
from oncepay.payout import PaymentView, ref_code
from oncepay.tipalti_client import LOOK_MAX
from shard.store.compare import Ranges

SELLERS_MAX = 20_000
"""Sellers, with a currency each, of which Tipalti is asked; those that were paid last go first."""
NEXT = 5
"""Payouts of a seller that are asked for at once."""
FURTHER_MAX = 1_000
"""How far past the last known one the shard's own are sought: of few slots they are rare."""
ROUNDS_MAX = 20
_LAST = (resources.files("shard.store") / "sql" / "compare_payouts.sql").read_text()


class PayoutDifference(NamedTuple):
    """A payout that Tipalti has and the shard doesn't. `amount` is in minor units, `status` Tipalti's own word."""

    key: str
    seller: str
    currency: str
    sequence: int
    ref_code: str
    payment: str
    status: str
    amount: int


class PayoutsBeside(NamedTuple):
    """What Tipalti has beyond the shard. `left_out` sellers with a currency weren't asked for, there being too many."""

    sellers: int
    looked_up: int
    left_out: int
    missing: list[PayoutDifference]


class Payments(Protocol):
    """The look of `oncepay.tipalti_client.TipaltiClient`."""

    async def payments(self, ref_codes: Sequence[str]) -> Mapping[str, PaymentView]: ...


class _Asked(NamedTuple):
    key: str
    seller: str
    currency: str
    sequence: int


async def unknown_payouts(connection: asyncpg.Connection, tipalti: Payments, ranges: Ranges) -> PayoutsBeside:
    """Those after the last one of each seller and currency that the shard has, in these ranges. Raises TipaltiUnavailable."""
    firsts, lasts = [first for first, _ in ranges], [last for _, last in ranges]
    rows = await connection.fetch(_LAST, firsts, lasts)
    after = {(row["seller"], row["currency"]): row["last"] for row in rows[:SELLERS_MAX]}
    looked_up, missing = 0, list[PayoutDifference]()
    for _ in range(ROUNDS_MAX):
        asked = [each for of, last in after.items() for each in itertools.islice(_own(*of, last, ranges), NEXT)]
        found = await _found(tipalti, asked)
        looked_up += len(asked)
        missing += found
        after = {}
        for each in found:
            after[each.seller, each.currency] = max(each.sequence, after.get((each.seller, each.currency), 0))
        if not after:
            break
    left_out = max(0, len(rows) - SELLERS_MAX) + len(after)
    return PayoutsBeside(len(rows), looked_up, left_out, missing)


def _own(seller: str, currency: str, last: int, ranges: Ranges) -> Iterator[_Asked]:
    """A seller's payouts after the last one, as far as they would be in these ranges."""
    for sequence in range(last + 1, last + 1 + FURTHER_MAX):
        key = payout_key(seller, currency, sequence)
        if any(first <= slot(key) <= end for first, end in ranges):
            yield _Asked(key, seller, currency, sequence)


async def _found(tipalti: Payments, asked: Sequence[_Asked]) -> list[PayoutDifference]:
    found = []
    for start in range(0, len(asked), LOOK_MAX):
        codes = {ref_code(each.key): each for each in asked[start : start + LOOK_MAX]}
        for code, view in (await tipalti.payments(list(codes))).items():
            if code in codes:
                found.append(PayoutDifference(*codes[code], code, view.payment, view.status, view.amount))
    return found
