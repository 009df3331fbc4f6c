"""What each kind of difference means: its likely cause, and what to do."""

from __future__ import annotations

from typing import NamedTuple


class Explanation(NamedTuple):
    """For a person."""

    cause: str
    advice: str


KINDS: dict[str, Explanation] = {
    "unbooked": Explanation(
        "Stripe moved money and no entry is linked to it: the payment's open work stopped, or it is nothing of this platform's",
        "look the source up at Stripe; when a payment of ours caused it, see why its worker hasn't booked it",
    ),
    "money_without_row": Explanation(
        "a charge whose PaymentIntent no row names: it was made past this platform, or a row was lost",
        "find out who confirmed it (Stripe's Dashboard shows the API request), then refund it there",
    ),
    "net_differs": Explanation(
        "the entries that are linked to it come to another sum on stripe:clearing than its net",
        "compare the payment's entries with the transaction at Stripe; book what is missing as a new entry",
    ),
    "of_several": Explanation(
        "one balance transaction is linked to entries of several payments",
        "only one of them can be right: compare each payment's charge with the transaction's source",
    ),
    "unlinked": Explanation(
        "an entry took or gave money at Stripe, and no balance transaction of Stripe's belongs to it",
        "wait for Stripe to post it; after a day ask Stripe about the source, and see what the payment's worker does",
    ),
    "linked_twice": Explanation(
        "one entry is linked to several balance transactions",
        "find out at Stripe which of them it belongs to; a correction is a new entry",
    ),
    "not_at_stripe": Explanation(
        "an entry is linked to a balance transaction that this account at Stripe doesn't have",
        "is the API key of another account or mode in the settings? Else the books were written past this platform",
    ),
    "not_looked_up": Explanation(
        "so many linked transactions are of another time that not all were looked up singly",
        "reconcile the time before, too",
    ),
    "bank_payout": Explanation(
        "a payout to the bank and its balance transactions don't say the same",
        "look the payout up at Stripe and in the bank's statement; ask Stripe's support when money is missing",
    ),
    "booked_otherwise": Explanation(
        "the transaction was booked with other amounts than Stripe shows now",
        "compare both; a correction is a new entry",
    ),
    "not_booked": Explanation(
        "the transaction couldn't be booked: its shard was away, or refused it",
        "run the reconciliation again; when it stays, see the aggregator's log",
    ),
}
