"""What of a seller's balance a run pays out, and why not more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from oncepay.money import payout_step_minor
from oncepay.payout import Payout, new_payout
from oncepay.settings import PayoutSettings


class Owed(NamedTuple):
    """What a seller is owed in a currency, from one snapshot. Minor units.

    `sequence` is its last payout (0: none), `held` whether the entry of that one is among those that `balance` was summed from.
    `missing` is a payout before it that isn't there (0: none), and whose amount is in `balance` again.
    """

    seller: str
    currency: str
    balance: int
    pending: int
    sequence: int
    held: bool
    missing: int = 0


class Held(NamedTuple):
    """A balance that isn't paid out now. `reason` is a word of REASONS, `detail` for people."""

    seller: str
    currency: str
    balance: int
    reason: str
    detail: str = ""


REASONS = {
    "pending": "all of it is of charges that are still in their hold time, or of inquiries",
    "minimum": "it is less than the smallest payout of its currency",
    "behind": "the entry of the seller's last payout has not come through the feed",
    "no_seller": "the seller was never put, so nobody knows whom to pay",
    "unknown_payee": "Tipalti doesn't know the payee",
    "unpayable": "Tipalti says that the payee can't be paid",
    "exists": "another run has made the payout since",
    "late": "the run took too long: what it was computed from is too old",
}
"""Why a balance may be held."""


def payable(owed: Owed, inquiries: Mapping[tuple[str, str], int], settings: PayoutSettings) -> int | Held:
    """Minor units to pay out of a balance, or why it is held. `inquiries` by seller and currency."""
    held_minor = owed.pending + inquiries.get((owed.seller, owed.currency), 0)
    amount = owed.balance - held_minor
    if amount > 0:
        amount -= amount % payout_step_minor(owed.currency)
    minimum = max(1, settings.minimum_minor.get(owed.currency, 1))
    if not owed.held:
        return Held(owed.seller, owed.currency, owed.balance, "behind", f"payout {owed.sequence}")
    if owed.balance <= held_minor:
        return Held(owed.seller, owed.currency, owed.balance, "pending", f"{held_minor} held")
    if amount < minimum:
        return Held(owed.seller, owed.currency, owed.balance, "minimum", f"{amount} of {minimum}")
    return amount


def proposed(
    owed: Owed,
    amount: int,
    payee: str,
    settings: PayoutSettings,
    *,
    run: str,
    created_by: str,
    positions: Mapping[str, str],
    now_ms: int,
) -> Payout:
    """The payout that follows the seller's last one, or first the one that is missing before it.

    That one has the key and the reference code of the payout that was lost, so that Tipalti, which may have paid it, tells.
    """
    above = settings.approval_above_minor.get(owed.currency)
    return new_payout(
        owed.seller,
        owed.currency,
        owed.missing or owed.sequence + 1,
        amount=amount,
        payee=payee,
        run=run,
        created_by=created_by,
        positions=dict(positions),
        needs_approval=above is not None and amount > above,
        now_ms=now_ms,
    )
