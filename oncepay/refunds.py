"""Refunds and disputes of a payment that succeeded: entries of their own beside it. No I/O.

A refund counts against what is left from the moment it is asked for until it is known to have failed or been canceled.
Every balance transaction is booked once, by its id, in whatever order the facts come.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from oncepay.cart import Share
from oncepay.errors import InvalidAmount, InvalidField, InvalidKey, WrongState
from oncepay.events import Contradiction, DisputeSeen, Moved, RefundRefused, RefundRequested, RefundSeen
from oncepay.keys import check_characters, origin
from oncepay.ledger import (
    STRIPE_CLEARING,
    BalanceLink,
    Entry,
    dispute_entries,
    refund_entry,
    refund_paid_entries,
    refund_reversed_entry,
)
from oncepay.money import allocate
from oncepay.payment import (
    DISPUTE_OVER,
    REFUND_OVER,
    REFUND_RANK,
    BalanceTransaction,
    Dispute,
    Payment,
    Refund,
    RefundView,
    Status,
)

ADOPTED_PREFIX = "stripe:"
"""Starts the key of a refund that was made at Stripe."""


def adopted_key(refund: str) -> str:
    """The key of a refund that was made at Stripe, whose id is `refund`."""
    return ADOPTED_PREFIX + refund


def spread(left: tuple[Share, ...], amount: int, *, fee_back: bool) -> tuple[Share, ...]:
    """The shares of a refund of `amount` minor units over what is `left` of each seller's, by largest remainder.

    Raises InvalidAmount when there is not so much left.
    """
    whole = sum(share.gross for share in left)
    if not 0 < amount <= whole:
        raise InvalidAmount(f"{whole} is left to refund, not {amount}", field="amount")
    parts = allocate(amount, [share.gross for share in left])
    return _parts({share.seller: part for share, part in zip(left, parts, strict=True)}, left, fee_back=fee_back)


def by_items(left: tuple[Share, ...], amounts: Mapping[str, int], *, fee_back: bool) -> tuple[Share, ...]:
    """The shares of a refund that names the amount of each seller. Raises InvalidField or InvalidAmount."""
    known = {share.seller: share.gross for share in left}
    for number, (seller, amount) in enumerate(amounts.items()):
        if seller not in known:
            raise InvalidField(f"the payment has no items of {seller}", field=f"items[{number}].seller")
        if not 0 < amount <= known[seller]:
            raise InvalidAmount(f"{known[seller]} of {seller} is left, not {amount}", field=f"items[{number}].amount")
    return _parts(amounts, left, fee_back=fee_back)


def _parts(amounts: Mapping[str, int], left: tuple[Share, ...], *, fee_back: bool) -> tuple[Share, ...]:
    """Fees go back in proportion to what is left of each seller's, rounded half up: the last part takes exactly the rest."""
    found = []
    for share in left:
        part = amounts.get(share.seller, 0)
        if part:
            fee = (2 * share.fee * part + share.gross) // (2 * share.gross) if fee_back else 0
            found.append(Share(share.seller, part, min(fee, share.fee, part)))
    return tuple(found)


def requested(payment: Payment, event: RefundRequested) -> Moved:
    """A refund is asked for here."""
    if any(refund.key == event.key for refund in payment.progress.refunds):
        return Moved(payment)
    refund = Refund(event.key, sum(s.gross for s in event.shares), event.shares, event.now_ms, reason=event.reason)
    return _added(payment, refund)


def _added(payment: Payment, refund: Refund) -> Moved:
    if payment.status is not Status.SUCCEEDED:
        raise WrongState(f"a payment that is {payment.status} can't be refunded")
    left = {share.seller: share for share in payment.left_shares}
    for share in refund.shares:
        of = left.get(share.seller)
        if of is None or share.gross > of.gross or share.fee > max(of.fee, 0):
            raise InvalidAmount(f"less than {share.gross} of {share.seller} is left to refund", field="amount")
    progress = replace(payment.progress, refunds=(*payment.progress.refunds, refund))
    after = _counted(replace(payment, progress=progress))
    return Moved(after, (refund_entry(payment.currency, refund.key, refund.shares),))


def _counted(payment: Payment) -> Payment:
    refunded = sum(refund.amount for refund in payment.progress.refunds if refund.status not in REFUND_OVER)
    return replace(payment, amount_refunded=refunded)


def _with(payment: Payment, refund: Refund) -> Payment:
    refunds = tuple(refund if each.key == refund.key else each for each in payment.progress.refunds)
    return _counted(replace(payment, progress=replace(payment.progress, refunds=refunds)))


def refused(payment: Payment, event: RefundRefused) -> Moved:
    """Stripe made no such refund: it has failed, and what it took is given back."""
    refund = next((each for each in payment.progress.refunds if each.key == event.key), None)
    if refund is None or refund.id or refund.status in REFUND_OVER:
        return Moved(payment)
    entry = refund_reversed_entry(payment.currency, refund.key, refund.shares)
    return Moved(_with(payment, replace(refund, status="failed", failure=event.failure)), (entry,))


