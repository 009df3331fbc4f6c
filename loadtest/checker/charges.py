"""Rows against Stripe: promises 1 (once), 3 (no money without a row), 4 (terminal) and 7 (reconciled)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from loadtest.checker.books import CLEARING, Books
from loadtest.checker.model import Entry, Findings, Intent, Payment, Stripe, Target, Transaction


def check_charges(books: Books, stripe: Stripe, target: Target, found: Findings) -> None:
    """Each confirmed intent has its row, each row its intent, no key two charges, and both sides say the same."""
    rows = _by_intent(books, found)
    attempted: defaultdict[str, list[str]] = defaultdict(list)
    for intent in stripe.intents:
        row = rows.get(intent.id)
        if intent.attempted:
            attempted[row.key if row else intent.key or intent.id].append(intent.id)
        if row is None:
            _check_unnamed(intent, found)
        elif intent.key and intent.key != row.key:
            found.differ(1, row.key, f"its row names {intent.id}, which was made for {intent.key}", _STOP)
    for key, ids in attempted.items():
        if len(ids) > 1:
            found.differ(1, key, f"{len(ids)} PaymentIntents of it were confirmed: {', '.join(sorted(ids))}", _REFUND)
    intents = {intent.id: intent for intent in stripe.intents}
    for row in books.payments.values():
        if not row.open:
            _check_terminal(row, intents.get(row.intent), complete=not target.since, found=found)
    found.checked["intents"] = len(stripe.intents)
    found.checked["confirmed_intents"] = sum(map(len, attempted.values()))


_STOP = "stop taking payments for this key and look at both at Stripe"
_REFUND = "refund all but the one that the row names, at Stripe, and find out who confirmed it"
_ADOPT = "look it up at Stripe: refund it, or find the row's shard and what became of the row"
_LOOK = "compare the row with the PaymentIntent at Stripe; correct by a refund or a new entry, the row can't change"


def _by_intent(books: Books, found: Findings) -> dict[str, Payment]:
    rows: dict[str, Payment] = {}
    for payment in books.payments.values():
        if payment.intent:
            other = rows.setdefault(payment.intent, payment)
            if other is not payment:
                found.differ(1, payment.key, f"its row and that of {other.key} name {payment.intent}", _STOP)
    return rows


def _check_unnamed(intent: Intent, found: Findings) -> None:
    """An intent that no row names is money without a row when it was confirmed, else a harmless orphan."""
    if intent.attempted:
        found.differ(3, intent.key or intent.id, f"{intent.id} is {intent.status} at Stripe and no row names it", _ADOPT)
    else:
        found.checked["orphans"] += 1


def _check_terminal(row: Payment, intent: Intent | None, *, complete: bool, found: Findings) -> None:
    if intent is None:
        if row.intent and complete:
            found.differ(4, row.key, f"its row names {row.intent}, which Stripe doesn't have", _LOOK)
        elif not row.intent and row.status == "succeeded":
            found.differ(4, row.key, "it has succeeded without a PaymentIntent", _LOOK)
        return
    expected = "succeeded" if row.status == "succeeded" else "canceled"
    if intent.status != expected:
        found.differ(4, row.key, f"it is {row.status} here, and {intent.id} is {intent.status} at Stripe", _LOOK)
    elif row.status == "succeeded" and intent.received != row.captured:
        found.differ(4, row.key, f"its row took {row.captured}, {intent.id} took {intent.received}", _LOOK)
    elif row.status == "succeeded" and row.charge != intent.charge:
        found.differ(4, row.key, f"its row has the charge {row.charge or 'none'}, {intent.id} has {intent.charge}", _LOOK)


def check_reconciled(books: Books, stripe: Stripe, target: Target, found: Findings) -> None:
    """Each balance transaction matches one set of postings on the clearing account with its net, and the other way."""
    linked: defaultdict[str, list[Entry]] = defaultdict(list)
    links_of: Counter[tuple[str, str]] = Counter()
    for link in books.links:
        entry = books.entries.get((link.key, link.entry_id))
        if entry is None:
            found.differ(7, link.key, f"{link.balance_transaction} is linked to {link.entry_id}, which isn't there", _BOOK)
            continue
        linked[link.balance_transaction].append(entry)
        links_of[entry.name] += 1
    transactions = {transaction.id: transaction for transaction in stripe.transactions}
    for transaction in stripe.transactions:
        entries = linked.get(transaction.id)
        if entries:
            _check_net(transaction, entries, found)
        else:
            _note_unbooked(transaction, stripe, target, found)
    if not target.since:
        for name in linked.keys() - transactions.keys():
            found.differ(7, linked[name][0].key, f"it is linked to {name}, which Stripe doesn't have", _BOOK)
    _check_linked(books, links_of, stripe, target, found)
    found.checked["balance_transactions"] = len(stripe.transactions)


_BOOK = "compare the payment's entries with the balance transaction at Stripe; book what is missing as a new entry"


def _check_net(transaction: Transaction, entries: Sequence[Entry], found: Findings) -> None:
    posted: Counter[str] = Counter()
    for entry in entries:
        posted[entry.currency] += entry.on(CLEARING)
    posted[transaction.currency] += 0
    wrong = {currency: amount for currency, amount in posted.items() if amount != _net(transaction, currency)}
    key = entries[0].key
    if len({entry.key for entry in entries}) > 1:
        found.differ(7, key, f"{transaction.id} is linked to entries of several payments", _BOOK)
    if wrong:
        shown = ", ".join(f"{amount} {currency}" for currency, amount in sorted(wrong.items()))
        found.differ(
            7, key, f"{transaction.id} has a net of {transaction.net} {transaction.currency}, its postings {shown}", _BOOK
        )
    for entry in entries:
        if entry.kind == "payment" and transaction.source and entry.source != transaction.source:
            found.differ(7, key, f"{transaction.id} is of {transaction.source}, its entry of {entry.source}", _BOOK)


def _net(transaction: Transaction, currency: str) -> int:
    return transaction.net if currency == transaction.currency else 0


def _note_unbooked(transaction: Transaction, stripe: Stripe, target: Target, found: Findings) -> None:
    what = f"{transaction.id} ({transaction.kind}, net {transaction.net} {transaction.currency}) has no postings"
    if stripe.now - transaction.created < target.grace_s:
        found.waiting.add(what)
    else:
        found.differ(7, transaction.source or transaction.id, what, _BOOK)


def _check_linked(books: Books, links_of: Counter[tuple[str, str]], stripe: Stripe, target: Target, found: Findings) -> None:
    for entry in books.entries.values():
        if CLEARING not in entry.accounts:
            continue
        count = links_of[entry.name]
        if count > 1:
            found.differ(7, entry.key, f"entry {entry.entry_id} is linked to {count} balance transactions", _BOOK)
        elif count == 0:
            what = f"entry {entry.entry_id} posts on {CLEARING} and has no balance transaction"
            if stripe.now - entry.created_at_us / 1_000_000 < target.grace_s:
                found.waiting.add(what)
            else:
                found.differ(7, entry.key, what, "wait for Stripe to post it; after a day ask Stripe about the charge")
