"""What the checker is told, what it reads, and what it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

TERMINAL = frozenset({"succeeded", "failed", "canceled"})

COUNTED = ("payments", "succeeded", "failed", "canceled", "intents", "orphans", "entries", "balance_transactions")
"""These are counted in every report, also when there are none."""

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, how many are done, of how many or None while that isn't known)."""


def silent(_what: str, _done: int, _total: int | None) -> None:
    """Shows nothing."""


class CheckerError(Exception):
    """The check can't be made."""


class Unreachable(CheckerError):
    """A part of the system can't be reached."""


class Misread(CheckerError):
    """A part of the system answers something that the checker can't read."""


@dataclass(frozen=True)
class ShardTarget:
    """A shard: its name, the slots [first, last] that the map gives it, and a DSN (reading is enough) of its leader."""

    name: str
    dsn: str
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Target:
    """Where everything is. `since` (seconds since 1970) leaves out what Stripe made before; `wait_s` bounds the wait.

    `grace_s`: how old a charge may get before it has to have its balance transaction, and a balance transaction its
    postings. `moving`: slots that a move has copied and not yet cleaned up, of which two shards may have the rows.
    `aggregator_url` may be empty: then its numbers are read from its database only.
    """

    shards: tuple[ShardTarget, ...]
    aggregator_dsn: str
    stripe_url: str
    stripe_key: str
    aggregator_url: str = ""
    api_key: str = ""
    since: int = 0
    wait_s: float = 60.0
    grace_s: float = 60.0
    moving: tuple[tuple[int, int], ...] = ()
    tipalti_url: str = ""
    """May be empty: then nobody pays out through Tipalti, and its half of promise 7 is not checked."""
    tipalti_client_id: str = ""
    tipalti_client_secret: str = ""
    tipalti_refresh_token: str = ""


class Share(NamedTuple):
    """A seller's part of a payment, minor units."""

    seller: str
    gross: int
    fee: int


class Payment(NamedTuple):
    """A payment's row in a shard. Amounts in minor units, times in microseconds since 1970."""

    shard: str
    slot: int
    key: str
    status: str
    version: int
    buyer: str
    currency: str
    amount: int
    captured: int
    refunded: int
    intent: str
    charge: str
    fee_booked: bool
    driven: bool
    """Whether the platform has the next move, and not the buyer or the merchant."""
    shares: tuple[Share, ...]
    items: tuple[Share, ...]
    """What the items come to for each seller; the fee is 0."""
    asked: tuple[Share, ...] = ()
    """The shares that a capture of a part named."""

    @property
    def open(self) -> bool:
        return self.status not in TERMINAL


class Entry(NamedTuple):
    """A ledger entry, in a shard or in the aggregator (then `shard` is the one whose feed brought it)."""

    shard: str
    slot: int
    key: str
    entry_id: str
    kind: str
    currency: str
    source: str
    accounts: tuple[str, ...]
    amounts: tuple[int, ...]
    sellers: tuple[str, ...]
    created_at_us: int

    @property
    def name(self) -> tuple[str, str]:
        return self.key, self.entry_id

    @property
    def content(self) -> tuple[object, ...]:
        """All but who brought it."""
        return self[1:]

    def on(self, account: str) -> int:
        """What the entry posts on `account`."""
        return sum(amount for name, amount in zip(self.accounts, self.amounts, strict=True) if name == account)


class Link(NamedTuple):
    """A balance transaction and an entry of its."""

    balance_transaction: str
    key: str
    entry_id: str


class Payout(NamedTuple):
    """A payout's row in a shard. Amounts in minor units, times in microseconds since 1970."""

    shard: str
    slot: int
    key: str
    seller: str
    currency: str
    sequence: int
    status: str
    version: int
    amount: int
    ref_code: str
    fee: int
    reference: str
    """The bank's, when it was paid by hand."""
    created_at_us: int


@dataclass
class Shard:
    """All that one shard holds, from one snapshot. `position` is a place in its log past everything that is in it."""

    name: str
    owned: list[tuple[int, int]] = field(default_factory=list)
    payments: list[Payment] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    position: int = 0
    payouts: list[Payout] = field(default_factory=list)

    def owns(self, slot: int) -> bool:
        """Whether the shard's own database says that the slot is its."""
        return any(first <= slot <= last for first, last in self.owned)


class Intent(NamedTuple):
    """A PaymentIntent as Stripe lists it. `key` is the metadata's oncepay_key, empty when it has none."""

    id: str
    key: str
    status: str
    received: int
    charge: str
    attempted: bool
    """Whether it was ever confirmed: it is past its confirmation, or an attempt left a charge or an error."""


class Transaction(NamedTuple):
    """A balance transaction as Stripe lists it; `created` in seconds since 1970."""

    id: str
    kind: str
    currency: str
    net: int
    source: str
    created: int


@dataclass
class Stripe:
    """What Stripe lists, and its time at the last page (seconds since 1970, by its own clock)."""

    intents: list[Intent] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    now: float = 0.0


class PaidOut(NamedTuple):
    """A payment as Tipalti lists it; minor units, times in seconds since 1970. `status` is Tipalti's word."""

    id: str
    ref_code: str
    status: str
    currency: str
    amount: int
    fee_currency: str
    fee: int
    created: int
    changed: int


class Funding(NamedTuple):
    """Money that came to the balance at Tipalti from the bank (negative: went back)."""

    id: str
    currency: str
    amount: int
    created: int


@dataclass
class Tipalti:
    """What Tipalti lists, and its time at the last page (seconds since 1970, by its own clock)."""

    payments: list[PaidOut] = field(default_factory=list)
    fundings: list[Funding] = field(default_factory=list)
    now: float = 0.0


class SellerDay(NamedTuple):
    """The aggregator's sums of one seller, currency and UTC day (days since 1970)."""

    payments: int
    gross: int
    refunded: int
    disputed: int
    fees: int
    net: int


class State(NamedTuple):
    """What of a payment must be the same in the aggregator as in its shard."""

    slot: int
    status: str
    version: int
    buyer: str
    currency: str
    amount: int
    captured: int
    refunded: int
    intent: str


@dataclass
class Derived:
    """All that the aggregator holds, from one snapshot."""

    positions: dict[str, int] = field(default_factory=dict)
    payments: dict[str, State] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    links: set[Link] = field(default_factory=set)
    seller_days: dict[tuple[str, str, int], SellerDay] = field(default_factory=dict)
    accounts: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    kinds: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    payouts: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """A payout's status, version and amount, by its key."""


@dataclass(frozen=True, order=True)
class Difference:
    """A promise that doesn't hold: for `key` (a payment's, else what the thing is called), and what to do about it."""

    promise: int
    what: str
    key: str
    advice: str = field(default="", compare=False)


@dataclass
class Findings:
    """What one look at everything found. `waiting` names what may still come by itself; `checked` counts.

    `lagging` are the keys of which a feed hasn't brought everything yet.
    """

    differences: set[Difference] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    lagging: set[str] = field(default_factory=set)
    checked: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))

    def differ(self, promise: int, key: str, what: str, advice: str) -> None:
        """Note a difference."""
        self.differences.add(Difference(promise, what, key, advice))


@dataclass
class Report:
    """What was found. `ok` when there is no difference; `open` are payments still in flight."""

    checked: dict[str, int]
    open: int
    differences: Sequence[Difference]
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.differences