def seen(payment: Payment, event: RefundSeen) -> Moved:
    """What Stripe shows of a refund: its state only moves up, each of its transactions is booked once."""
    view = event.view
    if payment.status is not Status.SUCCEEDED:
        raise Contradiction(f"{view.id} is a refund of a payment that is {payment.status}")
    refund = next((each for each in payment.progress.refunds if is_same(each, view)), None)
    entries: tuple[Entry, ...] = ()
    moved = payment
    if refund is None:
        shares = spread(payment.left_shares, view.amount, fee_back=event.fee_back)
        refund = Refund(_key_for(payment, view), view.amount, shares, view.created_at_ms, id=view.id, reason=view.reason)
        moved, entries, _ = _added(payment, refund)
    return _seen(payment, moved, refund, view, entries)


def _key_for(payment: Payment, view: RefundView) -> str:
    """What a refund that no row knows is called: by its own key where a restore has lost it, else by Stripe's id."""
    known = any(refund.key == view.key for refund in payment.progress.refunds)
    return view.key if not known and _could_be_sent(view.key) else adopted_key(view.id)


def _could_be_sent(key: str) -> bool:
    """Whether a client could have named its refund so. Metadata may be written by others."""
    try:
        origin(check_characters(key), {})  # raises for reserved names
    except InvalidKey:
        return False
    return True


def is_same(refund: Refund, view: RefundView) -> bool:
    """Whether it is that one. One that was given up and then made all the same (a late sender) is adopted as another."""
    return refund.id == view.id or (refund.key == view.key and not refund.id and refund.status not in REFUND_OVER)


def _seen(before: Payment, payment: Payment, refund: Refund, view: RefundView, entries: tuple[Entry, ...]) -> Moved:
    after = replace(refund, id=view.id)
    if REFUND_RANK[view.status] > REFUND_RANK[refund.status]:
        after = replace(after, status=view.status, failure=view.failure)
    links: tuple[BalanceLink, ...] = ()
    for transaction, paid in ((view.transaction, refund.amount), (view.failure_transaction, -refund.amount)):
        if transaction is not None and transaction.id not in after.booked:
            booked = refund_paid_entries(
                payment.currency, transaction.id, paid, transaction.currency, abs(transaction.amount), transaction.fee
            )
            entries, links = entries + booked, links + _links(transaction, booked)
            after = replace(after, booked=(*after.booked, transaction.id))
    if after.status in REFUND_OVER and refund.status not in REFUND_OVER:
        entries = (*entries, refund_reversed_entry(payment.currency, refund.key, refund.shares))
    if after == refund and payment is before:
        return Moved(before)
    return Moved(_with(payment, after), entries, links)


def _links(transaction: BalanceTransaction, entries: tuple[Entry, ...]) -> tuple[BalanceLink, ...]:
    return tuple(
        BalanceLink(transaction.id, entry.entry_id)
        for entry in entries
        if any(posting.account == STRIPE_CLEARING for posting in entry.postings)
    )


def dispute_seen(payment: Payment, event: DisputeSeen) -> Moved:
    """What Stripe shows of a dispute. An inquiry moves no money; what is won or lost books nothing by itself."""
    view = event.view
    if payment.status is not Status.SUCCEEDED:
        raise Contradiction(f"{view.id} disputes a payment that is {payment.status}")
    known = next((each for each in payment.progress.disputes if each.id == view.id), None)
    status = known.status if known is not None and known.status in DISPUTE_OVER else view.status
    booked = known.booked if known is not None else ()
    entries: tuple[Entry, ...] = ()
    links: tuple[BalanceLink, ...] = ()
    for transaction in view.transactions:
        if transaction.id in booked:
            continue
        made = _dispute_booked(payment, transaction, view.amount)
        entries, links, booked = entries + made, links + _links(transaction, made), (*booked, transaction.id)
    dispute = Dispute(view.id, status, view.amount, view.reason, view.evidence_due_s, booked)
    if dispute == known:
        return Moved(payment)
    others = tuple(each for each in payment.progress.disputes if each.id != view.id)
    return Moved(replace(payment, progress=replace(payment.progress, disputes=(*others, dispute))), entries, links)


def _dispute_booked(payment: Payment, transaction: BalanceTransaction, disputed: int) -> tuple[Entry, ...]:
    """Funds withdrawn (negative) or reinstated. In another settlement currency the charge's own part is what was disputed."""
    same = transaction.currency == payment.currency
    amount = abs(transaction.amount) if same else disputed
    weights = [share.gross for share in payment.captured_shares]
    shares = tuple(
        Share(share.seller, part, 0) for share, part in zip(payment.captured_shares, allocate(amount, weights), strict=True)
    )
    sign = 1 if transaction.amount < 0 else -1
    settled = abs(transaction.amount)
    return dispute_entries(payment.currency, transaction.id, shares, sign, transaction.currency, settled, transaction.fee)


def held_by_inquiries(payment: Payment) -> dict[str, int]:
    """What each seller isn't paid out for now: disputes that are open and have moved no money, by the sellers' shares.

    The amount that the money's withdrawal would take, in minor units of the payment's currency.
    """
    held: dict[str, int] = {}
    shares = [share for share in payment.captured_shares if share.gross]
    for dispute in payment.progress.disputes:
        if dispute.status in DISPUTE_OVER or dispute.booked or not shares:
            continue
        amount = min(dispute.amount, sum(share.gross for share in shares))
        for share, part in zip(shares, allocate(amount, [share.gross for share in shares]), strict=True):
            held[share.seller] = held.get(share.seller, 0) + part
    return held
