"""Promise 6: what the aggregator holds and shows, against the shards' entries and a fold of our own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from loadtest.checker.books import PLATFORM_FEES, PLATFORM_SELLER, Books
from loadtest.checker.model import Derived, Entry, Findings, Payment, SellerDay, State

DAY_US = 86_400_000_000
COLUMNS = {"payment": "gross", "refund": "refunded", "dispute": "disputed"}
"""Where an entry of a kind counts, by the kind's first word."""
_REBUILD = "compare the feed's position with the shard's slot; the aggregator can be made again from the shards"


Name = TypeVar("Name", tuple[str, str], tuple[str, str, int])


def check_derived(books: Books, derived: Derived, found: Findings) -> None:
    """Entries, links and states are the shards'; the sums are the fold of the entries."""
    behind = {shard.name for shard in books.shards if derived.positions.get(shard.name, 0) < shard.position}
    held = _once(derived.entries, found)
    _check_entries(books, held, behind, found)
    _check_links(books, derived, behind, found)
    _check_states(books, derived, behind, found)
    _check_sums(derived, held.values(), found)
    found.checked["derived_entries"] = len(held)
    found.checked["sellers"] = len({seller for seller, _, _ in derived.seller_days})


def _once(entries: Sequence[Entry], found: Findings) -> dict[tuple[str, str], Entry]:
    held: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if entry.name in held:
            found.differ(6, entry.key, f"the aggregator has entry {entry.entry_id} twice", _REBUILD)
        held[entry.name] = entry
    return held


def _check_entries(books: Books, held: dict[tuple[str, str], Entry], behind: set[str], found: Findings) -> None:
    for name, entry in books.entries.items():
        other = held.get(name)
        if other is None:
            _missing(entry.shard, entry.key, f"entry {entry.entry_id}", behind, found)
        elif other.content != entry.content:
            found.differ(6, entry.key, f"the aggregator has another entry {entry.entry_id} than {entry.shard}", _REBUILD)
    for name in held.keys() - books.entries.keys():
        found.differ(6, name[0], f"the aggregator has entry {name[1]}, which no shard has", _REBUILD)


def _missing(shard: str, key: str, what: str, behind: set[str], found: Findings) -> None:
    """It may still come where the feed isn't past the shard's snapshot yet."""
    if shard in behind:
        found.waiting.add(f"the feed of {shard} to bring {what} of {key}")
        found.lagging.add(key)
    else:
        found.differ(6, key, f"the aggregator lacks {what}, which {shard} has", _REBUILD)


def _check_links(books: Books, derived: Derived, behind: set[str], found: Findings) -> None:
    for shard in books.shards:
        for link in shard.links:
            if link not in derived.links:
                _missing(shard.name, link.key, f"the link to {link.balance_transaction}", behind, found)
    for link in derived.links - books.links:
        found.differ(6, link.key, f"the aggregator has a link to {link.balance_transaction}, which no shard has", _REBUILD)


def _state(payment: Payment) -> State:
    return State(
        *(payment.slot, payment.status, payment.version, payment.buyer, payment.currency, payment.amount),
        *(payment.captured, payment.refunded, payment.intent),
    )


def _check_states(books: Books, derived: Derived, behind: set[str], found: Findings) -> None:
    for key, payment in books.payments.items():
        state, other = _state(payment), derived.payments.get(key)
        if other is None or other.version < state.version:
            _missing(payment.shard, key, f"version {state.version}", behind, found)
        elif other != state:
            found.differ(6, key, f"the aggregator has {_words(other)}, {payment.shard} has {_words(state)}", _REBUILD)
    for key in derived.payments.keys() - books.payments.keys():
        found.differ(6, key, "the aggregator has this payment, and no shard has", _REBUILD)


def _words(state: State) -> str:
    return f"{state.status} (version {state.version}, {state.captured} of {state.amount} {state.currency})"


Fold = tuple[
    dict[tuple[str, str, int], SellerDay], dict[tuple[str, str], tuple[int, int]], dict[tuple[str, str], tuple[int, int]]
]


def fold(entries: Iterable[Entry]) -> Fold:
    """The sums by seller, currency and day; by account (debit, credit); and by kind (entries, debits)."""
    days: defaultdict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    accounts: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    kinds: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for entry in entries:
        kinds[entry.kind, entry.currency][0] += 1
        kinds[entry.kind, entry.currency][1] += sum(amount for amount in entry.amounts if amount > 0)
        for account, amount in zip(entry.accounts, entry.amounts, strict=True):
            accounts[account, entry.currency][amount < 0] += abs(amount)
        column = COLUMNS.get(entry.kind.split("_")[0])
        if column is not None:
            _add_sellers(days, entry, column)
    return (
        {name: SellerDay(n, g, r, d, f, g - r - d - f) for name, (n, g, r, d, f) in days.items()},
        {name: (debit, credit) for name, (debit, credit) in accounts.items()},
        {name: (count, amount) for name, (count, amount) in kinds.items()},
    )


def _add_sellers(days: defaultdict[tuple[str, str, int], list[int]], entry: Entry, column: str) -> None:
    day = entry.created_at_us // DAY_US
    place, sign = {"gross": (1, -1), "refunded": (2, 1), "disputed": (3, 1)}[column]
    for seller in {seller for seller in entry.sellers if seller}:
        row = days[seller, entry.currency, day]
        row[0] += column == "gross"
        for account, amount, who in zip(entry.accounts, entry.amounts, entry.sellers, strict=True):
            if who == seller:
                row[place] += sign * amount
                if account == PLATFORM_FEES and seller != PLATFORM_SELLER:
                    row[4] -= amount


def _check_sums(derived: Derived, entries: Iterable[Entry], found: Findings) -> None:
    """Against the fold of the aggregator's own entries, from the same snapshot: there is no lag between them."""
    days, accounts, kinds = fold(entries)
    _compare("seller", days, derived.seller_days, found)
    _compare("account", accounts, derived.accounts, found)
    _compare("kind", kinds, derived.kinds, found)


def _compare(what: str, ours: Mapping[Name, tuple[int, ...]], theirs: Mapping[Name, tuple[int, ...]], found: Findings) -> None:
    """Sums that are all zero are as good as none."""
    for name in ours.keys() | theirs.keys():
        mine: tuple[int, ...] = tuple(ours.get(name, ()))
        other: tuple[int, ...] = tuple(theirs.get(name, ()))
        if mine != other and any((*mine, *other)):
            shown = " ".join(map(str, name[1:]))
            found.differ(
                6, str(name[0]), f"{what} sums of {shown}: the aggregator has {other}, the entries give {mine}", _REBUILD
            )
