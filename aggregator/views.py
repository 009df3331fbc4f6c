"""What the aggregator's API answers: its types are the API document's schemas."""

from __future__ import annotations

import datetime as dt
from typing import Literal

import msgspec

Interval = Literal["day", "week", "month"]
Positions = dict[str, str]
"""How far each shard's feed is in the answer: shard → log position as Postgres writes it (`X/Y`)."""


class RevenueRow(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """Revenue from the day `from` on, in minor units. net = gross - refunded - disputed - fees."""

    from_: dt.date
    payments: int
    gross: int
    refunded: int
    disputed: int
    fees: int
    net: int


class Revenue(msgspec.Struct, frozen=True):
    """A seller's revenue. Without an interval there is one row for the whole (none when nothing was ever sold).

    `cursor` gives the next page; null on the last one. Days, weeks and months are those of `timezone`.
    """

    seller: str
    currency: str
    interval: Interval | None
    rows: list[RevenueRow]
    positions: Positions
    timezone: str = "UTC"
    cursor: str | None = None


class Balance(msgspec.Struct, frozen=True):
    """What a seller is owed in one currency: credited less debited, in minor units; it may be negative.

    `pending` is what payments of the hold time (setting `payouts.hold_s`) brought; `payable` is the rest of the balance.
    """

    currency: str
    balance: int
    credited: int
    debited: int
    pending: int = 0
    payable: int = 0


class SellerBalance(msgspec.Struct, frozen=True):
    """A seller's balances, one a currency."""

    seller: str
    balances: list[Balance]
    positions: Positions


class OrderItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a cart; `amount` is the price of one unit in minor units."""

    seller: str
    amount: int
    quantity: int = 1
    description: str = ""


class OrderFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why the last attempt didn't pay."""

    code: str
    message: str = ""
    decline_code: str = ""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A payment, as the router shows it (without its client secret). Times in UTC (RFC 3339), to the millisecond."""

    key: str
    status: str
    buyer: str
    currency: str
    amount: int
    amount_captured: int
    amount_refunded: int
    items: list[OrderItem]
    platform_fee: int
    payment_intent: str | None
    failure: OrderFailure | msgspec.UnsetType = msgspec.UNSET
    created_at: str
    updated_at: str
    version: int


class Orders(msgspec.Struct, frozen=True):
    """A page of a buyer's payments, newest first. `cursor` gives the next page; null on the last one."""

    buyer: str
    orders: list[Order]
    cursor: str | None
    positions: Positions


class HistoryRow(msgspec.Struct, frozen=True):
    """One version of a payment: the event that made it, the process that committed it, and when (UTC, RFC 3339).

    `lsn` is the position of its commit in the log of `shard`; null when it is known from a rebuild only, and `at` is then the
    row's own time.
    """

    version: int
    status: str
    event: str
    actor: str
    at: str
    shard: str
    lsn: str | None


class History(msgspec.Struct, frozen=True):
    """A payment's whole story, oldest first. A version that isn't there was committed while the feed had lost its log."""

    key: str
    versions: list[HistoryRow]
    positions: Positions


class SellerSum(msgspec.Struct, frozen=True):
    """One seller's sums of all time, in minor units of `currency`."""

    seller: str
    currency: str
    payments: int
    gross: int
    fees: int
    net: int


class Sellers(msgspec.Struct, frozen=True):
    """The sellers with the most gross, in each currency's minor units."""

    sellers: list[SellerSum]
    positions: Positions


class CurrencyTotal(msgspec.Struct, frozen=True):
    """What came in and where it went, in minor units: `money_in` by payments, `owed` to all sellers together."""

    currency: str
    payments: int
    money_in: int
    platform_fees: int
    stripe_fees: int
    owed: int


class AccountSum(msgspec.Struct, frozen=True):
    """An account's debits and credits; `balance` is debit less credit. `seller:*:payable` is all sellers' together."""

    account: str
    currency: str
    debit: int
    credit: int
    balance: int


class Totals(msgspec.Struct, frozen=True):
    """The books as a whole."""

    currencies: list[CurrencyTotal]
    accounts: list[AccountSum]
    positions: Positions


class PositionsView(msgspec.Struct, frozen=True):
    """How far each shard's feed is applied."""

    positions: Positions


class StatementEntry(msgspec.Struct, frozen=True):
    """One change of what the seller is owed, and the balance after it, in minor units. `at` in UTC (RFC 3339)."""

    at: str
    key: str
    entry: str
    kind: str
    amount: int
    balance: int


class Statement(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """What a seller was owed before, what changed it, what it is owed after: closing = opening + entries.

    Pages and consecutive statements chain: one's closing balance is the next one's opening balance. `final` says that no
    entry can come into it any more, as long as the feeds aren't behind. `cursor` gives the next page; null on the last one.
    """

    seller: str
    currency: str
    timezone: str
    from_: dt.date | None
    to: dt.date | None
    opening_balance: int
    entries: list[StatementEntry]
    closing_balance: int
    final: bool
    cursor: str | None
    positions: Positions


class TrialAccount(msgspec.Struct, frozen=True):
    """An account's debits and credits in minor units; `balance` is debit less credit."""

    account: str
    debit: int
    credit: int
    balance: int


class TrialCurrency(msgspec.Struct, frozen=True):
    """One currency's accounts. `debit` and `credit` are the columns' sums: they are equal."""

    currency: str
    accounts: list[TrialAccount]
    debit: int
    credit: int


class TrialBalance(msgspec.Struct, frozen=True):
    """Every account's debits and credits at `positions`."""

    currencies: list[TrialCurrency]
    positions: Positions


class ProfitRow(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """The platform's profit from the day `from` (UTC) on, in minor units: fees - stripe_fees - tipalti_fees - stripe_other.

    `fees` is less what refunds gave back. Stripe's fees include those of disputes; `disputed` is what sellers bore of them.
    """

    from_: dt.date
    fees: int
    stripe_fees: int
    tipalti_fees: int
    stripe_other: int
    disputed: int
    profit: int


class Profit(msgspec.Struct, frozen=True):
    """What the platform earned in one currency. `cursor` gives the next page; null on the last one."""

    currency: str
    interval: Interval | None
    rows: list[ProfitRow]
    positions: Positions
    cursor: str | None = None
