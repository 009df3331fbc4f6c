"""Ledger entries: sets of postings that sum to zero in one currency, named by what caused them.

A debit is positive, a credit negative. An entry is never changed or deleted; its `entry_id` is unique within its
payment, so that the same fact booked twice is one entry.
"""

from __future__ import annotations

import msgspec

from oncepay.cart import PLATFORM_SELLER, Share

STRIPE_CLEARING = "stripe:clearing"
STRIPE_FEES = "stripe:fees"
PLATFORM_FEES = "platform:fees"


def payable(seller: str) -> str:
    """The account that holds what a seller is owed. Lines of the platform itself are its own income."""
    return PLATFORM_FEES if seller == PLATFORM_SELLER else f"seller:{seller}:payable"


class Posting(msgspec.Struct, frozen=True):
    """`amount_minor` on `account`: positive debits, negative credits. `seller` says on whose behalf, else empty."""

    account: str
    amount_minor: int
    seller: str = ""


class Entry(msgspec.Struct, frozen=True):
    """Postings that sum to zero. `kind` is what happened, `source` the provider's id of it (a charge, a transaction)."""

    entry_id: str
    kind: str
    currency: str
    source: str
    postings: tuple[Posting, ...]

    def __post_init__(self) -> None:
        total = sum(posting.amount_minor for posting in self.postings)
        if total != 0:
            raise ValueError(f"entry {self.entry_id} sums to {total} {self.currency}, not to zero")


class BalanceLink(msgspec.Struct, frozen=True):
    """A balance transaction at Stripe and an entry whose posting on the clearing account is (a part of) its net."""

    balance_transaction: str
    entry_id: str


def payment_entry(currency: str, charge: str, shares: tuple[Share, ...]) -> Entry:
    """The money of a charge that succeeded (or was captured): clearing owes it, sellers and the platform earn it."""
    postings = [Posting(STRIPE_CLEARING, sum(share.gross for share in shares))]
    for share in shares:
        postings.append(Posting(payable(share.seller), -share.net, share.seller))
        if share.fee:
            postings.append(Posting(PLATFORM_FEES, -share.fee, share.seller))
    return Entry(f"payment:{charge}", "payment", currency, charge, tuple(postings))


def stripe_fee_entry(currency: str, transaction: str, fee_minor: int) -> Entry:
    """Stripe's fee, taken out of what it owes us."""
    return Entry(
        f"stripe_fee:{transaction}",
        "stripe_fee",
        currency,
        transaction,
        (Posting(STRIPE_FEES, fee_minor), Posting(STRIPE_CLEARING, -fee_minor)),
    )


def exchange_entries(transaction: str, charged: str, charged_minor: int, settled: str, settled_minor: int) -> tuple[Entry, Entry]:
    """A charge in `charged` that Stripe settles in `settled`: each currency sums to zero against its own fx account."""
    out = Entry(
        f"fx_out:{transaction}",
        "fx",
        charged,
        transaction,
        (Posting(f"fx:{charged}", charged_minor), Posting(STRIPE_CLEARING, -charged_minor)),
    )
    back = Entry(
        f"fx_in:{transaction}",
        "fx",
        settled,
        transaction,
        (Posting(STRIPE_CLEARING, settled_minor), Posting(f"fx:{settled}", -settled_minor)),
    )
    return out, back
