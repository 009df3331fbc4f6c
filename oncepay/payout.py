"""A payout: what a seller is paid through Tipalti, its row, its states, and what Tipalti shows of it.

A payout's key is (seller, currency, sequence) in a reserved namespace, and its reference code at Tipalti follows from the
key alone: so whoever makes payout n, however often, makes the same one. `oncepay.payout_moves` holds the one function that
changes a row; this module holds the words.
"""

from __future__ import annotations

import enum
from hashlib import sha256

import msgspec

from oncepay.errors import InvalidKey
from oncepay.keys import payout_key

REF_CODE_PREFIX = "op-"
REF_CODE_DIGITS = 40
PREFIX = "payout:"
SEQUENCE_DIGITS_MAX = 18
"""Sequences are of 64 bits at the shards."""


class PayoutStatus(enum.StrEnum):
    """Where a payout is in its life."""

    AWAITING_APPROVAL = "awaiting_approval"
    """The row and its entry are committed; a second operator has to agree before Tipalti is told."""
    CREATED = "created"
    """The row and its entry are committed; Tipalti knows nothing."""
    SUBMITTING = "submitting"
    """Tipalti was or will be told; from here on only Tipalti's word counts."""
    SUBMITTED = "submitted"
    SCHEDULED = "scheduled"
    PENDING_FUNDS = "pending_funds"
    """The platform's balance at Tipalti is too low."""
    RISK_REVIEW = "risk_review"
    PAID = "paid"
    """Sent to the bank, which may still return it."""
    CLEARED = "cleared"
    """With the seller, for good."""
    REJECTED = "rejected"
    RETURNED = "returned"
    """The bank gave it back after it was paid."""
    DEFERRED = "deferred"
    """The payee couldn't be paid."""
    CANCELED = "canceled"
    REFUSED = "refused"
    """Tipalti never took it: its line was an error."""
    DECLINED = "declined"
    """An operator stopped it before Tipalti was told."""


GIVEN_BACK = frozenset(
    {
        PayoutStatus.REJECTED,
        PayoutStatus.RETURNED,
        PayoutStatus.DEFERRED,
        PayoutStatus.CANCELED,
        PayoutStatus.REFUSED,
        PayoutStatus.DECLINED,
    }
)
"""In these the amount is the seller's again, and payable under the next sequence."""

OVER = GIVEN_BACK | {PayoutStatus.CLEARED}
"""These never change."""

BEFORE_TIPALTI = frozenset({PayoutStatus.AWAITING_APPROVAL, PayoutStatus.CREATED})
"""In these Tipalti was told nothing yet, so an operator may still stop it."""

AT_TIPALTI: dict[str, PayoutStatus] = {
    "submitted": PayoutStatus.SUBMITTED,
    "scheduled": PayoutStatus.SCHEDULED,
    "pending funds": PayoutStatus.PENDING_FUNDS,
    "risk review": PayoutStatus.RISK_REVIEW,
    "paid": PayoutStatus.PAID,
    "cleared": PayoutStatus.CLEARED,
    "rejected": PayoutStatus.REJECTED,
    "deferred": PayoutStatus.DEFERRED,
    "deferred (internal)": PayoutStatus.DEFERRED,
    "canceled": PayoutStatus.CANCELED,
    "cancelled": PayoutStatus.CANCELED,
}
"""Tipalti's words for a payment's state, in lower case. Paid is not final there."""


class PaymentView(msgspec.Struct, frozen=True):
    """A payment as Tipalti showed it. Amounts in minor units; `status` is Tipalti's own word, `payment` its id.

    `submitted_s` and `changed_s` (when its state changed last) are seconds since 1970, 0 where Tipalti doesn't say.
    """

    payment: str
    ref_code: str
    status: str
    amount: int
    currency: str
    fee: int = 0
    fee_currency: str = ""
    reason: str = ""
    submitted_s: int = 0
    changed_s: int = 0

    @property
    def known(self) -> PayoutStatus | None:
        """The state that it means here, None for a word that nobody knows."""
        return AT_TIPALTI.get(self.status.lower())


class PayoutProgress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has happened so far, beside the status.

    `sends` counts how often Tipalti was (about to be) told, `refusals` how many of these it answered with a clear no, of which
    number `refused` was the last. `sent_at_ms` is the time of the last send, `unknown_at_ms` that of the last one before it
    that got no answer. `fee` is what was booked of Tipalti's fee.
    """

    payment: str = ""
    sends: int = 0
    refusals: int = 0
    refused: int = 0
    sent_at_ms: int = 0
    unknown_at_ms: int = 0
    was_paid: bool = False
    fee: int = 0
    fee_currency: str = ""
    reason: str = ""
    approved_by: str = ""
    declined_by: str = ""
    reference: str = ""


class Payout(msgspec.Struct, frozen=True):
    """One payout's row. `amount` in minor units of `currency`; times in milliseconds since 1970 (UTC).

    `positions` is how far each shard's feed was applied when the amount was computed (shard → position as text). `run` names
    the run that made it, `created_by` who started that one. `version` grows by one with each committed change.
    """

    key: str
    seller: str
    currency: str
    sequence: int
    status: PayoutStatus
    version: int
    amount: int
    payee: str
    ref_code: str
    run: str
    created_by: str
    positions: dict[str, str]
    created_at_ms: int
    updated_at_ms: int
    progress: PayoutProgress = PayoutProgress()

    @property
    def over(self) -> bool:
        """Whether it can never change again."""
        return self.status in OVER


def ref_code(key: str) -> str:
    """The reference code of the payout with this key: the same for ever, and no longer than Tipalti takes (64 characters)."""
    return REF_CODE_PREFIX + sha256(key.encode()).hexdigest()[:REF_CODE_DIGITS]


def parse_key(key: str) -> tuple[str, str, int]:
    """Seller, currency and sequence of a payout's key. Raises InvalidKey when it is none."""
    head, _, number = key.rpartition(":")
    head, _, currency = head.rpartition(":")
    seller = head.removeprefix(PREFIX)
    plain = number.isascii() and number.isdigit() and len(number) <= SEQUENCE_DIGITS_MAX
    if head == seller or not plain or payout_key(seller, currency, int(number)) != key:
        raise InvalidKey(f"{key!r} is no payout's key: payout:<seller>:<currency>:<sequence>")
    return seller, currency, int(number)


def new_payout(
    seller: str,
    currency: str,
    sequence: int,
    *,
    amount: int,
    payee: str,
    run: str,
    created_by: str,
    positions: dict[str, str],
    needs_approval: bool,
    now_ms: int,
) -> Payout:
    """Payout number `sequence` (from 1) of a seller in a currency, as its run commits it."""
    key = payout_key(seller, currency, sequence)
    status = PayoutStatus.AWAITING_APPROVAL if needs_approval else PayoutStatus.CREATED
    return Payout(
        key, seller, currency, sequence, status, 1, amount, payee, ref_code(key), run, created_by, positions, now_ms, now_ms
    )
