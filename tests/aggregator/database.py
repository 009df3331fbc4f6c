"""What the aggregator's tables hold, and what they should hold after given histories."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from typing import Any

import asyncpg
import msgspec

from aggregator.fold import fold
from oncepay.feed import EntryRow
from oncepay.ledger import PLATFORM_FEES
from oncepay.payment_text import parse_terms
from tests.aggregator.strategies import History

TABLES = (
    *("watermarks", "payments", "payment_history_rows", "payment_versions", "entry_rows", "link_rows", "seller_days"),
    *("account_totals", "kind_totals", "seller_postings", "account_days", "payouts", "events", "event_cursors"),
    *("event_retries", "event_deliveries"),
)
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
State = dict[str, Any]


def us(time: dt.datetime) -> int:
    """Microseconds since 1970, exactly."""
    return (time - EPOCH) // dt.timedelta(microseconds=1)


async def empty(connection: asyncpg.Connection) -> None:
    """Forget everything."""
    await connection.execute("truncate " + ", ".join(f"oncepay.{table}" for table in TABLES))


async def held(connection: asyncpg.Connection) -> State:
    """All that the tables hold, sums over the shards."""
    payments = await connection.fetch("select * from oncepay.payments")
    entries = await connection.fetch("select * from oncepay.entries")
    links = await connection.fetch("select balance_transaction, key, entry_id from oncepay.balance_links")
    days = await connection.fetch(
        "select seller, currency, day, sum(payments), sum(gross), sum(refunded), sum(disputed), sum(fees), sum(net)"
        " from oncepay.current_seller_days group by 1, 2, 3"
    )
    accounts = await connection.fetch(
        "select account, currency, sum(debit), sum(credit) from oncepay.current_account_totals group by 1, 2"
    )
    of_days = await connection.fetch(
        "select account, currency, day, kind, sum(debit), sum(credit) from oncepay.account_days group by 1, 2, 3, 4"
    )
    postings = await connection.fetch(
        "select seller, currency, created_at, key, entry_id, kind, amount, total, fee from oncepay.seller_postings"
    )
    kinds = await connection.fetch("select kind, currency, sum(entries), sum(amount) from oncepay.kind_totals group by 1, 2")
    watermarks = await connection.fetch("select shard, lsn from oncepay.watermarks")
    return {
        "watermarks": {row["shard"]: row["lsn"] for row in watermarks},
        "payments": {
            row["key"]: (
                *(row["slot"], row["status"], row["version"], row["buyer"], row["currency"], row["amount"]),
                *(row["amount_captured"], row["payment_intent"], json.loads(row["items"] or "null"), row["platform_fee"]),
                us(row["created_at"]),
            )
            for row in payments
        },
        "entries": {
            (row["key"], row["entry_id"]): (
                *(row["slot"], row["kind"], row["currency"], row["source"], tuple(row["accounts"])),
                *(tuple(row["amounts"]), tuple(row["sellers"]), us(row["created_at"])),
            )
            for row in entries
        },
        "links": {tuple(row) for row in links},
        "days": {tuple(row)[:3]: tuple(int(value) for value in tuple(row)[3:]) for row in days},
        "accounts": {tuple(row)[:2]: tuple(int(value) for value in tuple(row)[2:]) for row in accounts},
        "account days": {tuple(row)[:4]: tuple(int(value) for value in tuple(row)[4:]) for row in of_days},
        "postings": {(*tuple(row)[:2], us(row["created_at"]), *tuple(row)[3:]) for row in postings},
        "kinds": {tuple(row)[:2]: tuple(int(value) for value in tuple(row)[2:]) for row in kinds},
    }


def naive_postings(entries: Iterable[EntryRow]) -> set[tuple[Any, ...]]:
    """What each entry did to each seller: what it is owed, that before fees, and the platform's part."""
    found = set()
    for entry in entries:
        assert entry.sellers is not None
        postings = list(zip(entry.accounts, entry.amounts, entry.sellers, strict=True))
        own = {account.split(":", 1)[1].rsplit(":", 1)[0] for account, _, _ in postings if account.endswith(":payable")}
        for seller in own | {seller for _, _, seller in postings if seller}:
            account = PLATFORM_FEES if seller == "platform" else f"seller:{seller}:payable"
            amount = -sum(a for name, a, whose in postings if name == account and whose in (seller, ""))
            total = -sum(a for _, a, whose in postings if whose == seller)
            fee = -sum(a for name, a, whose in postings if whose == seller != "platform" and name == PLATFORM_FEES)
            found.add((seller, entry.currency, entry.created_at_us, entry.key, entry.entry_id, entry.kind, amount, total, fee))
    return found


def expected(histories: Iterable[History]) -> State:
    """What the tables have to hold when all of `histories` was applied, in whatever way."""
    histories = list(histories)
    payments: dict[str, Any] = {}
    terms: dict[str, Any] = {}
    for row in (row for history in histories for row in history.payments):
        if row.terms is not None:
            terms[row.key] = parse_terms(row.terms)
        if row.key not in payments or payments[row.key].version < row.version:
            payments[row.key] = row
    entries: dict[tuple[str, str], EntryRow] = {(row.key, row.entry_id): row for history in histories for row in history.booked}
    sums = fold(entries.values())
    return {
        "watermarks": {history.shard: history.lsn for history in histories},
        "payments": {
            key: (
                *(row.slot, row.status, row.version, row.buyer, row.currency, row.amount, row.amount_captured, row.intent),
                *(list(msgspec.to_builtins(terms[key].items)), terms[key].platform_fee, row.created_at_us),
            )
            for key, row in payments.items()
        },
        "entries": {
            name: (row.slot, row.kind, row.currency, row.source, row.accounts, row.amounts, row.sellers, row.created_at_us)
            for name, row in entries.items()
        },
        "links": set[Any]().union(*(history.linked for history in histories)),
        "days": {
            name: (row.payments, row.gross, row.refunded, row.disputed, row.fees, row.net)
            for name, row in sums.seller_days.items()
        },
        "accounts": {name: (total.debit, total.credit) for name, total in sums.accounts.items()},
        "account days": {name: (total.debit, total.credit) for name, total in sums.account_days.items()},
        "postings": naive_postings(entries.values()),
        "kinds": {name: (total.entries, total.amount) for name, total in sums.kinds.items()},
    }
