"""The sums that are derived from ledger entries: a pure, commutative fold.

The same function makes the increments of a batch and the whole from nothing, so that what is kept can be compared with
what it should be. Amounts are minor units of the entry's currency.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from oncepay.cart import PLATFORM_SELLER
from oncepay.entry_rows import FEE, OF_PLATFORM, OF_SELLER, decoded
from oncepay.errors import MalformedBody
from oncepay.feed import EntryRow
from oncepay.ledger import PLATFORM_FEES, STRIPE_CLEARING, STRIPE_FEES

SELLER_ACCOUNTS = "seller:*:payable"
"""All sellers' accounts, where they are shown as one."""

_DAY_US = 86_400_000_000
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()


class SellerPosting(NamedTuple):
    """What an entry did to a seller that it names: `amount` is the change of what the seller is owed, `total` that before the
    platform's fee, `fee` the platform's part (`oncepay.by_seller` says the same in SQL). `debit` and `credit` are those of the
    seller's own account, None where no posting was on it; `named`: by a posting, and not only by its account."""

    seller: str
    entry: EntryRow
    amount: int
    total: int
    fee: int
    debit: int | None
    credit: int | None
    named: bool


@dataclass(slots=True)
class SellerDay:
    """One seller's revenue of one UTC day in one currency. All counted before fees; `fees` is the platform's part."""

    payments: int = 0
    gross: int = 0
    refunded: int = 0
    disputed: int = 0
    fees: int = 0

    @property
    def net(self) -> int:
        """What the seller keeps: the change of what it is owed by sales, refunds and disputes."""
        return self.gross - self.refunded - self.disputed - self.fees


@dataclass(slots=True)
class AccountTotal:
    """What was debited and credited in all; both are 0 or more."""

    debit: int = 0
    credit: int = 0


@dataclass(slots=True)
class KindTotal:
    """How many entries of a kind, and the sum of their debits."""

    entries: int = 0
    amount: int = 0


@dataclass(slots=True)
class Sums:
    """The fold's state; its keys are (seller, currency, day), (account, currency), (account, currency, day, kind) and
    (kind, currency). `postings` are those of each entry in turn."""

    seller_days: dict[tuple[str, str, dt.date], SellerDay] = field(default_factory=dict)
    accounts: dict[tuple[str, str], AccountTotal] = field(default_factory=dict)
    account_days: dict[tuple[str, str, dt.date, str], AccountTotal] = field(default_factory=dict)
    kinds: dict[tuple[str, str], KindTotal] = field(default_factory=dict)
    postings: list[SellerPosting] = field(default_factory=list, compare=False)


@lru_cache(maxsize=4096)
def _day(number: int) -> dt.date:
    return dt.date.fromordinal(_EPOCH_DAY + number)


