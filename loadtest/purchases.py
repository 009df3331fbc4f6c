"""The CDNOW purchases as carts of a marketplace. See data/README.md for where they come from."""

from __future__ import annotations

import csv
import datetime
import hashlib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import msgspec

from oncepay.money import allocate

SELLERS = 40
SELLER_RULE = "disc d (from 0) of the n-th purchase of the file goes to seller (customer + 7 n + d) mod 40 + 1"
DECLINED = {
    "pm_card_visa_chargeDeclined": 0.02,
    "pm_card_visa_chargeDeclinedInsufficientFunds": 0.01,
}
"""Shares of purchases that are paid with a card that is declined."""
GOOD_CARD = "pm_card_visa"


class Purchase(msgspec.Struct, frozen=True):
    """One line of the file: purchase `number` (from 1) of `discs` discs for `amount_minor` US cents."""

    number: int
    buyer: str
    date: datetime.date
    discs: int
    amount_minor: int

    def items(self) -> list[dict[str, Any]]:
        """Each disc as an item of its seller; the cents sum to the purchase exactly."""
        first = int(self.buyer) + 7 * self.number
        return [
            {"seller": f"seller-{(first + disc) % SELLERS + 1:02d}", "amount": part}
            for disc, part in enumerate(allocate(self.amount_minor, [1] * self.discs))
        ]

    def chance(self, seed: int, what: str) -> float:
        """A number in [0, 1) that depends on the seed, the purchase and `what` alone."""
        digest = hashlib.sha256(f"{seed}:{what}:{self.number}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56

    def card(self, seed: int) -> str:
        """The payment method of this purchase."""
        chance = self.chance(seed, "card")
        for card, share in DECLINED.items():
            if chance < share:
                return card
            chance -= share
        return GOOD_CARD


def purchases(count: int | None = None) -> Iterator[Purchase]:
    """The first `count` purchases of the file (all by default), in its order.

    The file is sorted by customer, so the demo sorts by date: buyers come back as they did then.
    """
    text = (resources.files("loadtest") / "data" / "purchases.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    found = [
        Purchase(number, row["buyer"], datetime.date.fromisoformat(row["date"]), int(row["discs"]), _cents(row["amount_usd"]))
        for number, row in enumerate(rows, 1)
    ]
    found.sort(key=lambda purchase: (purchase.date, purchase.number))
    yield from found if count is None else found[:count]


def _cents(text: str) -> int:
    whole, _, part = text.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0")[:2])
