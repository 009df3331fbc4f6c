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
    "tipalti_not_compared": Explanation(
        "Tipalti, or a shard that was asked, gave no usable answer, so not all payments were compared; Stripe's half is whole",
        "run the reconciliation again; when it stays, see the aggregator's log and the credentials",
    ),
    "unreadable": Explanation(
        "a payment or a funding in Tipalti's list that can't be read, as in a currency that isn't known here",
        "look it up in Tipalti's pages: who ordered it? It is compared with nothing",
    ),
    "payment_without_payout": Explanation(
        "a payment at Tipalti whose reference code is of no payout: it was made past this platform, or a row was lost",
        "find out who ordered it (Tipalti's pages show the batch); have it stopped or returned there, or find its payout's shard",
    ),
    "paid_twice": Explanation(
        "several payments at Tipalti have the reference code of one payout",
        "have all but one stopped or returned at Tipalti at once; then ask Tipalti how it could take the code twice",
    ),
    "payout_differs": Explanation(
        "the payment at Tipalti is of another amount or currency than the payout",
        "have it stopped at Tipalti while it isn't paid; compare who was told what. A correction is a new entry",
    ),
    "payout_net_differs": Explanation(
        "what is posted on tipalti:clearing for the payout isn't what its payment's state and fee at Tipalti come to",
        "does the shard's worker look at it? Compare the payout's entries with the payment; a correction is a new entry",
    ),
    "payout_not_at_tipalti": Explanation(
        "the payout was committed or told to Tipalti, and Tipalti has no payment with its reference code",
        "while it is created or submitting its worker tells Tipalti when it can; else: are the credentials another account's?",
    ),
    "posted_without_payout": Explanation(
        "an entry on tipalti:clearing is of no payout and of no funding",
        "the books were written past this platform, or the payout's row was lost: find its shard",
    ),
    "funding_not_booked": Explanation(
        "money came to the balance at Tipalti from the bank, or went back, and nothing is booked for it",
        "its shard was away, or refused it: run the reconciliation again; when it stays, see the aggregator's log",
    ),
    "funding_differs": Explanation(
        "what is booked for money from the bank to Tipalti isn't what Tipalti shows",
        "compare both; a correction is a new entry",
    ),
    "funding_not_at_tipalti": Explanation(
        "an entry is booked as money from the bank to Tipalti, which Tipalti doesn't have",
        "are the credentials of another account in the settings? Else the books were written past this platform",
    ),
}
