"""The sums over entries, against what a person would add up."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.fold import Sums, day_of, fold
from oncepay.cart import Fee, Item, shares_of
from oncepay.errors import MalformedBody
from oncepay.ledger import payable, payment_entry, stripe_fee_entry
from tests.aggregator.database import naive_postings
from tests.aggregator.strategies import DAY_US, FIRST_US, History, coded_rows, entry_row, histories, refund_row

DAY = dt.date(2026, 9, 21)


def one_payment() -> History:
    history = History("s0")
    items = [Item("ann", 1000), Item("bob", 200, 2), Item("platform", 55)]
    shares = shares_of(items, {}, Fee(1000))
    history.entries.append(entry_row(history.commit(), "k", payment_entry("usd", "ch_1", shares)))
    return history


def test_a_payment_counts_gross_fee_and_net_for_each_seller() -> None:
    sums = fold(one_payment().entries)
    ann, bob = sums.seller_days["ann", "usd", DAY], sums.seller_days["bob", "usd", DAY]
    assert (ann.payments, ann.gross, ann.fees, ann.net) == (1, 1000, 100, 900)
    assert (bob.payments, bob.gross, bob.fees, bob.net) == (1, 400, 40, 360)


def test_the_platforms_own_lines_are_income_without_a_fee() -> None:
    own = fold(one_payment().entries).seller_days["platform", "usd", DAY]
    assert (own.payments, own.gross, own.fees, own.net) == (1, 55, 0, 55)


def test_accounts_and_kinds() -> None:
    history = one_payment()
    history.entries.append(entry_row(history.commit(), "k", stripe_fee_entry("usd", "txn_1", 60)))
    sums = fold(history.entries)
    clearing = sums.accounts["stripe:clearing", "usd"]
    assert (clearing.debit, clearing.credit) == (1455, 60)
    assert sums.accounts["platform:fees", "usd"].credit == 100 + 40 + 55
    assert (sums.kinds["payment", "usd"].entries, sums.kinds["payment", "usd"].amount) == (1, 1455)
    assert (sums.kinds["stripe_fee", "usd"].entries, sums.kinds["stripe_fee", "usd"].amount) == (1, 60)


def test_a_refund_gives_back_gross_and_fee_on_its_own_day() -> None:
    history = one_payment()
    history.entries.append(refund_row(history.commit(), "k", history.entries[0], FIRST_US + DAY_US))
    sums = fold(history.entries)
    row = sums.seller_days["ann", "usd", DAY + dt.timedelta(1)]
    assert (row.payments, row.gross, row.refunded, row.fees, row.net) == (0, 0, 1000, -100, -900)
    assert sums.seller_days["ann", "usd", DAY].net + row.net == 0


def test_a_refund_that_failed_takes_it_back() -> None:
    history = one_payment()
    paid = history.entries[0]
    refund = refund_row(history.commit(), "k", paid, FIRST_US)
    again = refund_row(history.commit(), "k", refund, FIRST_US, "refund_failed")
    row = fold([paid, refund, again]).seller_days["ann", "usd", DAY]
    assert (row.gross, row.refunded, row.fees, row.net) == (1000, 0, 100, 900)


def test_the_day_is_utc() -> None:
    midnight_us = 1_790_035_200_000_000
    assert day_of(midnight_us) - day_of(midnight_us - 1) == dt.timedelta(1)
    assert day_of(-1) == dt.date(1969, 12, 31)


@given(histories())
def test_each_entrys_postings_are_what_it_did_to_its_sellers(history: History) -> None:
    found = {
        (p.seller, p.entry.currency, p.entry.created_at_us, p.entry.key, p.entry.entry_id, p.entry.kind, p.amount, p.total, p.fee)
        for p in fold(history.entries).postings
    }
    assert found == naive_postings(history.booked)


@given(histories())
def test_rows_as_shards_keep_them_come_to_what_their_entries_do(history: History) -> None:
    assert fold(history.entries) == fold(history.booked)


def test_a_code_of_a_later_version_is_refused() -> None:
    (row,) = coded_rows(1100, "k", [stripe_fee_entry("usd", "txn_1", 60)], [])
    with pytest.raises(MalformedBody, match="'Zann'"):
        fold([replace(row, accounts=("Zann", "C"))])


@given(histories())
def test_net_is_what_the_payable_accounts_changed_by(history: History) -> None:
    """Without payouts, which move what is owed and are no revenue."""
    sums = fold(entry for entry in history.entries if not entry.kind.startswith("payout"))
    for currency in ("usd", "eur", "jpy"):
        for seller in ("ann", "bob"):
            net = sum(row.net for (who, cur, _), row in sums.seller_days.items() if (who, cur) == (seller, currency))
            account = sums.accounts.get((payable(seller), currency))
            assert net == (account.credit - account.debit if account else 0)


@given(histories())
def test_all_accounts_together_are_zero(history: History) -> None:
    balance: Counter[str] = Counter()
    for (_, currency), total in fold(history.entries).accounts.items():
        balance[currency] += total.debit - total.credit
    assert not any(balance.values())


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_entries_makes_no_difference(history: History, random: object) -> None:
    shuffled = list(history.entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fold(shuffled) == fold(history.entries)
    assert isinstance(fold([]), Sums)
