"""The sums that are derived from ledger entries: a pure, commutative fold.

The same function makes the increments of a batch and the whole from nothing, so that what is kept can be compared with
what it should be. Amounts are minor units of the entry's currency.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from oncepay.cart import PLATFORM_SELLER
from oncepay.feed import EntryRow
from oncepay.ledger import PLATFORM_FEES

SELLER_ACCOUNTS = "seller:*:payable"
"""All sellers' accounts, where they are shown as one."""

_DAY_US = 86_400_000_000
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()


class SellerPosting(NamedTuple):
    """What an entry did to a seller that it names: `amount` is the change of what the seller is owed, `total` that before the
    platform's fee, `fee` the platform's part (`oncepay.by_seller` says the same in SQL)."""

    seller: str
    entry: EntryRow
    amount: int
    total: int
    fee: int


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


def fold(entries: Iterable[EntryRow]) -> Sums:
    """The sums over `entries`; each must be given once."""
    sums = Sums()
    for entry in entries:
        day = day_of(entry.created_at_us)
        sellers = _add_accounts(sums, entry, day)
        if sellers:
            _add_sellers(sums, entry, day, sellers)
    return sums


class _Part:
    """What an entry does to one seller, while its postings are gone through."""

    __slots__ = ("amount", "fee", "named", "total")

    def __init__(self) -> None:
        self.amount = self.total = self.fee = 0
        self.named = False


def _add_accounts(sums: Sums, entry: EntryRow, day: dt.date) -> dict[str, _Part]:
    """Counts each posting on its account; the sellers that the entry names, or whose accounts it names."""
    currency, kind_name, debits = entry.currency, entry.kind, 0
    accounts, days, sellers = sums.accounts, sums.account_days, dict[str, _Part]()
    for account, amount, named in zip(entry.accounts, entry.amounts, entry.sellers, strict=True):
        owner = seller_of(account)
        total = accounts.get((account, currency))
        if total is None:
            total = accounts[account, currency] = AccountTotal()
        name = (SELLER_ACCOUNTS if owner else account, currency, day, kind_name)
        of_day = days.get(name)
        if of_day is None:
            of_day = days[name] = AccountTotal()
        if amount > 0:
            total.debit += amount
            of_day.debit += amount
            debits += amount
        else:
            total.credit -= amount
            of_day.credit -= amount
        seller = named or owner
        if seller:
            part = sellers.get(seller)
            if part is None:
                part = sellers[seller] = _Part()
            _add_part(part, seller, owner, account, amount, named)
    kind = sums.kinds.setdefault((kind_name, currency), KindTotal())
    kind.entries += 1
    kind.amount += debits
    return sellers


def _add_part(part: _Part, seller: str, owner: str, account: str, amount: int, named: str) -> None:
    """What the platform earns by its own lines is on the account of its fees, as its fees are."""
    is_fee = account == PLATFORM_FEES
    if owner == seller or (is_fee and seller == PLATFORM_SELLER):
        part.amount -= amount
    if named:
        part.named = True
        part.total -= amount
        if is_fee and seller != PLATFORM_SELLER:
            part.fee -= amount


def _add_sellers(sums: Sums, entry: EntryRow, day: dt.date, sellers: dict[str, _Part]) -> None:
    """Which column an entry counts in is said by its kind's first word; payouts and the like are no revenue."""
    category = entry.kind.partition("_")[0]
    for seller, part in sellers.items():
        sums.postings.append(SellerPosting(seller, entry, part.amount, part.total, part.fee))
        if not part.named or category not in ("payment", "refund", "dispute"):
            continue
        row = sums.seller_days.get((seller, entry.currency, day))
        if row is None:
            row = sums.seller_days[seller, entry.currency, day] = SellerDay()
        row.fees += part.fee
        if category == "payment":
            row.gross += part.total
            row.payments += 1
        elif category == "refund":
            row.refunded -= part.total
        else:
            row.disputed -= part.total