def day_of(time_us: int) -> dt.date:
    """The UTC day of a time in microseconds since 1970."""
    return _day(time_us // _DAY_US)


def seller_of(account: str) -> str:
    """Whose account it is; empty for one that is no seller's."""
    return account[7:-8] if account.startswith("seller:") and account.endswith(":payable") else ""


def fold(rows: Iterable[EntryRow], *, of_sellers: bool = True) -> Sums:
    """The sums over the entries in `rows`; each must be given once. Without `of_sellers` what can be made of the postings
    later is left out: the sellers' days, and their accounts.

    Raises MalformedBody for an account's code that isn't known.
    """
    sums = Sums()
    groups: dict[tuple[str, str, int], _Group] = {}
    for row in rows:
        name = row.kind, row.currency, row.created_at_us // _DAY_US
        group = groups.get(name)
        if group is None:
            group = groups[name] = _Group()
        group.entries += 1
        if row.sellers is None:
            parts = _add_coded(group, row)
        else:
            parts = _add_lines(group, zip(row.accounts, row.amounts, row.sellers, strict=True))
        if row.fee is not None:
            group.add_fee(row.fee)
        for seller, part in parts.items():
            sums.postings.append(SellerPosting._make((seller, row, *part)))
    for (kind, currency, day), group in groups.items():
        _add_group(sums, group, kind, currency, _day(day))
    if of_sellers:
        for posting in sums.postings:
            _add_posting(sums, posting)
    return sums


class _Group:
    """The entries of a kind, a currency and a day, while they are gone through: how many there are, and what each account gets by
    them, debit and credit; all sellers' accounts are one. So for the fees in their rows."""

    __slots__ = ("accounts", "entries", "fee_entries", "fees")

    def __init__(self) -> None:
        self.entries = 0
        self.accounts: dict[str, list[int]] = {}
        self.fee_entries = 0
        self.fees = [0, 0]

    def account(self, name: str) -> list[int]:
        """What an account gets."""
        total = self.accounts.get(name)
        if total is None:
            total = self.accounts[name] = [0, 0]
        return total

    def add_fee(self, amount: int) -> None:
        """Stripe's fee in a row."""
        self.fee_entries += 1
        if amount > 0:
            self.fees[0] += amount
        else:
            self.fees[1] -= amount


_AMOUNT, _TOTAL, _FEE, _DEBIT, _CREDIT, _NAMED = range(6)
"""What an entry does to one seller, while its postings are gone through: a list as the end of SellerPosting, for it is made for
every posting of a backlog."""

_Parts = dict[str, list[Any]]


def _add_coded(group: _Group, row: EntryRow) -> _Parts:
    """Counts each posting of a row with codes on its account; what it does to the sellers that it names."""
    parts: _Parts = {}
    for code, amount in zip(row.accounts, row.amounts, strict=True):
        letter = code[:1]
        if letter == OF_SELLER:
            total, seller = group.account(SELLER_ACCOUNTS), code[1:]
            part = parts.get(seller)
            if part is None:
                part = parts[seller] = [0, 0, 0, 0, 0, True]
            elif part[_DEBIT] is None:
                part[_DEBIT] = part[_CREDIT] = 0
            part[_DEBIT if amount > 0 else _CREDIT] += abs(amount)
            part[_AMOUNT] -= amount
            part[_TOTAL] -= amount
        elif letter == OF_PLATFORM:
            total, seller = group.account(PLATFORM_FEES), code[1:]
            if seller:
                part = parts.get(seller)
                if part is None:
                    part = parts[seller] = [0, 0, 0, None, None, True]
                part[_TOTAL] -= amount
                part[_AMOUNT if seller == PLATFORM_SELLER else _FEE] -= amount
        else:
            total = group.account(_account(code))
        if amount > 0:
            total[0] += amount
        else:
            total[1] -= amount
    return parts


def _account(code: str) -> str:
    try:
        return decoded(code)[0]
    except KeyError:
        raise MalformedBody(f"an account has the code {code!r}, which this version doesn't know") from None


def _add_lines(group: _Group, lines: Iterable[tuple[str, int, str]]) -> _Parts:
    """So for accounts that aren't coded; the sellers, too, whose accounts an entry names."""
    parts: _Parts = {}
    for account, amount, named in lines:
        owner = seller_of(account)
        total = group.account(SELLER_ACCOUNTS if owner else account)
        if amount > 0:
            total[0] += amount
        else:
            total[1] -= amount
        if owner:
            part = parts.get(owner)
            if part is None:
                part = parts[owner] = [0, 0, 0, 0, 0, False]
            elif part[_DEBIT] is None:
                part[_DEBIT] = part[_CREDIT] = 0
            part[_DEBIT if amount > 0 else _CREDIT] += abs(amount)
            if not named or named == owner:
                part[_AMOUNT] -= amount
        if named:
            part = parts.get(named)
            if part is None:
                part = parts[named] = [0, 0, 0, None, None, False]
            part[_NAMED] = True
            part[_TOTAL] -= amount
            if account == PLATFORM_FEES:  # what the platform earns by its own lines is here, too
                part[_AMOUNT if named == PLATFORM_SELLER else _FEE] -= amount
    return parts


def _add_group(sums: Sums, group: _Group, kind: str, currency: str, day: dt.date) -> None:
    _add_kind(sums, kind, group.entries, currency, day, group.accounts)
    if group.fee_entries:
        debit, credit = group.fees
        _add_kind(sums, FEE, group.fee_entries, currency, day, {STRIPE_FEES: [debit, credit], STRIPE_CLEARING: [credit, debit]})


def _add_kind(sums: Sums, kind: str, entries: int, currency: str, day: dt.date, accounts: dict[str, list[int]]) -> None:
    of_kind = sums.kinds.setdefault((kind, currency), KindTotal())
    of_kind.entries += entries
    for account, (debit, credit) in accounts.items():
        if account != SELLER_ACCOUNTS:
            _add(sums.accounts, (account, currency), debit, credit)
        _add(sums.account_days, (account, currency, day, kind), debit, credit)
        of_kind.amount += debit


_Name = TypeVar("_Name")


def _add(totals: dict[_Name, AccountTotal], name: _Name, debit: int, credit: int) -> None:
    total = totals.get(name)
    if total is None:
        total = totals[name] = AccountTotal()
    total.debit += debit
    total.credit += credit


def _add_posting(sums: Sums, posting: SellerPosting) -> None:
    """Which column it counts in is said by its kind's first word; payouts and the like are no revenue."""
    entry = posting.entry
    if posting.debit is not None and posting.credit is not None:
        _add(sums.accounts, (f"seller:{posting.seller}:payable", entry.currency), posting.debit, posting.credit)
    category = entry.kind.partition("_")[0]
    if not posting.named or category not in ("payment", "refund", "dispute"):
        return
    name = posting.seller, entry.currency, day_of(entry.created_at_us)
    row = sums.seller_days.get(name)
    if row is None:
        row = sums.seller_days[name] = SellerDay()
    row.fees += posting.fee
    if category == "payment":
        row.gross += posting.total
        row.payments += 1
    elif category == "refund":
        row.refunded -= posting.total
    else:
        row.disputed -= posting.total
