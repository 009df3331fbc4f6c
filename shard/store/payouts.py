"""Payouts: rows in the shards that their keys hash to, written with their entries, each answer behind the quorum.

A new row is made once, whoever tries how often; a change is compared by version. What is written goes through the SQL
function `oncepay.put_payouts`, which locks its range and checks the ownership in the next statement, as every write does.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from oncepay.errors import InvalidField, NotFound, NotOwner, OncepayError, OutcomeUnknown
from oncepay.keys import funding_key
from oncepay.keys import slot as slot_of
from oncepay.ledger import Entry, payout_entry
from oncepay.payment import Payment
from oncepay.payout import Payout, PayoutProgress
from oncepay.payout_moves import PayoutEvent, is_final, move
from oncepay.shardmap import SLOTS, merged
from shard.store.batch import HURRY, Batcher, EntryView
from shard.store.rows import moment, payment_of
from shard.store.store import Shards

PUTS_MAX = 200
"""Rows of one transaction."""
READS_MAX = 1_000
DISPUTES_MAX = 50_000
"""Open disputes that one shard may have; a run refuses to go on past that."""

_FOLDER = resources.files("shard.store") / "sql"
_PUT, _READ, _BY_REF_CODE, _MOMENT, _DISPUTED = (
    (_FOLDER / f"{name}.sql").read_text()
    for name in ("put_payouts", "read_payouts", "payout_of_ref_code", "moment", "open_disputes")
)

_FUNDING = "select oncepay.book_funding($1, $2, $3, $4, $5, $6, $7, $8)"
_FOREVER = dt.datetime(9999, 1, 1, tzinfo=dt.UTC)

Outcome = Literal["made", "exists", "late"]
T = TypeVar("T")


class StalePayout(Exception):
    """The row changed since the look at Tipalti that an event comes from: look again. Carries the row as it is."""

    def __init__(self, payout: Payout) -> None:
        super().__init__(payout.key)
        self.payout = payout


class _Parted(Exception):
    """Rows that were one shard's are several shards' now: the map has changed since they were grouped."""


class Moment(NamedTuple):
    """Where a shard's log and clock were."""

    lsn: int
    now: dt.datetime


class Change(NamedTuple):
    """A change to commit: the row as it was read, and what has happened to it."""

    payout: Payout
    events: tuple[PayoutEvent, ...]


class _Row(msgspec.Struct):
    """A row as `put_payouts` takes it."""

    seller: str
    currency: str
    sequence: int
    status: str
    amount: int
    payee: str
    ref_code: str
    run: str
    created_by: str
    positions: dict[str, str]
    progress: PayoutProgress
    open_work: bool
    event: str
    created_at: str
    updated_at: str


class _Put(msgspec.Struct):
    slot: int
    key: str
    expect: int
    row: _Row
    entries: list[EntryView]


class _Answer(msgspec.Struct):
    outcome: str
    row: Payout | None = None


_answers = msgspec.json.Decoder(list[_Answer]).decode
_payout = msgspec.json.Decoder(Payout).decode
_entries = msgspec.json.Decoder(tuple[EntryView, ...]).decode


