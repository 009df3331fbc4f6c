"""Entries in rows: what was booked is read again, and the views of the database say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.cart import Share
from oncepay.entry_rows import EntryRow, Read, entries_of, links_of, packed
from oncepay.keys import slot as slot_of
from oncepay.ledger import (
    BalanceLink,
    Entry,
    Posting,
    dispute_entries,
    exchange_entries,
    payment_entry,
    refund_entry,
    refund_paid_entries,
    stripe_fee_entry,
)
from shard.store.migrate import migrate
from tests.postgres_fixture import PostgresServer

SELLERS = st.sampled_from(["ann", "bob", "platform", "ä:b", "fx:usd", "C"])
SHARE = st.builds(Share, SELLERS, st.integers(100, 10**6), st.integers(0, 99))
SHARES = st.lists(SHARE, min_size=1, max_size=3, unique_by=lambda share: share.seller)
ODD = Entry("odd:1", "odd", "usd", "elsewhere", (Posting("somewhere", 5), Posting("stripe:clearing", -5, "ann")))


@st.composite
def booked(draw: st.DrawFn) -> tuple[list[Entry], list[BalanceLink]]:
    """What one commit may book."""
    shares = tuple(draw(SHARES))
    entries: list[Entry] = []
    links: list[BalanceLink] = []
    if draw(st.booleans()):
        entries.append(payment_entry("usd", "ch_1", shares))
    fee_currency = draw(st.sampled_from(["usd", "eur"]))
    if draw(st.booleans()):
        links.append(BalanceLink("txn_1", "payment"))
        more = list(exchange_entries("txn_1", "usd", 500, "eur", 450)) if fee_currency == "eur" else []
        if draw(st.booleans()):
            more.append(stripe_fee_entry(fee_currency, "txn_1", draw(st.integers(1, 99))))
        entries += more
        links += [BalanceLink("txn_1", entry.entry_id) for entry in more]
    if draw(st.booleans()):
        entries.append(refund_entry("usd", "re:1", shares))
    if draw(st.booleans()):
        more = list(refund_paid_entries("usd", "txn_2", 100, fee_currency, 90, draw(st.integers(0, 5))))
        entries += more
        links += [BalanceLink("txn_2", entry.entry_id) for entry in more]
    if draw(st.booleans()):
        more = list(dispute_entries("usd", "txn_3", shares, 1, fee_currency, 80, draw(st.integers(0, 15))))
        entries += more
        links += [BalanceLink("txn_3", entry.entry_id) for entry in more]
    if draw(st.booleans()):
        entries.append(ODD)
    return entries, links


def plain(entry: Entry) -> Read:
    columns = zip(*((p.account, p.amount_minor, p.seller) for p in entry.postings), strict=True)
    return Read(entry.entry_id, entry.kind, entry.currency, entry.source, *columns)


def back(rows: list[EntryRow], left: list[BalanceLink]) -> tuple[set[Read], list[tuple[str, str]]]:
    links = [link for row in rows for link in links_of(row)] + [(link.entry_id, link.balance_transaction) for link in left]
    return {entry for row in rows for entry in entries_of(row)}, sorted(links)


@given(booked())
def test_what_was_booked_is_read_again(made: tuple[list[Entry], list[BalanceLink]]) -> None:
    entries, links = made
    found, found_links = back(*packed(entries, links))
    assert found == {plain(entry) for entry in entries}
    assert found_links == sorted((link.entry_id, link.balance_transaction) for link in links)


def test_a_payment_with_its_fee_is_one_row() -> None:
    entry = payment_entry("usd", "ch_1", (Share("ann", 900, 90), Share("platform", 100, 0)))
    fee = stripe_fee_entry("usd", "txn_1", 59)
    links = [BalanceLink("txn_1", entry.entry_id), BalanceLink("txn_1", fee.entry_id)]
    (row,), left = packed([entry, fee], links)
    accounts, amounts = ["C", "Pann", "Fann", "Fplatform"], [1000, -810, -90, -100]
    assert row == EntryRow("payment", None, "usd", "ch_1", accounts, amounts, None, "txn_1", 59)
    assert not left


def test_a_fee_that_came_later_is_a_row_of_its_own() -> None:
    fee = stripe_fee_entry("usd", "txn_1", 59)
    rows, left = packed([fee], [BalanceLink("txn_1", "payment"), BalanceLink("txn_1", fee.entry_id)])
    assert [(row.entry_id, row.balance_transaction, row.fee) for row in rows] == [("stripe_fee:txn_1", "txn_1", None)]
    assert left == [BalanceLink("txn_1", "payment")]


def test_a_code_of_a_later_version_is_refused() -> None:
    with pytest.raises(KeyError):
        entries_of(EntryRow("a:b", None, "usd", None, ["Z", "C"], [1, -1], None, None, None))


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


@pytest.mark.cluster
async def test_the_views_of_the_database_say_the_same(server: PostgresServer) -> None:
    dsn = server.new_database()
    await migrate(dsn, shard="s0", ranges=[(0, 65535)], passwords={})
    shares = (Share("ann", 900, 90), Share("ä:b", 50, 5), Share("platform", 100, 0))
    payment, fee = payment_entry("usd", "ch_1", shares), stripe_fee_entry("usd", "txn_1", 59)
    entries = [payment, fee, *exchange_entries("txn_9", "usd", 500, "eur", 450), refund_entry("usd", "re:1", shares), ODD]
    links = [BalanceLink("txn_1", payment.entry_id), BalanceLink("txn_1", fee.entry_id), BalanceLink("txn_9", "fx_out:txn_9")]
    rows, _ = packed(entries, links)
    connection = await asyncpg.connect(dsn)
    try:
        for row in rows:
            statement = "insert into oncepay.entries values ($1, 'k', $2, $3, $4, $5, $6, $7, $8, now(), $9, $10)"
            await connection.execute(statement, slot_of("k"), *row)
        names = ("entry_id", "kind", "currency", "source", "accounts", "amounts", "sellers")
        shown = await connection.fetch("select * from oncepay.ledger where key = 'k'")
        found = {json.dumps([row[name] for name in names]) for row in shown}
        assert found == {json.dumps(plain(entry)) for entry in entries}
        linked = await connection.fetch("select entry_id, balance_transaction from oncepay.transaction_links")
        assert sorted(map(tuple, linked)) == sorted((link.entry_id, link.balance_transaction) for link in links)
    finally:
        await connection.close()
