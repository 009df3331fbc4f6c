"""Payments as the API shows them."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import Any

from oncepay.payment import Dispute, Payment, Refund
from shard.store.batch import EntryView


def rfc3339(milliseconds: int) -> str:
    """A moment as RFC 3339 in UTC, to the millisecond."""
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


@functools.lru_cache(1024)
def _second(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(tzinfo=None).isoformat()


def payment_view(payment: Payment, entries: Sequence[EntryView] | None = None) -> dict[str, Any]:
    """The JSON object of a payment; with its ledger entries where they were read. Amounts in minor units.

    The client secret is there while a browser may still use it.
    """
    terms, progress = payment.terms, payment.progress
    view: dict[str, Any] = {
        "key": payment.key,
        "status": payment.status.value,
        "buyer": payment.buyer,
        "currency": payment.currency,
        "amount": payment.amount,
        "amount_captured": payment.amount_captured,
        "amount_refunded": payment.amount_refunded,
        "items": terms.items,
        "platform_fee": terms.platform_fee,
        "payment_intent": payment.intent or None,
        "capture_method": terms.capture_method,
        "on_decline": terms.on_decline,
        "created_at": rfc3339(payment.created_at_ms),
        "updated_at": rfc3339(payment.updated_at_ms),
        "expires_at": rfc3339(payment.expires_at_ms),
        "version": payment.version,
    }
    if progress.client_secret and not payment.terminal:
        view["client_secret"] = progress.client_secret
    if progress.next_action_url:
        view["next_action"] = {"type": "redirect_to_url", "url": progress.next_action_url}
    if progress.failure is not None:
        view["failure"] = progress.failure
    if terms.metadata:
        view["metadata"] = terms.metadata
    if terms.after:
        view["after"] = terms.after
    if progress.successor:
        view["successor"] = progress.successor
    if progress.refunds:
        view["refunds"] = [_refund_view(refund) for refund in progress.refunds]
    if progress.disputes:
        view["disputes"] = [dispute_view(payment, dispute) for dispute in progress.disputes]
    if entries is not None:
        view["entries"] = [_entry_view(entry) for entry in entries]
    return view


def _refund_view(refund: Refund) -> dict[str, Any]:
    view: dict[str, Any] = {
        "key": refund.key,
        "status": refund.status,
        "amount": refund.amount,
        "items": [{"seller": share.seller, "amount": share.gross} for share in refund.shares],
        "refund": refund.id or None,
        "created_at": rfc3339(refund.created_at_ms),
    }
    return view | {name: value for name in ("reason", "failure") if (value := getattr(refund, name))}


def dispute_view(payment: Payment, dispute: Dispute) -> dict[str, Any]:
    """The JSON object of a dispute."""
    return {
        "id": dispute.id,
        "payment": payment.key,
        "status": dispute.status,
        "amount": dispute.amount,
        "currency": payment.currency,
        "reason": dispute.reason,
        "evidence_due": rfc3339(dispute.evidence_due_s * 1000) if dispute.evidence_due_s else None,
    }


def _entry_view(entry: EntryView) -> dict[str, Any]:
    lines = zip(entry.accounts, entry.amounts, strict=True)
    return {
        "id": entry.entry_id,
        "kind": entry.kind,
        "currency": entry.currency,
        "source": entry.source,
        "postings": [{"account": account, "amount": amount} for account, amount in lines],
    }
