"""Random feeds for tests: a shard's history of payments, entries and links, as its log would bring it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import msgspec
from hypothesis import strategies as st

from oncepay.cart import Fee, Item, Share, shares_of
from oncepay.entry_rows import entries_of, links_of, packed
from oncepay.feed import EntryRow, FeedBatch, LinkRow, PaymentRow
from oncepay.ledger import (
    PLATFORM_FEES,
    STRIPE_CLEARING,
    BalanceLink,
    Entry,
    dispute_entries,
    payable,
    payment_entry,
    refund_entry,
    refund_paid_entries,
    refund_reversed_entry,
    stripe_fee_entry,
)
from oncepay.payment import Failure, Progress, Terms
from oncepay.payment_text import progress_text, terms_text

SELLERS = ["ann", "bob", 'q"uo\\te', "é{}, ", "platform"]
FIRST_US = 1_790_000_000_000_000
DAY_US = 86_400_000_000
FEE = Fee(1000, 30)


def slot_of(key: str) -> int:
    """The slot, as the database has it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big")


@dataclass
class History:
    """One shard's log: commits in order, each with rows at one position."""

    shard: str
    incarnation: str = "i1"
    lsn: int = 1000
    payments: list[PaymentRow] = field(default_factory=list)
    entries: list[EntryRow] = field(default_factory=list)
    links: list[LinkRow] = field(default_factory=list)

    def commit(self) -> int:
        """The position of a new commit."""
        self.lsn += 100
        return self.lsn

    def batch(self, from_lsn: int, to_lsn: int, *, epoch: int = 1) -> FeedBatch:
        """The rows with from_lsn < lsn <= to_lsn."""

        def inside(row: PaymentRow | EntryRow | LinkRow) -> bool:
            return from_lsn < row.lsn <= to_lsn

        return FeedBatch(
            self.shard,
            self.incarnation,
            epoch,
            from_lsn,
            to_lsn,
            tuple(row for row in self.payments if inside(row)),
            tuple(row for row in self.entries if inside(row)),
            tuple(row for row in self.links if inside(row)),
        )

    @property
    def booked(self) -> list[EntryRow]:
        """Each entry in a row of its own, as it was booked."""
        return [
            EntryRow(row.lsn, row.committed_at_ms, row.slot, row.key, *read, row.created_at_us)
            for row in self.entries
            for read in entries_of(row.stored)
        ]

    @property
    def linked(self) -> set[tuple[str, str, str]]:
        """All links: balance transaction, key, entry."""
        told = {(link.balance_transaction, link.key, link.entry_id) for link in self.links}
        return told | {(transaction, row.key, entry_id) for row in self.entries for entry_id, transaction in links_of(row.stored)}

    def whole(self) -> FeedBatch:
        """Everything so far, as one batch."""
        return self.batch(1000, self.lsn)


def payment_row(
    lsn: int, key: str, status: str, version: int, items: list[Item], *, buyer: str = "buyer", currency: str = "usd",
    captured: int = 0, at_us: int = FIRST_US, terms: bool = True, failure: str = "",
) -> PaymentRow:  # fmt: skip
    """A row as a shard's log brings it; without `terms` as when a large value didn't change. Half of the keys as in old rows."""
    agreed = Terms(tuple(items), shares_of(items, {}, FEE), "v")
    course = Progress(client_secret="hush", failure=Failure(failure) if failure else None)
    text, progress = terms_text(agreed), progress_text(course)
    if slot_of(key) % 2:
        text, progress = msgspec.json.encode(agreed).decode(), msgspec.json.encode(course).decode()
    return PaymentRow(
        lsn, at_us // 1000, slot_of(key), key, status, version, buyer, currency, sum(i.amount * i.quantity for i in items),
        captured, 0, f"pi_{key}" if status != "created" else None, text if terms else None, progress if terms else None,
        at_us, at_us + version, at_us + DAY_US,
    )  # fmt: skip


def entry_row(lsn: int, key: str, entry: Entry, at_us: int = FIRST_US) -> EntryRow:
    """An entry as a shard's log brings it."""
    return EntryRow(
        lsn, at_us // 1000, slot_of(key), key, entry.entry_id, entry.kind, entry.currency, entry.source,
        tuple(p.account for p in entry.postings), tuple(p.amount_minor for p in entry.postings),
        tuple(p.seller for p in entry.postings), at_us,
    )  # fmt: skip


def coded_rows(lsn: int, key: str, entries: list[Entry], links: list[BalanceLink], at_us: int = FIRST_US) -> list[EntryRow]:
    """What one commit books, as a shard keeps it."""
    rows, left = packed(entries, links)
    assert not left
    return [
        EntryRow(
            lsn, at_us // 1000, slot_of(key), key, row.entry_id, entries_of(row)[0].kind, row.currency, row.source,
            tuple(row.accounts), tuple(row.amounts), None if row.sellers is None else tuple(row.sellers), at_us,
            row.balance_transaction, row.fee,
        )
        for row in rows
    ]  # fmt: skip


def refund_row(lsn: int, key: str, paid: EntryRow, at_us: int, kind: str = "refund") -> EntryRow:
    """A refund (or dispute) of the whole of a payment's entry."""
    reverse = {STRIPE_CLEARING: "refunds:held"}
    return EntryRow(
        lsn, at_us // 1000, paid.slot, key, f"{kind}:{paid.entry_id}", kind, paid.currency, "re_1",
        tuple(reverse.get(account, account) for account in paid.accounts), tuple(-amount for amount in paid.amounts),
        paid.sellers, at_us,
    )  # fmt: skip


