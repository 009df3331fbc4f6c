"""Ledger entries: sets of postings that sum to zero in one currency, named by what caused them.

A debit is positive, a credit negative. An entry is never changed or deleted; its `entry_id` is unique within its
payment, so that the same fact booked twice is one entry.
"""

from __future__ import annotations

import msgspec

from oncepay.cart import PLATFORM_SELLER, Share

STRIPE_CLEARING = "stripe:clearing"
STRIPE_FEES = "stripe:fees"
STRIPE_OTHER = "stripe:other"
REFUNDS_HELD = "refunds:held"
TIPALTI_CLEARING = "tipalti:clearing"
TIPALTI_FEES = "tipalti:fees"
BANK = "bank"
PLATFORM_FEES = "platform:fees"
PAYMENT = "payment"
"""Kind and id of the entry of a payment's success: a payment has one at most."""


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
    """The money of the one charge that succeeded (or was captured): clearing owes it, sellers and the platform earn it."""
    postings = [Posting(STRIPE_CLEARING, sum(share.gross for share in shares))]
    for share in shares:
        postings.append(Posting(payable(share.seller), -share.net, share.seller))
        if share.fee:
            postings.append(Posting(PLATFORM_FEES, -share.fee, share.seller))
    return Entry(PAYMENT, PAYMENT, currency, charge, tuple(postings))


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


def refund_entry(currency: str, refund: str, shares: tuple[Share, ...]) -> Entry:
    """A refund asked for: sellers and the platform give back their parts, which are held until Stripe pays."""
    return Entry(f"refund:{refund}", "refund", currency, refund, (*_given_back(shares), _held(shares, -1)))


def refund_reversed_entry(currency: str, refund: str, shares: tuple[Share, ...]) -> Entry:
    """A refund that failed or was canceled: what it took is given back."""
    taken = tuple(Posting(p.account, -p.amount_minor, p.seller) for p in _given_back(shares))
    return Entry(f"refund_reversed:{refund}", "refund_reversed", currency, refund, (*taken, _held(shares, 1)))


def _given_back(shares: tuple[Share, ...]) -> tuple[Posting, ...]:
    postings = []
    for share in shares:
        if share.net:
            postings.append(Posting(payable(share.seller), share.net, share.seller))
        if share.fee:
            postings.append(Posting(PLATFORM_FEES, share.fee, share.seller))
    return tuple(postings)


def _held(shares: tuple[Share, ...], sign: int) -> Posting:
    return Posting(REFUNDS_HELD, sign * sum(share.gross for share in shares))


def refund_paid_entries(
    currency: str, transaction: str, paid_minor: int, settled: str, settled_minor: int, fee_minor: int
) -> tuple[Entry, ...]:
    """A refund's balance transaction: what was held has left the clearing account.

    `paid_minor` (in `currency`) is positive when the refund was paid and negative when it came back, as Stripe's failure
    transaction says; `settled_minor` is the transaction's amount in the settlement currency without its sign, `fee_minor`
    its fee.
    """
    kind = "refund_paid" if paid_minor > 0 else "refund_returned"
    sign = 1 if paid_minor > 0 else -1
    held = Posting(REFUNDS_HELD, paid_minor)
    if settled == currency:
        entries = [Entry(f"{kind}:{transaction}", kind, currency, transaction, (held, Posting(STRIPE_CLEARING, -paid_minor)))]
    else:
        entries = [
            Entry(f"{kind}:{transaction}", kind, currency, transaction, (held, Posting(f"fx:{currency}", -paid_minor))),
            Entry(
                f"fx:{transaction}",
                "fx",
                settled,
                transaction,
                (Posting(f"fx:{settled}", sign * settled_minor), Posting(STRIPE_CLEARING, -sign * settled_minor)),
            ),
        ]
    if fee_minor:
        entries.append(stripe_fee_entry(settled, transaction, fee_minor))
    return tuple(entries)


def dispute_entries(
    currency: str, transaction: str, withdrawn: tuple[Share, ...], sign: int, settled: str, settled_minor: int, fee_minor: int
) -> tuple[Entry, ...]:
    """A dispute's balance transaction. `sign` is 1 when funds were withdrawn and -1 when they were reinstated.

    The sellers bear the amount by their shares (`gross` of each; the platform keeps its fee), the platform bears Stripe's.
    """
    kind = "dispute" if sign > 0 else "dispute_reinstated"
    total = sign * sum(share.gross for share in withdrawn)
    borne = tuple(Posting(payable(s.seller), sign * s.gross, s.seller) for s in withdrawn if s.gross)
    other = STRIPE_CLEARING if settled == currency else f"fx:{currency}"
    entries = [Entry(f"{kind}:{transaction}", kind, currency, transaction, (*borne, Posting(other, -total)))]
    if settled != currency:
        moved = (Posting(f"fx:{settled}", sign * settled_minor), Posting(STRIPE_CLEARING, -sign * settled_minor))
        entries.append(Entry(f"fx:{transaction}", "fx", settled, transaction, moved))
    if fee_minor:
        entries.append(stripe_fee_entry(settled, transaction, fee_minor))
    return tuple(entries)


def payout_entry(seller: str, currency: str, amount_minor: int, ref_code: str) -> Entry:
    """A payout that was committed: the seller is owed less, Tipalti is owed the money."""
    postings = (Posting(payable(seller), amount_minor, seller), Posting(TIPALTI_CLEARING, -amount_minor))
    return Entry("payout", "payout", currency, ref_code, postings)


def payout_returned_entry(seller: str, currency: str, amount_minor: int, ref_code: str) -> Entry:
    """A payout that didn't reach the seller, for whatever reason: booked back."""
    postings = (Posting(TIPALTI_CLEARING, amount_minor), Posting(payable(seller), -amount_minor, seller))
    return Entry("payout_returned", "payout_returned", currency, ref_code, postings)


def payout_fee_entry(currency: str, payment: str, total_minor: int, grown_minor: int) -> Entry:
    """Tipalti's fee for a payment, which is `total_minor` now, `grown_minor` more than was booked."""
    postings = (Posting(TIPALTI_FEES, grown_minor), Posting(TIPALTI_CLEARING, -grown_minor))
    return Entry(f"payout_fee:{total_minor}", "payout_fee", currency, payment, postings)


def payout_by_hand_entry(currency: str, amount_minor: int, reference: str) -> Entry:
    """A payout that was paid from the bank, and not by Tipalti."""
    return Entry(
        "payout_by_hand",
        "payout_by_hand",
        currency,
        reference,
        (Posting(TIPALTI_CLEARING, amount_minor), Posting(BANK, -amount_minor)),
    )


def transaction_entries(transaction: str, currency: str, amount_minor: int, fee_minor: int, *, bank: bool) -> tuple[Entry, ...]:
    """A balance transaction that no payment caused: a payout to the `bank` (or one that came back), or one of Stripe's others.

    `amount_minor` as Stripe signs it: what the account at Stripe gained, before `fee_minor`.
    """
    account, kind = (BANK, "bank_payout") if bank else (STRIPE_OTHER, "stripe_other")
    moved = (Posting(STRIPE_CLEARING, amount_minor), Posting(account, -amount_minor))
    entries = [Entry(f"{kind}:{transaction}", kind, currency, transaction, moved)] if amount_minor else []
    if fee_minor:
        entries.append(stripe_fee_entry(currency, transaction, fee_minor))
    return tuple(entries)
