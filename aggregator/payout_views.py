"""What the payout calls answer, and what they take."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import msgspec

from aggregator.views import Positions
from oncepay.payout import Payout, PayoutProgress

_progress = msgspec.json.Decoder(PayoutProgress).decode
_positions = msgspec.json.Decoder(dict[str, str]).decode


class RunBody(msgspec.Struct, forbid_unknown_fields=True):
    """A run: of one currency, of some sellers, or of all. With `dry_run` it only says what it would do."""

    dry_run: bool = False
    currency: str | None = None
    sellers: list[str] | None = None


class DeclineBody(msgspec.Struct, forbid_unknown_fields=True):
    """Why a payout is stopped."""

    reason: str = ""


class BookBody(msgspec.Struct, forbid_unknown_fields=True):
    """A payout that was paid by hand: the bank's reference."""

    reference: str


class PayoutView(msgspec.Struct, frozen=True):
    """A payout. `amount` in minor units of `currency`, `tipalti_fee` of `tipalti_fee_currency`; times in UTC (RFC 3339), to the
    millisecond.

    `positions` is how far each shard's feed was applied when the amount was computed; `reason` says why it wasn't paid.
    """

    key: str
    seller: str
    currency: str
    sequence: int
    status: str
    amount: int
    payee: str
    ref_code: str
    payment: str | None
    tipalti_fee: int
    tipalti_fee_currency: str
    reason: str
    run: str
    created_by: str
    approved_by: str | None
    positions: Positions
    created_at: str
    updated_at: str
    version: int


class PostingView(msgspec.Struct, frozen=True):
    """A posting: positive amounts are debits."""

    account: str
    amount: int


class EntryView(msgspec.Struct, frozen=True):
    """A ledger entry of a payout."""

    entry: str
    kind: str
    currency: str
    postings: list[PostingView]


class OnePayout(msgspec.Struct, frozen=True):
    """A payout with its ledger entries, oldest first, as its shard has them now."""

    payout: PayoutView
    entries: list[EntryView]


class PayoutPage(msgspec.Struct, frozen=True):
    """Payouts, newest first. `cursor` gives the next page; null on the last one."""

    payouts: list[PayoutView]
    cursor: str | None
    positions: Positions


class SellerPayouts(msgspec.Struct, frozen=True):
    """A seller's payouts, newest first. `cursor` gives the next page; null on the last one."""

    seller: str
    payouts: list[PayoutView]
    cursor: str | None
    positions: Positions


class HeldView(msgspec.Struct, frozen=True):
    """A balance that a run doesn't pay, in minor units, and why."""

    seller: str
    currency: str
    balance: int
    reason: str
    detail: str


class RunTotal(msgspec.Struct, frozen=True):
    """What a run pays in one currency: how many payouts, of how much, and how many of them wait for approval."""

    currency: str
    payouts: int
    amount: int
    awaiting_approval: int


class RunView(msgspec.Struct, frozen=True):
    """What a run made, or with `dry_run` would make. Lists are cut at LISTED_MAX; `totals` and `held_by_reason` count all."""

    run: str
    dry_run: bool
    created_by: str
    totals: list[RunTotal]
    held_by_reason: dict[str, int]
    payouts: list[PayoutView]
    held: list[HeldView]
    positions: Positions


def _time(milliseconds: int) -> str:
    moment = dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def payout_view(payout: Payout) -> PayoutView:
    """A payout as it is shown."""
    progress = payout.progress
    return PayoutView(
        key=payout.key,
        seller=payout.seller,
        currency=payout.currency,
        sequence=payout.sequence,
        status=payout.status.value,
        amount=payout.amount,
        payee=payout.payee,
        ref_code=payout.ref_code,
        payment=progress.payment or progress.reference or None,
        tipalti_fee=progress.fee,
        tipalti_fee_currency=progress.fee_currency or payout.currency,
        reason=progress.reason,
        run=payout.run,
        created_by=payout.created_by,
        approved_by=progress.approved_by or None,
        positions=payout.positions,
        created_at=_time(payout.created_at_ms),
        updated_at=_time(payout.updated_at_ms),
        version=payout.version,
    )


def derived_view(row: Mapping[str, Any]) -> PayoutView:
    """A row of the aggregator's table as it is shown."""
    progress = _progress(row["progress"] or "{}")
    return PayoutView(
        *(row["key"], row["seller"], row["currency"], row["sequence"], row["status"], row["amount"], row["payee"]),
        *(row["ref_code"], progress.payment or progress.reference or None, progress.fee),
        *(progress.fee_currency or row["currency"], progress.reason, row["run"]),
        *(row["created_by"], progress.approved_by or None, _positions(row["positions"] or "{}")),
        *(_time(round(row["created_at"].timestamp() * 1000)), _time(round(row["updated_at"].timestamp() * 1000))),
        row["version"],
    )