class PayoutStore:
    """The payouts of all shards, for one process. `actor` names it in each row."""

    def __init__(self, shards: Shards, actor: str) -> None:
        self._shards = shards
        self._actor = actor
        self._nonces = map(f"{secrets.token_hex(8)}-{{:x}}".format, itertools.count(1))

    async def moments(self) -> dict[str, Moment]:
        """Where every shard's log and clock are now, behind the barrier. The feeds are asked to be there soon.

        Also of a shard that owns nothing any more: what it committed before may still be on its way.
        """

        async def attempt() -> dict[str, Moment]:
            names = await self._shards.names()
            read = await asyncio.gather(*(self._shards.batcher(name).read(_MOMENT, message=HURRY) for name in names))
            return {name: Moment(rows[0]["lsn"], rows[0]["now"]) for name, rows in zip(names, read, strict=True)}

        return await self._shards.hold(attempt)

    async def make(self, payouts: Sequence[Payout], not_after: Mapping[str, dt.datetime]) -> dict[str, Outcome]:
        """Commit new rows with their entries, each at most once ever: the outcome by key.

        `not_after` is until when each shard takes them, by its own clock. Raises ShardUnavailable or OutcomeUnknown after the
        hold; some may have been made then, and none is made twice by trying again.
        """
        event = f"run {next(self._nonces)}"
        puts = [_put_of(payout, 0, event, (_first_entry(payout),)) for payout in payouts]
        outcomes: dict[str, Outcome] = {}
        for answers in await self._in_groups(puts, not_after):
            for put, answer in answers:
                if isinstance(answer, OncepayError):
                    raise answer
                own = answer.row is not None and answer.row.run == put.row.run  # a try before, whose outcome was unknown
                outcomes[put.key] = (
                    "made" if answer.outcome == "done" or own else "late" if answer.outcome == "late" else "exists"
                )
        return outcomes

    async def get(self, key: str) -> Payout | None:
        """The row of `key`, behind the barrier."""
        return (await self.get_many([key])).get(key)

    async def get_with_entries(self, key: str) -> tuple[Payout, tuple[EntryView, ...]] | None:
        """The row of `key` and its entries, oldest first."""

        async def attempt() -> tuple[Payout, tuple[EntryView, ...]] | None:
            (row,) = await self._owned(self._batcher(key), [key], entries=True)
            return (_payout(row["payout"]), _entries(row["entries"] or "[]")) if row["payout"] else None

        return await self._shards.hold(attempt)

    async def get_many(self, keys: Iterable[str]) -> dict[str, Payout]:
        """The rows of these keys, behind the barrier; those that aren't there are absent."""
        wanted = sorted(set(keys))
        found: dict[str, Payout] = {}
        for some in _pieces(wanted, READS_MAX):
            found |= await self._shards.hold(partial(self._read, some))
        return found

    async def _read(self, keys: Sequence[str]) -> dict[str, Payout]:
        by_shard: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            by_shard[self._shards.maps.current.range_of(slot_of(key)).shard].append(key)
        read = await asyncio.gather(*(self._owned(self._shards.batcher(s), some) for s, some in by_shard.items()))
        return {p.key: p for rows in read for row in rows if row["payout"] for p in (_payout(row["payout"]),)}

    async def _owned(self, batcher: Batcher, keys: Sequence[str], *, entries: bool = False) -> Sequence[Mapping[str, Any]]:
        rows = await batcher.read(_READ, [slot_of(key) for key in keys], list(keys), entries)
        for key, row in zip(keys, rows, strict=True):
            if not row["owned"]:
                raise batcher.not_owner(key)
        return rows

    async def by_ref_code(self, code: str) -> Payout | None:
        """The payout with this reference code, on whichever shard it is."""

        async def attempt() -> Payout | None:
            names = self._shards.maps.current.shards()
            found = await asyncio.gather(*(self._shards.batcher(name).read(_BY_REF_CODE, code) for name in names))
            return next((_payout(row["payout"]) for rows in found for row in rows), None)

        return await self._shards.hold(attempt)

    async def disputed(self) -> list[Payment]:
        """Payments with an open dispute, of all shards, each slot read from its one owner.

        Raises InvalidField when there are too many to look at them all, NotOwner when a range stays nobody's.
        """

        async def attempt() -> list[Payment]:
            names = self._shards.maps.current.shards()
            read = await asyncio.gather(*(self._shards.batcher(name).read(_DISPUTED, DISPUTES_MAX + 1) for name in names))
            if any(len(rows) > DISPUTES_MAX for rows in read):
                raise InvalidField(f"more than {DISPUTES_MAX} payments of a shard have open disputes")
            owned = sorted((first, last) for rows in read for first, last in rows[0]["owned"])
            if sum(last - first + 1 for first, last in owned) != SLOTS or merged(owned) != [(0, SLOTS - 1)]:
                raise NotOwner("a range is handed over: its payments may be read from no shard, or from two")
            return [payment_of(row) for rows in read for row in rows if row["key"] is not None]

        return await self._shards.hold(attempt)

    async def apply(self, payout: Payout, *events: PayoutEvent, event: str) -> Payout:
        """Apply events to a row in one commit and return the row as it is then.

        Raises StalePayout when the row has changed meanwhile and an event isn't final at Tipalti, and what `move` raises.
        """
        (result,) = await self.apply_many([Change(payout, events)], event=event)
        if isinstance(result, Exception):
            raise result
        return result

    async def apply_many(self, changes: Sequence[Change], *, event: str) -> list[Payout | Exception]:
        """Apply changes of several rows, each named once, in few commits: the row as it is then, or what went wrong, for each."""
        results: dict[str, Payout | Exception] = {}
        left = list(changes)
        while left:
            puts: dict[str, tuple[_Put, Payout, Change]] = {}
            for change in left:
                try:
                    after, entries = _moved(change)
                except OncepayError as error:
                    results[change.payout.key] = error
                    continue
                if after is change.payout:
                    results[change.payout.key] = after
                else:
                    puts[after.key] = _put_of(after, change.payout.version, event, entries), after, change
            left = []
            for answers in await self._in_groups([put for put, _, _ in puts.values()], {}):
                for put, answer in answers:
                    _, after, change = puts[put.key]
                    again = _settle(answer, after, change, results)
                    if again is not None:
                        left.append(again)
        return [results[change.payout.key] for change in changes]

    async def book_funding(self, funding: str, currency: str, amount_minor: int) -> str:
        """Commit the entry of money that went from the bank to the balance at Tipalti (negative: back), once by its id.

        `booked`, `same`, or `differs` when it was booked otherwise. Raises ShardUnavailable or OutcomeUnknown after the hold.
        """
        key = funding_key(funding)
        slot = slot_of(key)

        async def attempt() -> str:
            batcher = self._shards.batcher(self._shards.maps.current.range_of(slot).shard)
            row = await batcher.write(
                _FUNDING, batcher.first_of(slot), f"{self._actor} funding", slot, key, funding, currency, amount_minor,
                moment(time.time_ns() // 1_000_000),
            )  # fmt: skip
            if row[0] == "moved":
                raise batcher.not_owner(key)
            return str(row[0])

        return await self._shards.hold(attempt)

    # Writing

    async def _in_groups(
        self, puts: Sequence[_Put], not_after: Mapping[str, dt.datetime]
    ) -> list[list[tuple[_Put, _Answer | OncepayError]]]:
        """Send puts, at most PUTS_MAX a transaction, each to the shard that owns it."""
        by_shard: dict[str, list[_Put]] = defaultdict(list)
        for put in sorted(puts, key=lambda put: (put.slot, put.key)):
            by_shard[self._shards.maps.current.range_of(put.slot).shard].append(put)
        pieces = [piece for some in by_shard.values() for piece in _pieces(some, PUTS_MAX)]
        return await asyncio.gather(*(self._written(piece, not_after) for piece in pieces))

    async def _written(
        self, puts: Sequence[_Put], not_after: Mapping[str, dt.datetime]
    ) -> list[tuple[_Put, _Answer | OncepayError]]:
        """One transaction, held through fences and failovers; a row that the database refuses fails alone."""
        answers: list[_Answer]
        try:
            answers = await self._shards.hold(lambda: self._once(puts, not_after))
        except InvalidField as error:
            if len(puts) == 1:
                return [(puts[0], error)]
            middle = len(puts) // 2
            return await self._written(puts[:middle], not_after) + await self._written(puts[middle:], not_after)
        except _Parted:
            return [pair for pairs in await self._in_groups(puts, not_after) for pair in pairs]
        except OutcomeUnknown as error:
            return [(put, error) for put in puts]
        return list(zip(puts, answers, strict=True))

    async def _once(self, puts: Sequence[_Put], not_after: Mapping[str, dt.datetime]) -> list[_Answer]:
        shard_map = self._shards.maps.current
        shards = {shard_map.range_of(put.slot).shard for put in puts}
        if len(shards) > 1:
            raise _Parted
        (shard,) = shards
        batcher = self._shards.batcher(shard)
        row = await batcher.write(
            _PUT,
            sorted({batcher.first_of(put.slot) for put in puts}),
            batcher.epoch,
            self._actor,
            f"{self._actor} payouts {next(self._nonces)}",
            msgspec.json.encode(puts).decode(),
            not_after.get(shard, _FOREVER),
        )
        answers = _answers(row[0])
        if any(answer.outcome == "moved" for answer in answers):
            raise batcher.not_owner(f"payouts of {puts[0].key} and others")
        return answers

    def _batcher(self, key: str) -> Batcher:
        return self._shards.batcher(self._shards.maps.current.range_of(slot_of(key)).shard)


def _moved(change: Change) -> tuple[Payout, tuple[Entry, ...]]:
    after = change.payout
    entries: tuple[Entry, ...] = ()
    for event in change.events:
        moved = move(after, event)
        after, entries = moved.payout, entries + moved.entries
    if after is change.payout:
        return after, ()
    now_ms = max(time.time_ns() // 1_000_000, change.payout.updated_at_ms)
    return replace(after, version=change.payout.version + 1, updated_at_ms=now_ms), entries


def _settle(
    answer: _Answer | OncepayError, after: Payout, change: Change, results: dict[str, Payout | Exception]
) -> Change | None:
    """Take an answer in; the change to try again on the row as it is, where its events hold for any version."""
    key = after.key
    if isinstance(answer, OncepayError):
        results[key] = answer
    elif answer.outcome == "done" or answer.row == after:  # a try before this one, whose outcome was unknown
        results[key] = after
    elif answer.row is None:
        results[key] = NotFound(f"there is no payout {key}")
    elif all(is_final(event) for event in change.events):
        return Change(answer.row, change.events)
    else:
        results[key] = StalePayout(answer.row)
    return None


def _first_entry(payout: Payout) -> Entry:
    return payout_entry(payout.seller, payout.currency, payout.amount, payout.ref_code)


def _put_of(payout: Payout, expect: int, event: str, entries: tuple[Entry, ...]) -> _Put:
    row = _Row(
        seller=payout.seller,
        currency=payout.currency,
        sequence=payout.sequence,
        status=payout.status.value,
        amount=payout.amount,
        payee=payout.payee,
        ref_code=payout.ref_code,
        run=payout.run,
        created_by=payout.created_by,
        positions=payout.positions,
        progress=payout.progress,
        open_work=not payout.over,
        event=event,
        created_at=moment(payout.created_at_ms).isoformat(),
        updated_at=moment(payout.updated_at_ms).isoformat(),
    )
    return _Put(slot_of(payout.key), payout.key, expect, row, [_entry_of(entry) for entry in entries])


def _entry_of(entry: Entry) -> EntryView:
    postings = entry.postings
    return EntryView(
        entry.entry_id,
        entry.kind,
        entry.currency,
        entry.source,
        [posting.account for posting in postings],
        [posting.amount_minor for posting in postings],
        [posting.seller for posting in postings],
    )


def _pieces(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
