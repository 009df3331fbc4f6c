"""A payment's terms and progress as short JSON arrays, as rows and feeds carry them.

Members are known by their place, what is usual comes last, and what has its default at the end is left out: a third of the
objects' size. A member is only ever added at the end. Texts that begin with `{` are objects, with their members' names: rows of
earlier versions, and terms whose shares don't follow from their items.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from oncepay.cart import Item, Share, gross_of
from oncepay.payment import Capture, CaptureMethod, Command, Dispute, Failure, GiveUpReason, OnDecline, Progress, Refund, Terms


class _Line(msgspec.Struct, array_like=True, frozen=True):
    seller: str
    amount: int
    quantity: int = 1
    description: str = ""


class _Terms(msgspec.Struct, array_like=True, frozen=True):
    """`fees` are those of the sellers in the order in which they first appear in `items`."""

    items: tuple[_Line, ...]
    fees: tuple[int, ...]
    api_version: str
    payment_method: str = ""
    on_decline: OnDecline = "retry"
    capture_method: CaptureMethod = "automatic"
    metadata: dict[str, str] = {}
    customer: str = ""
    off_session: bool = False
    after: str = ""


class _Progress(msgspec.Struct, array_like=True, frozen=True):
    attempt: int = 0
    payment_method: str = ""
    charge: str = ""
    stripe_fee: int = -1
    client_secret: str = ""
    finished_charges: tuple[str, ...] = ()
    failure: Failure | None = None
    give_up: GiveUpReason | Literal[""] = ""
    successor: str = ""
    next_action_url: str = ""
    refunds: tuple[Refund, ...] = ()
    disputes: tuple[Dispute, ...] = ()
    commands: tuple[Command, ...] = ()
    capture: Capture | None = None
    captures: int = 0


class _ItemsAndFees(msgspec.Struct, array_like=True, frozen=True):
    items: tuple[_Line, ...]
    fees: tuple[int, ...]


class _FailureOf(msgspec.Struct, array_like=True, frozen=True):
    """The failure, with what stands before it."""

    attempt: int = 0
    payment_method: msgspec.Raw = msgspec.Raw(b'""')
    charge: msgspec.Raw = msgspec.Raw(b'""')
    stripe_fee: int = -1
    client_secret: msgspec.Raw = msgspec.Raw(b'""')
    finished_charges: msgspec.Raw = msgspec.Raw(b"[]")
    failure: Failure | None = None


class _TermsObject(msgspec.Struct, frozen=True):
    items: tuple[Item, ...]
    shares: tuple[Share, ...]


class _ProgressObject(msgspec.Struct, frozen=True):
    failure: Failure | None = None


_items_and_fees = msgspec.json.Decoder(_ItemsAndFees).decode
_items_and_shares = msgspec.json.Decoder(_TermsObject).decode
_failure = msgspec.json.Decoder(_FailureOf).decode
_failure_object = msgspec.json.Decoder(_ProgressObject).decode
_encode = msgspec.json.Encoder().encode
_terms = msgspec.json.Decoder(_Terms).decode
_terms_object = msgspec.json.Decoder(Terms).decode
_progress = msgspec.json.Decoder(_Progress).decode
_progress_object = msgspec.json.Decoder(Progress).decode

_TERMS_DEFAULTS: tuple[Any, ...] = (None, None, None, "", "retry", "automatic", {}, "", False, "")
_TERMS_MORE = ["automatic", {}, "", False, ""]
_PROGRESS_DEFAULTS: tuple[Any, ...] = (0, "", "", -1, "", (), None, "", "", "", (), (), (), None, 0)


def _text(values: list[Any], defaults: tuple[Any, ...]) -> str:
    count = len(values)
    while count and values[count - 1] == defaults[count - 1]:
        count -= 1
    return _encode(values[:count]).decode()


def _fees(terms: Terms) -> list[int] | None:
    """The fees of the sellers in their order; None when the shares don't follow from the items."""
    gross = gross_of(terms.items)
    if len(gross) != len(terms.shares):
        return None
    fees = []
    for seller, share in zip(gross, terms.shares, strict=True):
        if share.seller != seller or share.gross != gross[seller]:
            return None
        fees.append(share.fee)
    return fees


def _line(item: Item) -> tuple[str | int, ...]:
    if item.description:
        return item.seller, item.amount, item.quantity, item.description
    return (item.seller, item.amount) if item.quantity == 1 else (item.seller, item.amount, item.quantity)


def terms_text(terms: Terms) -> str:
    """The text of `terms`."""
    fees = _fees(terms)
    if fees is None:
        return _encode(terms).decode()
    values = [[_line(item) for item in terms.items], fees, terms.api_version, terms.payment_method, terms.on_decline]
    more = [terms.capture_method, terms.metadata, terms.customer, terms.off_session, terms.after]
    return _text(values + more, _TERMS_DEFAULTS) if more != _TERMS_MORE else _text(values, _TERMS_DEFAULTS)


def line_start(seller: str) -> str:
    """How each line of a seller begins in a text of terms. What doesn't have it has no line of the seller."""
    return "[" + _encode(seller).decode() + ","


def parse_terms(text: str) -> Terms:
    """The terms in a text. Raises msgspec.MsgspecError or ValueError when there are none."""
    if text.startswith("{"):
        return _terms_object(text)
    row = _terms(text)
    items = tuple(Item(line.seller, line.amount, line.quantity, line.description) for line in row.items)
    shares = tuple(Share(seller, total, fee) for (seller, total), fee in zip(gross_of(items).items(), row.fees, strict=True))
    return Terms(
        items, shares, row.api_version, row.capture_method, row.on_decline, row.metadata, row.after, row.payment_method,
        row.customer, row.off_session,
    )  # fmt: skip


def progress_text(progress: Progress) -> str:
    """The text of `progress`."""
    values = [
        progress.attempt, progress.payment_method, progress.charge, progress.stripe_fee, progress.client_secret,
        progress.finished_charges, progress.failure, progress.give_up, progress.successor, progress.next_action_url,
        progress.refunds, progress.disputes, progress.commands, progress.capture, progress.captures,
    ]  # fmt: skip
    return _text(values, _PROGRESS_DEFAULTS)


def parse_progress(text: str) -> Progress:
    """The progress in a text. Raises msgspec.MsgspecError when there is none."""
    if text.startswith("{"):
        return _progress_object(text)
    row = _progress(text)
    return Progress(
        client_secret=row.client_secret,
        attempt=row.attempt,
        payment_method=row.payment_method,
        charge=row.charge,
        finished_charges=row.finished_charges,
        failure=row.failure,
        give_up=row.give_up,
        stripe_fee=row.stripe_fee,
        successor=row.successor,
        next_action_url=row.next_action_url,
        capture=row.capture,
        captures=row.captures,
        refunds=row.refunds,
        disputes=row.disputes,
        commands=row.commands,
    )


def items_and_fee_in(text: str) -> tuple[tuple[Item, ...], int]:
    """The items in a text of terms, and the platform's fee; whatever else a later version says there. Raises as `parse_terms`."""
    if text.startswith("{"):
        terms = _items_and_shares(text)
        return terms.items, sum(share.fee for share in terms.shares)
    row = _items_and_fees(text)
    return tuple(Item(line.seller, line.amount, line.quantity, line.description) for line in row.items), sum(row.fees)


def failure_in(text: str) -> Failure | None:
    """The failure in a text of progress, whatever else a later version may say there. Raises as `parse_progress`."""
    return _failure_object(text).failure if text.startswith("{") else _failure(text).failure
