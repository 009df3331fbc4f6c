"""Payouts: where their rows are, how they are booked (1, 5), and each against Tipalti's payments and fundings (7)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from loadtest.checker.books import Books, slot_of
from loadtest.checker.model import Derived, Entry, Findings, PaidOut, Payout, Shard, Target, Tipalti

CLEARING = "tipalti:clearing"
FUNDING = "tipalti:"
GIVEN_BACK = frozenset({"rejected", "returned", "deferred", "canceled", "refused", "declined"})
UNTOLD = frozenset({"awaiting_approval", "created", "submitting"})
"""In these Tipalti may not know of it."""
BACK_AT_TIPALTI = frozenset({"rejected", "deferred", "deferred (internal)", "canceled", "cancelled"})

_PLACE = "look at the map, at the moves' records and at both shards before either row is touched"
_ENTRY = "compare the entries with the payout's row; correct by a new entry, never by a change"
_BOOK = "compare the payout's entries with the payment at Tipalti; book what is missing as a new entry"
_ADOPT = "look it up at Tipalti: have it stopped or returned, or find the shard of its payout and what became of the row"


def collect(shards: Sequence[Shard]) -> dict[str, Payout]:
    """All payouts, each from the shard that owns its slot."""
    owners = {shard.name: shard for shard in shards}
    payouts: dict[str, Payout] = {}
    for shard in shards:
        for payout in shard.payouts:
            known = payouts.get(payout.key)
            if known is None or not owners[known.shard].owns(known.slot):
                payouts[payout.key] = payout
    return payouts


def check_payouts(books: Books, payouts: dict[str, Payout], target: Target, found: Findings) -> None:
    """Each payout's row is in the one right place, its sequence follows the one before, its entries are what its state says."""
    _check_places(books.shards, payouts, target, found)
    sequences: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for payout in payouts.values():
        sequences[payout.seller, payout.currency].add(payout.sequence)
        _check_entries(payout, books.of_key.get(payout.key, []), found)
    for (seller, currency), numbers in sequences.items():
        if missing := set(range(1, max(numbers) + 1)) - numbers:
            key = f"payout:{seller}:{currency}:{min(missing)}"
            found.differ(1, key, "a later payout was made and this one is gone", _PLACE)
    found.checked["payouts"] = len(payouts)
    found.checked["payouts_open"] = sum(1 for payout in payouts.values() if payout.status not in GIVEN_BACK | {"cleared"})


def _check_places(shards: Sequence[Shard], payouts: dict[str, Payout], target: Target, found: Findings) -> None:
    owners = {shard.name: shard for shard in shards}
    copies = Counter(payout.key for shard in shards for payout in shard.payouts)
    codes = Counter(payout.ref_code for payout in payouts.values())
    for payout in payouts.values():
        slot = slot_of(payout.key)
        moving = any(first <= slot <= last for first, last in target.moving)
        if payout.slot != slot:
            found.differ(1, payout.key, f"{payout.shard} has it in slot {payout.slot}, its slot is {slot}", _PLACE)
        elif not owners[payout.shard].owns(slot):
            found.differ(1, payout.key, f"{payout.shard} has it, and doesn't own its slot {slot}", _PLACE)
        elif copies[payout.key] > 1 and not moving:
            found.differ(1, payout.key, f"{copies[payout.key]} shards have a row of it", _PLACE)
        if codes[payout.ref_code] > 1:
            found.differ(1, payout.key, f"another payout has its reference code {payout.ref_code}", _PLACE)


def _check_entries(payout: Payout, entries: Sequence[Entry], found: Findings) -> None:
    account = f"seller:{payout.seller}:payable"
    owed = sum(entry.on(account) for entry in entries if entry.currency == payout.currency)
    wanted = 0 if payout.status in GIVEN_BACK else payout.amount
    if sum(1 for entry in entries if entry.kind == "payout") != 1:
        found.differ(5, payout.key, "it hasn't one entry that pays it out", _ENTRY)
    elif owed != wanted:
        found.differ(5, payout.key, f"it is {payout.status} and its entries take {owed} from the seller, not {wanted}", _ENTRY)
    fees = sum(entry.on("tipalti:fees") for entry in entries)
    if fees != payout.fee:
        found.differ(5, payout.key, f"its row has a fee of {payout.fee}, its entries {fees}", _ENTRY)