items_of_a_cart = st.lists(
    st.builds(Item, seller=st.sampled_from(SELLERS), amount=st.integers(0, 99_999), quantity=st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


@st.composite
def histories(draw: st.DrawFn, shard: str = "s0", prefix: str = "k", max_payments: int = 8) -> History:
    """A history with payments in several states, refunds, disputes, payouts, several currencies and days."""
    history = History(shard)
    for n in range(draw(st.integers(0, max_payments))):
        _one_payment(draw, history, f"{prefix}{n}")
    return history


def _one_payment(draw: st.DrawFn, history: History, key: str) -> None:
    items = draw(items_of_a_cart)
    currency = draw(st.sampled_from(["usd", "eur", "jpy"]))
    at_us = FIRST_US + draw(st.integers(0, 4 * DAY_US))
    steps = draw(st.lists(st.sampled_from(["attempted", "confirming", "requires_payment_method"]), max_size=3))
    for version, status in enumerate(["created", *steps], 1):
        # as in a log: a large value that didn't change is sometimes not repeated
        terms = version == 1 or draw(st.booleans())
        history.payments.append(
            payment_row(history.commit(), key, status, version, items, currency=currency, at_us=at_us, terms=terms)
        )
    if not draw(st.booleans()):
        return
    coded, fee_at_once = draw(st.booleans()), draw(st.booleans())
    lsn, total = history.commit(), sum(item.amount * item.quantity for item in items)
    history.payments.append(
        payment_row(lsn, key, "succeeded", len(steps) + 2, items, currency=currency, captured=total, at_us=at_us)
    )
    entry, transaction = payment_entry(currency, f"ch_{key}", shares_of(items, {}, FEE)), f"txn_{key}"
    fee = stripe_fee_entry(currency, transaction, draw(st.integers(1, 500)))
    links = [BalanceLink(transaction, each.entry_id) for each in (entry, fee)]
    if coded and fee_at_once:
        history.entries += coded_rows(lsn, key, [entry, fee], links, at_us)
    else:
        history.entries += coded_rows(lsn, key, [entry], [], at_us) if coded else [entry_row(lsn, key, entry, at_us)]
        if draw(st.booleans()):
            lsn = history.commit()
            if coded:
                history.entries += coded_rows(lsn, key, [fee], links[1:], at_us)
                links = links[:1]
            else:
                history.entries.append(entry_row(lsn, key, fee, at_us))
            history.links += [LinkRow(lsn, 0, slot_of(key), key, link.entry_id, transaction, at_us) for link in links]
    _later_life(draw, history, key, entry_row(lsn, key, entry, at_us), at_us, coded=coded)


def _later_life(draw: st.DrawFn, history: History, key: str, paid: EntryRow, at_us: int, *, coded: bool) -> None:
    """Refunds of a part that fail or don't, disputes (also after refunds) that are won or lost, payouts that come back."""

    def row_of(lsn: int, key: str, entry: Entry, at_us: int) -> EntryRow:
        return coded_rows(lsn, key, [entry], [], at_us)[0] if coded else entry_row(lsn, key, entry, at_us)

    left = shares_of_entry(paid)
    for n in range(draw(st.integers(0, 2))):
        at_us += draw(st.integers(0, 2 * DAY_US))
        parts = tuple(Share(s.seller, draw(st.integers(0, s.gross)), 0) for s in left)
        if any(part.gross for part in parts):
            history.entries.append(row_of(history.commit(), key, refund_entry(paid.currency, f"r{n}", parts), at_us))
            end = draw(st.sampled_from(["open", "paid", "failed", "returned"]))
            if end in ("paid", "returned"):
                total = sum(part.gross for part in parts)
                for made in refund_paid_entries(paid.currency, f"txn_{key}_r{n}", total, "usd", total * 2, 3):
                    history.entries.append(row_of(history.commit(), key, made, at_us + 1))
            if end in ("failed", "returned"):
                back = refund_reversed_entry(paid.currency, f"r{n}", parts)
                history.entries.append(row_of(history.commit(), key, back, at_us + draw(st.integers(2, DAY_US))))
    for sign in draw(st.sampled_from([(), (1,), (1, -1)])):
        at_us += draw(st.integers(0, 2 * DAY_US))
        withdrawn = tuple(Share(share.seller, share.gross, 0) for share in left)
        settled = draw(st.integers(1, 9999))
        for made in dispute_entries(paid.currency, f"txn_{key}_d{sign}", withdrawn, sign, "usd", settled, 15):
            history.entries.append(row_of(history.commit(), key, made, at_us))
    for number in range(draw(st.integers(0, 2))):
        _payout(draw, history, f"payout:{key}:{number}", paid.currency, at_us)


def _payout(draw: st.DrawFn, history: History, key: str, currency: str, at_us: int) -> None:
    amount, whose = draw(st.integers(1, 1000)), draw(st.sampled_from(["ann", ""]))
    for name, sign in (("payout", 1), ("payout_returned", -1))[: draw(st.integers(1, 2))]:
        sides = (payable("ann"), "tipalti:clearing"), (sign * amount, -sign * amount), (whose, "")
        lsn = history.commit()
        history.entries.append(EntryRow(lsn, 0, slot_of(key), key, name, name, currency, "po", *sides, at_us))


def shares_of_entry(paid: EntryRow) -> list[Share]:
    """Each seller's gross in a payment's entry."""
    gross: dict[str, int] = {}
    assert paid.sellers is not None
    for amount, seller in zip(paid.amounts, paid.sellers, strict=True):
        if seller:
            gross[seller] = gross.get(seller, 0) - amount
    return [Share(seller, amount, 0) for seller, amount in gross.items()]


__all__ = [
    "FIRST_US",
    "PLATFORM_FEES",
    "SELLERS",
    "History",
    "coded_rows",
    "entry_row",
    "histories",
    "payment_row",
    "refund_row",
    "slot_of",
]
