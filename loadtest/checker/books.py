"""The shards' rows put together: where each key is, and promises 1 (placement) and 5 (balanced)."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from loadtest.checker.model import Entry, Findings, Link, Payment, Shard, Share, Target

SLOTS = 65_536
CLEARING = "stripe:clearing"
PLATFORM_FEES = "platform:fees"
PLATFORM_SELLER = "platform"
OTHERS = ("payout:", "tipalti:", "stripe:")
"""Reserved keys of entries that are of no payment."""


def slot_of(key: str) -> int:
    """The first 16 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big")


class Books:
    """All shards' rows, each key from the shard that owns it."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.payments: dict[str, Payment] = {}
        self.entries: dict[tuple[str, str], Entry] = {}
        self.links: set[Link] = set()
        self.doubled: list[tuple[str, str]] = []
        """What one shard has twice: its key, and what it is."""
        owners = {shard.name: shard for shard in shards}
        for shard in shards:
            for payment in shard.payments:
                known = self.payments.get(payment.key)
                if known is None or not owners[known.shard].owns(known.slot):
                    self.payments[payment.key] = payment
            names, links = Counter(entry.name for entry in shard.entries), Counter(shard.links)
            self.doubled += [(key, f"entry {entry_id}") for (key, entry_id), count in names.items() if count > 1]
            self.doubled += [(link.key, f"the link of {link.entry_id}") for link, count in links.items() if count > 1]
            for entry in shard.entries:
                known_entry = self.entries.get(entry.name)
                if known_entry is None or not owners[known_entry.shard].owns(known_entry.slot):
                    self.entries[entry.name] = entry
            self.links.update(shard.links)
        self.of_key: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries.values():
            self.of_key[entry.key].append(entry)


def check_ranges(shards: Sequence[Shard], target: Target, found: Findings) -> None:
    """Every slot has one owner, and the databases agree with the map."""
    advice = "don't write by hand to oncepay.ranges; see the move's record for which of the two is right"
    following = 0
    for first, last, name in sorted((first, last, shard.name) for shard in shards for first, last in shard.owned):
        if first > following:
            found.differ(1, f"slots {following}-{first - 1}", "no shard owns these slots", advice)
        elif first < following:
            found.differ(1, f"slots {first}-{min(last, following - 1)}", f"{name} and another shard own these slots", advice)
        following = max(following, last + 1)
    if following < SLOTS:
        found.differ(1, f"slots {following}-{SLOTS - 1}", "no shard owns these slots", advice)
    for shard, told in zip(shards, target.shards, strict=True):
        if told.ranges and _merged(shard.owned) != _merged(told.ranges):
            found.differ(1, f"shard {shard.name}", f"it owns {shard.owned}, the map gives it {list(told.ranges)}", advice)


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first == merged[-1][1] + 1:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return merged


def check_placement(shards: Sequence[Shard], target: Target, found: Findings) -> None:
    """Each key's rows are in the shard that owns its slot, and nowhere else (but in slots that are being moved)."""
    holders: defaultdict[str, list[Payment]] = defaultdict(list)
    owners = {shard.name: shard for shard in shards}
    for shard in shards:
        for payment in shard.payments:
            holders[payment.key].append(payment)
        for entry in shard.entries:
            if entry.slot != slot_of(entry.key):
                found.differ(1, entry.key, f"{shard.name} has its entry {entry.entry_id} in slot {entry.slot}", _PLACE)
    for key, payments in holders.items():
        slot = slot_of(key)
        for payment in payments:
            if payment.slot != slot:
                found.differ(1, key, f"{payment.shard} has it in slot {payment.slot}, its slot is {slot}", _PLACE)
        owning = [payment for payment in payments if owners[payment.shard].owns(slot)]
        names = " and ".join(payment.shard for payment in payments)
        moving = any(first <= slot <= last for first, last in target.moving)
        if not owning:
            found.differ(1, key, f"{names} has it, and doesn't own its slot {slot}", _PLACE)
        elif len(payments) > 1 and not (moving and len(owning) == 1):
            found.differ(1, key, f"{names} have a row of it", _PLACE)
        else:
            found.checked["copies"] += len(payments) - 1
    found.checked["keys"] = len(holders)


_PLACE = "look at the map, at the moves' records and at both shards before either row is touched"