def check_tipalti(books: Books, payouts: dict[str, Payout], tipalti: Tipalti, target: Target, found: Findings) -> None:
    """Each payment and each funding at Tipalti matches the postings of one key on the clearing account, and the other way."""
    by_code = {payout.ref_code: payout for payout in payouts.values()}
    shown: set[str] = set()
    for payment in tipalti.payments:
        payout = by_code.get(payment.ref_code)
        if payout is not None:
            shown.add(payout.key)
            _check_payment(books, payout, payment, tipalti, target, found)
        elif payment.created >= target.since:
            what = f"{payment.id} ({payment.amount} {payment.currency}, {payment.status}) has no payout"
            found.differ(7, payment.ref_code, what, _ADOPT)
    for payout in payouts.values():
        if payout.key not in shown:
            _check_unshown(books, payout, target, found)
    _check_fundings(books, tipalti, target, found)
    for entry in books.entries.values():
        if CLEARING in entry.accounts and entry.key not in payouts and not entry.key.startswith(FUNDING):
            found.differ(7, entry.key, f"entry {entry.entry_id} posts on {CLEARING} and is of no payout and no funding", _BOOK)
    found.checked["tipalti_payments"] = len(tipalti.payments)
    found.checked["tipalti_fundings"] = len(tipalti.fundings)


def _posted(books: Books, key: str) -> dict[str, int]:
    posted: Counter[str] = Counter()
    for entry in books.of_key.get(key, []):
        posted[entry.currency] += entry.on(CLEARING)
    return {currency: amount for currency, amount in posted.items() if amount}


def _words(sums: dict[str, int]) -> str:
    return ", ".join(f"{amount} {currency}" for currency, amount in sorted(sums.items())) or "nothing"


def _check_payment(books: Books, payout: Payout, payment: PaidOut, tipalti: Tipalti, target: Target, found: Findings) -> None:
    if (payment.amount, payment.currency) != (payout.amount, payout.currency):
        told = f"{payment.id} is {payment.amount} {payment.currency} at Tipalti, {payout.amount} {payout.currency} here"
        found.differ(7, payout.key, told, _ADOPT)
        return
    expected: Counter[str] = Counter()
    if payment.status.lower() not in BACK_AT_TIPALTI:
        expected[payment.currency] -= payment.amount
    expected[payment.fee_currency or payment.currency] -= payment.fee
    wanted = {currency: amount for currency, amount in expected.items() if amount}
    posted = _posted(books, payout.key)
    if posted == wanted:
        return
    what = f"{payment.id} is {payment.status} at Tipalti, which comes to {_words(wanted)}; posted is {_words(posted)}"
    if tipalti.now - payment.changed < target.grace_s and payout.status not in GIVEN_BACK | {"cleared"}:
        found.waiting.add(f"{payout.key}: {what}")
    else:
        found.differ(7, payout.key, what, _BOOK)


def _check_unshown(books: Books, payout: Payout, target: Target, found: Findings) -> None:
    posted = _posted(books, payout.key)
    over = payout.status in GIVEN_BACK or bool(payout.reference)
    wanted = {} if over else {payout.currency: -payout.amount}
    if payout.status not in UNTOLD | {"refused", "declined"} and not payout.reference:
        if payout.created_at_us / 1e6 >= target.since:
            found.differ(7, payout.key, f"it is {payout.status} here, and Tipalti doesn't have it", _BOOK)
    elif posted != wanted:
        found.differ(7, payout.key, f"it is {payout.status}, and {_words(posted)} is posted instead of {_words(wanted)}", _BOOK)


def _check_fundings(books: Books, tipalti: Tipalti, target: Target, found: Findings) -> None:
    known = set()
    for funding in tipalti.fundings:
        key = f"{FUNDING}{funding.id}"
        known.add(key)
        posted, wanted = _posted(books, key), {funding.currency: funding.amount}
        if posted == wanted or (not posted and funding.created < target.since):
            continue
        what = f"{_words(wanted)} came from the bank, {_words(posted)} is posted"
        if not posted and tipalti.now - funding.created < target.grace_s:
            found.waiting.add(f"{key}: {what}")
        else:
            found.differ(7, key, what, _BOOK)
    if not target.since:
        for key in books.of_key.keys() - known:
            if key.startswith(FUNDING):
                found.differ(7, key, "it is booked as a funding, which Tipalti doesn't have", _BOOK)


def check_derived_payouts(books: Books, payouts: dict[str, Payout], derived: Derived, found: Findings) -> None:
    """Promise 6: the aggregator's payouts are the shards'."""
    advice = "compare the feed's position with the shard's slot; the aggregator can be made again from the shards"
    behind = {shard.name for shard in books.shards if derived.positions.get(shard.name, 0) < shard.position}
    for key, payout in payouts.items():
        ours = payout.status, payout.version, payout.amount
        theirs = derived.payouts.get(key)
        if theirs is not None and theirs[1] >= payout.version:
            if theirs[1] == payout.version and theirs != ours:
                found.differ(6, key, f"the aggregator has {theirs}, {payout.shard} has {ours}", advice)
        elif payout.shard in behind:
            found.waiting.add(f"the feed of {payout.shard} to bring version {payout.version} of {key}")
            found.lagging.add(key)
        else:
            found.differ(6, key, f"the aggregator lacks version {payout.version}, which {payout.shard} has", advice)
    for key in derived.payouts.keys() - payouts.keys():
        found.differ(6, key, "the aggregator has this payout, and no shard has", advice)
