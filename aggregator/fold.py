"""The sums that are derived from ledger entries: a pure, commutative fold.

The same function makes the increments of a batch and the whole from nothing, so that what is kept can be compared with
what it should be. Amounts are minor units of the entry's currency.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from oncepay.cart import PLATFORM_SELLER
from oncepay.ledger import PLATFORM_FEES

SELLER_ACCOUNTS = "seller:*:payable"
"""All sellers' accounts, where they are shown as one."""

_DAY_US = 86_400_000_000
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()


class EntryLike(Protocol):
    """What the fold needs of an entry (oncepay.feed.EntryRow has it)."""

    @property
    def kind(self) -> str: ...
    @property
    def currency(self) -> str: ...
    @property
    def accounts(self) -> Sequence[str]: ...
    @property
    def amounts(self) -> Sequence[int]: ...
    @property
    def sellers(self) -> Sequence[str]: ...
    @property
    def created_at_us(self) -> int: ...


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
    (kind, currency)."""

    seller_days: dict[tuple[str, str, dt.date], SellerDay] = field(default_factory=dict)
    accounts: dict[tuple[str, str], AccountTotal] = field(default_factory=dict)
    account_days: dict[tuple[str, str, dt.date, str], AccountTotal] = field(default_factory=dict)
    kinds: dict[tuple[str, str], KindTotal] = field(default_factory=dict)


def day_of(time_us: int) -> dt.date:
    """The UTC day of a time in microseconds since 1970."""
    return dt.date.fromordinal(_EPOCH_DAY + time_us // _DAY_US)


def fold(entries: Iterable[EntryLike]) -> Sums:
    """The sums over `entries`; each must be given once."""
    sums = Sums()
    for entry in entries:
        _add_accounts(sums, entry)
        if any(entry.sellers):
            _add_sellers(sums, entry)
    return sums


def _add_accounts(sums: Sums, entry: EntryLike) -> None:
    currency, day, debits = entry.currency, day_of(entry.created_at_us), 0
    for account, amount in zip(entry.accounts, entry.amounts, strict=True):
        total = sums.accounts.get((account, currency))
        if total is None:
            total = sums.accounts[account, currency] = AccountTotal()
        name = SELLER_ACCOUNTS if account.startswith("seller:") and account.endswith(":payable") else account
        of_day = sums.account_days.get((name, currency, day, entry.kind))
        if of_day is None:
            of_day = sums.account_days[name, currency, day, entry.kind] = AccountTotal()
        if amount > 0:
            total.debit += amount
            of_day.debit += amount
            debits += amount
        else:
            total.credit -= amount
            of_day.credit -= amount
    kind = sums.kinds.setdefault((entry.kind, currency), KindTotal())
    kind.entries += 1
    kind.amount += debits


def _add_sellers(sums: Sums, entry: EntryLike) -> None:
    """Which column an entry counts in is said by its kind's first word; payouts and the like are no revenue."""
    category = entry.kind.partition("_")[0]
    if category not in ("payment", "refund", "dispute"):
        return
    day = day_of(entry.created_at_us)
    paid: set[str] = set()
    for account, amount, seller in zip(entry.accounts, entry.amounts, entry.sellers, strict=True):
        if not seller:
            continue
        row = sums.seller_days.get((seller, entry.currency, day))
        if row is None:
            row = sums.seller_days[seller, entry.currency, day] = SellerDay()
        if category == "payment":
            row.gross -= amount
            if seller not in paid:
                paid.add(seller)
                row.payments += 1
        elif category == "refund":
            row.refunded += amount
        else:
            row.disputed += amount
        if account == PLATFORM_FEES and seller != PLATFORM_SELLER:
            row.fees -= amount