def check_balanced(books: Books, found: Findings) -> None:
    """Entries sum to zero; what a payment took is what its one entry says, split as agreed."""
    for key, what in books.doubled:
        found.differ(5, key, f"{what} is there twice", _ENTRY)
    for entry in books.entries.values():
        if not len(entry.accounts) == len(entry.amounts) == len(entry.sellers) >= 2:
            found.differ(5, entry.key, f"entry {entry.entry_id} has postings of unequal length", _ENTRY)
        elif sum(entry.amounts) != 0:
            found.differ(5, entry.key, f"entry {entry.entry_id} sums to {sum(entry.amounts)} {entry.currency}", _ENTRY)
        if entry.key not in books.payments and not entry.key.startswith(OTHERS):
            found.differ(5, entry.key, f"entry {entry.entry_id} has no payment", _ENTRY)
    for payment in books.payments.values():
        _check_payment(payment, books.of_key.get(payment.key, []), found)
    found.checked["entries"] = len(books.entries)


_ENTRY = "the database refuses this: find out who wrote past its constraints, then book the correction as a new entry"
_SPLIT = "compare the entry with the payment's terms; correct it by a new entry, never by a change"


def _check_payment(payment: Payment, entries: Sequence[Entry], found: Findings) -> None:
    found.checked["payments"] += 1
    found.checked[payment.status] += 1
    gross = {share.seller: share.gross for share in payment.shares}
    if gross != {item.seller: item.gross for item in payment.items} or sum(gross.values()) != payment.amount:
        found.differ(5, payment.key, f"its items come to another sum than its amount, {payment.amount}", _SPLIT)
    paid = [entry for entry in entries if entry.kind == "payment"]
    if payment.status != "succeeded":
        if paid:
            found.differ(5, payment.key, f"it is {payment.status} and has the entry {paid[0].entry_id}", _SPLIT)
        return
    if len(paid) != 1:
        found.differ(5, payment.key, f"it has succeeded and has {len(paid)} payment entries", _SPLIT)
        return
    (entry,) = paid
    amount = entry.on(CLEARING)
    if (amount, entry.currency) != (payment.captured, payment.currency):
        found.differ(
            5, payment.key, f"its entry says {amount} {entry.currency}, its row {payment.captured} {payment.currency}", _SPLIT
        )
    elif by_seller(entry) != _expected(payment):
        found.differ(5, payment.key, f"its entry splits {amount} otherwise than its terms say", _SPLIT)
    if payment.charge and entry.source != payment.charge:
        found.differ(5, payment.key, f"its entry is of {entry.source}, its charge is {payment.charge}", _SPLIT)


def by_seller(entry: Entry) -> dict[str, tuple[int, int]]:
    """What a payment's entry says for each seller: gross, and the platform's fee in it."""
    gross: Counter[str] = Counter()
    fees: Counter[str] = Counter()
    for account, amount, seller in zip(entry.accounts, entry.amounts, entry.sellers, strict=True):
        if seller:
            gross[seller] -= amount
            if account == PLATFORM_FEES and seller != PLATFORM_SELLER:
                fees[seller] -= amount
    return {seller: (gross[seller], fees[seller]) for seller in gross}


def _expected(payment: Payment) -> dict[str, tuple[int, int]]:
    shares = payment.shares
    if payment.asked and sum(share.gross for share in payment.asked) == payment.captured:
        agreed = {share.seller: share.gross for share in shares}
        if all(0 < share.gross <= agreed.get(share.seller, 0) for share in payment.asked):
            return {share.seller: (share.gross, share.fee) for share in payment.asked}
    if payment.captured != payment.amount:
        parts = spread(payment.captured, [share.gross for share in shares])
        shares = tuple(Share(share.seller, part, _part_of_fee(share, part)) for share, part in zip(shares, parts, strict=True))
    return {share.seller: (share.gross, share.fee) for share in shares}


def _part_of_fee(share: Share, part: int) -> int:
    return (2 * share.fee * part + share.gross) // (2 * share.gross) if share.gross else 0


def spread(total: int, weights: Sequence[int]) -> list[int]:
    """Split by largest remainder, the earlier first where two are equal."""
    whole = sum(weights)
    shares = [divmod(total * weight, whole) for weight in weights]
    left = total - sum(quotient for quotient, _ in shares)
    order = sorted(range(len(weights)), key=lambda n: -shares[n][1])
    return [quotient + (1 if n in order[:left] else 0) for n, (quotient, _) in enumerate(shares)]
