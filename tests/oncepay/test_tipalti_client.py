"""The client of Tipalti against the stand-in, as a process of its own."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.payout import Payout, PayoutStatus, new_payout
from oncepay.settings import TipaltiSettings
from oncepay.tipalti_client import (
    TOLERANCE_S,
    TipaltiClient,
    TipaltiOff,
    TipaltiRefused,
    TipaltiUnavailable,
    check_signature,
)
from oncepay.tipalti_objects import AmountObject, FundingObject, PaymentObject, amount_object, moment_s
from tests.sandbox.process import StandIn


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    made = StandIn("tipalti").start()
    yield made
    made.stop()


@pytest.fixture
async def tipalti(stand_in: StandIn) -> AsyncIterator[TipaltiClient]:
    async with TipaltiClient(TipaltiSettings(base_url=stand_in.url, refresh_token="rt_test_1")) as opened:
        yield opened
    stand_in.faults()


def payout(seller: str, payee: str, *, amount: int = 1_234, currency: str = "usd") -> Payout:
    return new_payout(
        seller, currency, 1, amount=amount, payee=payee, run="r", created_by="ann", positions={}, needs_approval=False, now_ms=1
    )


async def payable(stand_in: StandIn, tipalti: TipaltiClient, name: str) -> str:
    await tipalti.create_payee(name)
    stand_in.control("POST", "payee", {"payee": name, "payable": True})
    return name


async def test_a_batch_is_submitted_once_and_looked_up(stand_in: StandIn, tipalti: TipaltiClient) -> None:
    await payable(stand_in, tipalti, "c-1")
    fine, unknown, yen = payout("c-1", "c-1"), payout("c-2", "c-2"), payout("c-3", "c-1", amount=999, currency="jpy")
    lines = await tipalti.submit([fine, unknown, yen])
    assert {code: (line.result, line.errorCode) for code, line in lines.items()} == {
        fine.ref_code: ("OK", None), unknown.ref_code: ("Error", "UnknownPayee"), yen.ref_code: ("OK", None),
    }  # fmt: skip
    again = await tipalti.submit([fine])
    assert again[fine.ref_code].errorCode == "DuplicateRefCode"
    views = await tipalti.payments([fine.ref_code, unknown.ref_code, yen.ref_code])
    assert set(views) == {fine.ref_code, yen.ref_code}
    assert (views[fine.ref_code].amount, views[fine.ref_code].currency) == (1_234, "usd")
    assert (views[yen.ref_code].amount, views[yen.ref_code].currency) == (999, "jpy")
    assert views[fine.ref_code].known is PayoutStatus.SUBMITTED


async def test_a_lost_answer_is_an_unknown_outcome(stand_in: StandIn, tipalti: TipaltiClient) -> None:
    await payable(stand_in, tipalti, "c-lost")
    lost = payout("c-lost", "c-lost")
    stand_in.faults(lost_answer=1)
    with pytest.raises(TipaltiUnavailable):
        await tipalti.submit([lost])
    stand_in.faults(error_before=1)
    with pytest.raises(TipaltiUnavailable):
        await tipalti.payments([lost.ref_code])
    stand_in.faults()
    assert set(await tipalti.payments([lost.ref_code])) == {lost.ref_code}


async def test_tokens_that_are_over_are_replaced(stand_in: StandIn, tipalti: TipaltiClient) -> None:
    await tipalti.payees(["nobody"])
    stand_in.advance(3_700)
    assert await tipalti.payees(["nobody"]) == {}


async def test_payees_and_why_they_are_held(stand_in: StandIn, tipalti: TipaltiClient) -> None:
    await payable(stand_in, tipalti, "p-fine")
    await tipalti.create_payee("p-unpayable")
    odd = await tipalti.create_payee('p-"odd", ünï')
    found = await tipalti.payees(["p-fine", "p-unpayable", 'p-"odd", ünï', "p-none", odd.id, *(f"x-{n}" for n in range(20))])
    assert {name: bool(payee.held_because) for name, payee in found.items()} == {
        "p-fine": False, "p-unpayable": True, 'p-"odd", ünï': True, odd.id: True,
    }  # fmt: skip
    assert "PAYMENT_METHOD_NOT_SET" in found["p-unpayable"].held_because
    with pytest.raises(TipaltiRefused):
        await tipalti.create_payee("p-fine")


async def test_notifications_are_sent_back_to_be_verified(stand_in: StandIn, tipalti: TipaltiClient) -> None:
    assert await tipalti.verified(b'{"id": "ipn_invented"}') is False


async def test_without_an_account_nothing_is_called() -> None:
    async with TipaltiClient(TipaltiSettings()) as off:
        assert not off.on
        with pytest.raises(TipaltiOff):
            await off.payees(["a"])


def test_signatures() -> None:
    def sign(secret: str, stamp: int, body: bytes) -> str:
        return f"{stamp},{hmac.new(secret.encode(), f'{stamp}-'.encode() + body, hashlib.sha256).hexdigest()}"

    body, now_s = b'{"id":"ipn_1"}', 1_800_000_000
    good = sign("old", now_s, body)
    assert check_signature(body, good, ["new", "old"], now_s + TOLERANCE_S)
    assert not check_signature(body, good, ["new", "old"], now_s + TOLERANCE_S + 1)
    assert not check_signature(body + b" ", good, ["old"], now_s)
    for bad in ("", ",", "x,y", good.partition(",")[2], f"{now_s},", f"{now_s + 1},{good.partition(',')[2]}"):
        assert not check_signature(body, bad, ["old"], now_s)
    assert not check_signature(body, good, [], now_s)


@given(st.integers(1, 10**12), st.sampled_from(["usd", "jpy", "kwd"]))
def test_amounts_come_back_exactly(amount: int, currency: str) -> None:
    shown = amount_object(amount, currency)
    assert shown.currency == currency.upper()
    assert shown.minor() == amount


def test_amounts_that_are_none() -> None:
    from decimal import Decimal

    for amount, currency in (("1.005", "USD"), ("1", "XXX"), ("NaN", "USD"), ("Infinity", "USD")):
        with pytest.raises(ValueError, match=r"."):
            AmountObject(Decimal(amount), currency).minor()


ABSENT: list[object] = [None, 0, {}, [1], "", "soon", -1, 10**30, float("nan"), float("inf"), "0001-01-01T00:00:00Z"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1_796_083_200, 1_796_083_200),
        (1_796_083_200_250, 1_796_083_200),
        ("2026-12-01T00:00:00Z", 1_796_083_200),
        ("2026-12-01T01:00:00.25+01:00", 1_796_083_200),
        ("2026-12-01T00:00:00", 1_796_083_200),
        ("2026-12-01", 1_796_083_200),
        *((absent, 0) for absent in ABSENT),
    ],
)
def test_times_are_read_in_whatever_form_they_come(value: object, seconds: int) -> None:
    assert moment_s(value) == seconds


def test_a_time_that_nobody_can_read_spoils_no_payment() -> None:
    money = '{"amount": 1.00, "currency": "USD"}'
    text = f'{{"id": "p", "refCode": "r", "status": "Paid", "amountSubmitted": {money}, "submittedDate": "2026-12-01T00:00:00Z"}}'
    view = msgspec.json.decode(text, type=PaymentObject).view()
    assert (view.submitted_s, view.changed_s, view.amount) == (1_796_083_200, 0, 100)
    assert msgspec.json.decode(f'{{"id": "f", "amount": {money}, "createdDate": "?"}}', type=FundingObject).createdDate == "?"
