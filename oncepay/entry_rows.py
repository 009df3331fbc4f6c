"""How ledger entries and their links are kept in rows (a shard's, the feed's, the aggregator's), and read back.

Most of what a settled payment adds is known in one commit: the charge, its split, Stripe's fee and the balance transaction. So
these are one row of `oncepay.entries`: its accounts coded in one letter (`_CODES`), its kind and source read off its id where
that says them, the link to the transaction in a column, Stripe's fee in another. Reading gives the same entries and links
that were booked. SQL has the same in the views `oncepay.ledger` and `oncepay.transaction_links`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oncepay.cart import PLATFORM_SELLER
from oncepay.ledger import (
    PLATFORM_FEES,
    REFUNDS_HELD,
    STRIPE_CLEARING,
    STRIPE_FEES,
    BalanceLink,
    Entry,
    Posting,
    payable,
)

FEE = "stripe_fee"
"""The kind of the entry that a row's `fee` stands for."""
OF_SELLER, OF_PLATFORM = "P", "F"
"""The first letters of codes that go on with a seller: its account, and the platform's fees on its behalf."""
_CODES = {STRIPE_CLEARING: "C", STRIPE_FEES: "E", REFUNDS_HELD: "H"}
_ACCOUNTS = {code: account for account, code in _CODES.items()}


class EntryRow(NamedTuple):
    """A row of `oncepay.entries`, beside its key and time. `sellers` is None where `accounts` are coded."""

    entry_id: str
    kind: str | None
    currency: str
    source: str | None
    accounts: Sequence[str]
    amounts: Sequence[int]
    sellers: Sequence[str] | None
    balance_transaction: str | None
    fee: int | None


class Read(NamedTuple):
    """An entry as it was booked: parallel tuples of accounts, amounts (minor units, debits positive) and sellers."""

    entry_id: str
    kind: str
    currency: str
    source: str
    accounts: tuple[str, ...]
    amounts: tuple[int, ...]
    sellers: tuple[str, ...]


def packed(entries: Sequence[Entry], links: Sequence[BalanceLink]) -> tuple[list[EntryRow], list[BalanceLink]]:
    """The rows of what one commit books, and the links that are kept by themselves: those of entries that were booked before.

    Raises ValueError when an entry comes twice.
    """
    here = {entry.entry_id for entry in entries}
    if len(here) < len(entries):
        raise ValueError(f"an entry is booked twice: {[entry.entry_id for entry in entries]}")
    linked: dict[str, str] = {}
    left: list[BalanceLink] = []
    for link in links:
        if link.entry_id in here and link.entry_id not in linked:
            linked[link.entry_id] = link.balance_transaction
        else:
            left.append(link)
    fees = {entry.source: entry for entry in entries if entry.kind == FEE and _is_plain_fee(entry, linked)}
    plain = {fee.entry_id for fee in fees.values()}
    rows = [_with_fee(entry, linked.get(entry.entry_id), fees) for entry in entries if entry.entry_id not in plain]
    return rows + [_row(fee, fee.source, None) for fee in fees.values()], left


def _with_fee(entry: Entry, transaction: str | None, fees: dict[str, Entry]) -> EntryRow:
    """The row of `entry`, with the fee of its transaction where that is known too; `fees` keeps the others."""
    fee = fees.get(transaction) if transaction is not None else None
    if fee is None or fee.currency != entry.currency:
        return _row(entry, transaction, None)
    del fees[fee.source]
    return _row(entry, transaction, fee.postings[0].amount_minor)


def _is_plain_fee(entry: Entry, linked: dict[str, str]) -> bool:
    """Whether an entry is just what a row's `fee` and `balance_transaction` can say."""
    if entry.kind != FEE or linked.get(entry.entry_id) != entry.source:
        return False
    if len(entry.postings) != 2 or entry.entry_id != f"{FEE}:{entry.source}":
        return False
    one, other = entry.postings
    return (one.account, other.account, one.seller, other.seller) == (STRIPE_FEES, STRIPE_CLEARING, "", "")


def _row(entry: Entry, transaction: str | None, fee: int | None) -> EntryRow:
    kind: str | None = entry.kind
    source: str | None = entry.source
    if entry.entry_id == entry.kind:
        kind = None
    elif entry.entry_id == f"{entry.kind}:{entry.source}" and ":" not in entry.kind:
        kind = source = None
    amounts = [posting.amount_minor for posting in entry.postings]
    codes = [_code(posting) for posting in entry.postings]
    if None in codes:
        accounts: Sequence[str] = [posting.account for posting in entry.postings]
        sellers = [posting.seller for posting in entry.postings]
        return EntryRow(entry.entry_id, kind, entry.currency, source, accounts, amounts, sellers, transaction, fee)
    known = [code for code in codes if code is not None]
    return EntryRow(entry.entry_id, kind, entry.currency, source, known, amounts, None, transaction, fee)


def _code(posting: Posting) -> str | None:
    """The code of an account with its seller; None for what has none."""
    account, seller = posting.account, posting.seller
    if account == PLATFORM_FEES:
        return "F" + seller
    if seller:
        return "P" + seller if seller != PLATFORM_SELLER and account == payable(seller) else None
    if account.startswith("fx:"):
        return "X" + account[3:]
    return _CODES.get(account)


def decoded(code: str) -> tuple[str, str]:
    """Account and seller of a code. Raises KeyError for one that a later version wrote."""
    letter, rest = code[:1], code[1:]
    if letter == OF_SELLER:
        return payable(rest), rest
    if letter == OF_PLATFORM:
        return PLATFORM_FEES, rest
    if letter == "X":
        return f"fx:{rest}", ""
    return _ACCOUNTS[letter], ""


def entries_of(row: EntryRow) -> tuple[Read, ...]:
    """The entries in a row: the one, and Stripe's fee where it has one. Raises KeyError for codes of a later version."""
    kind, source = row.kind, row.source
    if source is None:
        kind, _, source = row.entry_id.partition(":")
    elif kind is None:
        kind = row.entry_id
    accounts, sellers = tuple(row.accounts), row.sellers
    if sellers is None:
        pairs = [decoded(code) for code in accounts]
        accounts, sellers = tuple([account for account, _ in pairs]), [seller for _, seller in pairs]
    entry = Read(row.entry_id, kind, row.currency, source, accounts, tuple(row.amounts), tuple(sellers))
    if row.fee is None:
        return (entry,)
    transaction = row.balance_transaction or ""
    fee = Read(
        f"{FEE}:{transaction}", FEE, row.currency, transaction, (STRIPE_FEES, STRIPE_CLEARING), (row.fee, -row.fee), ("", "")
    )  # fmt: skip
    return entry, fee


def links_of(row: EntryRow) -> tuple[tuple[str, str], ...]:
    """The links in a row: (entry id, balance transaction)."""
    if row.balance_transaction is None:
        return ()
    if row.fee is None:
        return ((row.entry_id, row.balance_transaction),)
    return (row.entry_id, row.balance_transaction), (f"{FEE}:{row.balance_transaction}", row.balance_transaction)
