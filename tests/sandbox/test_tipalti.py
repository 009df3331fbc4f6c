"""The Tipalti stand-in: tokens, payees, batches, and payments that move with its clock."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import urllib.error
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from sandbox.tipalti.errors import TipaltiError
from sandbox.tipalti.filters import parse
from tests.sandbox.process import WAIT_S, Receiver, StandIn


class Payer:
    """A client of the stand-in with an access token."""

    def __init__(self, stand_in: StandIn, session: aiohttp.ClientSession) -> None:
        self.stand_in = stand_in
        self.session = session
        self.headers: dict[str, str] = {}

    async def sign_in(self) -> None:
        form = {"grant_type": "refresh_token", "client_id": "c", "client_secret": "s", "refresh_token": "rt_test_1"}
        async with self.session.post(f"{self.stand_in.url}/connect/token", data=form) as answer:
            token = await answer.json()
        assert token["token_type"] == "Bearer"
        self.headers = {"Authorization": f"Bearer {token['access_token']}"}

    async def call(self, method: str, path: str, body: object = None, **query: str) -> tuple[int, Any]:
        url = f"{self.stand_in.url}/api/v1{path}"
        async with self.session.request(method, url, json=body, params=query, headers=self.headers) as answer:
            return answer.status, await answer.json()

    async def payee(self, name: str) -> str:
        """A payee whose onboarding is over, when it ever is."""
        status, made = await self.call("POST", "/payees", {"refCode": name, "name": name})
        assert (status, made["isPayable"]) == (201, False)
        self.stand_in.advance(1.1)
        await self.until(f"/payees/{name}", "isPayable", "unpayable" not in name)
        return str(made["id"])

    async def pay(self, payee: str, ref_code: str, amount: object = 12.34) -> dict[str, Any]:
        line = {"payeeId": payee, "amountSubmitted": {"amount": amount, "currency": "USD"}, "refCode": ref_code}
        status, batch = await self.call("POST", "/payment-batches", {"paymentInstructions": [line]})
        assert status == 201
        first: dict[str, Any] = batch["paymentInstructions"][0]
        return first

    async def found(self, ref_code: str) -> list[dict[str, Any]]:
        status, page = await self.call("GET", "/payments", filter=f'refCode=="{ref_code}"')
        assert status == 200
        items: list[dict[str, Any]] = page["items"]
        return items

    async def until(self, path: str, member: str, value: object) -> None:
        """Ask until the member has the value; timers fire within a step of the loop."""
        for _ in range(int(WAIT_S / 0.02)):
            status, found = await self.call("GET", path)
            if status == 401:  # the clock was advanced past the token's end
                await self.sign_in()
            elif found[member] == value:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{path} never had {member} = {value}")


@pytest.fixture
async def payer(shared_tipalti: StandIn) -> AsyncIterator[Payer]:
    async with aiohttp.ClientSession() as session:
        made = Payer(shared_tipalti, session)
        await made.sign_in()
        yield made


async def test_tokens(payer: Payer) -> None:
    payer.stand_in.advance(3_601)
    assert (await payer.call("GET", "/payees"))[0] == 401
    await payer.sign_in()
    assert (await payer.call("GET", "/payees"))[0] == 200
    form = {"grant_type": "refresh_token", "refresh_token": "stolen"}
    async with payer.session.post(f"{payer.stand_in.url}/connect/token", data=form) as answer:
        assert answer.status == 400


async def test_a_payment_goes_from_submitted_to_cleared(payer: Payer) -> None:
    payee = await payer.payee("seller-1")
    line = await payer.pay(payee, "payout-1")
    assert (line["result"], line["refCode"]) == ("OK", "payout-1")
    found = await payer.found("payout-1")
    assert [(item["status"], item["isFinal"], item["id"]) for item in found] == [("Submitted", False, line["paymentId"])]
    assert found[0]["amountSubmitted"] == {"amount": 12.34, "currency": "USD"}
    path = f"/payments/{line['paymentId']}"
    for seconds, status in ((2.1, "Scheduled"), (2.1, "Paid"), (3_601, "Cleared")):
        payer.stand_in.advance(seconds)
        await payer.until(path, "status", status)
    done = (await payer.call("GET", path))[1]
    assert (done["isFinal"], done["payerFees"]["amount"]) == (True, 1)
    assert await payer.found("payout-2") == []


async def test_a_ref_code_pays_once(payer: Payer) -> None:
    payee = await payer.payee("seller-2")
    await payer.pay(payee, "once")
    again = await payer.pay("seller-2", "once", 99)
    assert (again["result"], again["errorCode"], again["paymentId"]) == ("Error", "DuplicateRefCode", None)
    twice = [{"payeeId": payee, "amountSubmitted": 5, "refCode": "same"}] * 2
    _, batch = await payer.call("POST", "/payment-batches", {"paymentInstructions": twice})
    assert [line["result"] for line in batch["paymentInstructions"]] == ["OK", "Error"]
    assert len(await payer.found("once")) == 1
    assert (await payer.found("once"))[0]["amountSubmitted"]["amount"] == 12.34
    _, lines = await payer.call("GET", f"/payment-batches/{batch['id']}/instructions")
    assert lines["items"] == batch["paymentInstructions"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("rejected", ["Scheduled", "Rejected"]),
        ("canceled", ["Scheduled", "Canceled"]),
        ("returned", ["Scheduled", "Paid", "Rejected"]),
        ("internal", ["Deferred (Internal)"]),
        ("riskreview", ["Risk review", "Scheduled", "Paid", "Cleared"]),
    ],
)
async def test_fates(payer: Payer, name: str, path: list[str]) -> None:
    payee = await payer.payee(f"a-{name}-seller")
    line = await payer.pay(payee, f"p-{name}")
    for status in path:
        payer.stand_in.advance(2.1 if status not in ("Cleared", "Rejected") else 3_601)
        if status == "Scheduled" and name == "riskreview":
            payer.stand_in.advance(600)
        await payer.until(f"/payments/{line['paymentId']}", "status", status)


async def test_what_keeps_a_payee_from_being_paid(payer: Payer) -> None:
    _, made = await payer.call("POST", "/payees", {"refCode": "slow-1"})
    assert (made["status"], made["notPayableReasons"]) == (
        "PENDING_ONBOARDING", ["PAYMENT_METHOD_NOT_SET", "ONBOARDING_NOT_COMPLETED"],
    )  # fmt: skip
    payer.stand_in.advance(1.1)
    await payer.until("/payees/slow-1", "isPayable", True)
    shown = payer.stand_in.control("POST", "payee", {"payee": "slow-1", "status": "BLOCKED"})
    assert (shown["isPayable"], shown["notPayableReasons"]) == (False, ["PAYEE_BLOCKED"])
    shown = payer.stand_in.control("POST", "payee", {"payee": "slow-1", "status": "ACTIVE", "taxForm": False})
    assert shown["notPayableReasons"] == ["TAX_FORM_MISSING"]
    assert (await payer.pay("slow-1", "no tax form"))["errorCode"] == "PayeeNotPayable"
    assert payer.stand_in.control("POST", "payee", {"payee": "slow-1", "taxForm": True})["isPayable"] is True


async def test_a_payment_waits_for_funds_and_what_comes_back_is_credited(fresh: Any) -> None:
    async with aiohttp.ClientSession() as session:
        payer = Payer(fresh(name="tipalti"), session)
        await payer.sign_in()
        payer.stand_in.control("PUT", "funding", {"automatic": False})
        payee = await payer.payee("a-returned-seller")
        line = await payer.pay(payee, "waits", 30)
        path = f"/payments/{line['paymentId']}"
        payer.stand_in.advance(2.1)
        await payer.until(path, "status", "Pending funds")
        payer.stand_in.control("POST", "funding", {"amount": 2_999, "currency": "USD"})
        payer.stand_in.advance(61)
        assert (await payer.call("GET", path))[1]["status"] == "Pending funds"
        payer.stand_in.control("POST", "funding", {"amount": 201, "currency": "USD"})
        await payer.until(path, "status", "Scheduled")
        assert payer.stand_in.control("GET", "funding")["balances"] == {"USD": 200}
        payer.stand_in.kill()
        payer.stand_in.start()
        payer.stand_in.advance(2.1)
        await payer.until(path, "status", "Paid")
        payer.stand_in.advance(3_601)
        await payer.sign_in()
        await payer.until(path, "status", "Rejected")
        done = (await payer.call("GET", path))[1]
        assert (done["payerFees"]["amount"], done["reason"]) == (2, "The bank returned the payment.")
        assert payer.stand_in.control("GET", "funding")["balances"] == {"USD": 3_000}
        fundings = (await payer.call("GET", "/fundings"))[1]["items"]
        assert [(item["amount"]["amount"], item["type"]) for item in fundings] == [(29.99, "WIRE"), (2.01, "WIRE")]


async def test_past_the_cut_off_a_payment_is_worked_on_the_next_day(fresh: Any) -> None:
    async with aiohttp.ClientSession() as session:
        payer = Payer(fresh(name="tipalti"), session)
        await payer.sign_in()
        payee = await payer.payee("seller")
        now = payer.stand_in.control("GET", "clock")["now"]
        payer.stand_in.advance(86_400 - now % 86_400 + 20 * 3_600 + 60)  # 20:01
        payer.stand_in.control("PUT", "cutoff", {"at": "20:00"})
        await payer.sign_in()
        line = await payer.pay(payee, "late")
        payer.stand_in.advance(3 * 3_600)
        await payer.sign_in()
        assert (await payer.call("GET", f"/payments/{line['paymentId']}"))[1]["status"] == "Submitted"
        payer.stand_in.advance(3_600)
        await payer.sign_in()
        await payer.until(f"/payments/{line['paymentId']}", "status", "Scheduled")
        for bad in ({"at": "24:00"}, {"at": "8"}):
            with pytest.raises(urllib.error.HTTPError):
                payer.stand_in.control("PUT", "cutoff", bad)


async def test_what_is_refused(payer: Payer) -> None:
    unpayable = await payer.payee("unpayable-1")
    line = await payer.pay(unpayable, "held")
    assert (line["result"], line["errorCode"]) == ("Warning", "PayeeNotPayable")
    assert (await payer.found("held"))[0]["status"] == "Deferred"
    payer.stand_in.control("POST", "payee", {"payee": "unpayable-1", "payable": True})
    assert (await payer.pay(unpayable, "now"))["result"] == "OK"
    assert (await payer.pay("nobody", "x"))["errorCode"] == "UnknownPayee"
    for amount in (0, -1, 1.005, 10**15):
        assert (await payer.pay(unpayable, f"amount {amount}", amount))["errorCode"] == "InvalidAmount"
    many = [{"payeeId": unpayable, "amountSubmitted": 5, "refCode": f"n{number}"} for number in range(251)]
    assert (await payer.call("POST", "/payment-batches", {"paymentInstructions": many}))[0] == 400
    assert (await payer.call("POST", "/payment-batches", {"paymentInstructions": many[:250]}))[0] == 201
    active = f'status=in=("Submitted","Scheduled","Paid");payeeId=="{unpayable}"'
    status, page = await payer.call("GET", "/payments", filter=active, limit="100")
    assert (status, len(page["items"]), page["totalCount"]) == (200, 100, 251)
    rest = (await payer.call("GET", "/payments", filter=active, cursor=page["nextCursor"], limit="250"))[1]
    assert (len(rest["items"]), rest["nextCursor"]) == (151, None)
    assert (await payer.call("GET", "/payments", filter="colour==red"))[0] == 400
    assert (await payer.call("POST", "/payees", {"refCode": "unpayable-1"}))[0] == 409
    assert (await payer.call("POST", "/payees", {"refCode": "x" * 65}))[0] == 400


async def test_lost_answers_and_kill_9(fresh: Any) -> None:
    async with aiohttp.ClientSession() as session:
        payer = Payer(fresh(name="tipalti"), session)
        await payer.sign_in()
        await _lose_and_kill(payer)


async def _lose_and_kill(payer: Payer) -> None:
    payee = await payer.payee("seller-1")
    payer.stand_in.faults(lost_answer=1)
    with pytest.raises(aiohttp.ClientError):
        await payer.pay(payee, "lost")
    payer.stand_in.faults(error_before=1)
    assert (await payer.call("POST", "/payment-batches", {"paymentInstructions": []}))[0] == 500
    payer.stand_in.faults()
    payer.stand_in.kill()
    payer.stand_in.start()
    found = await payer.found("lost")
    assert len(found) == 1
    payer.stand_in.advance(2.1)
    payer.stand_in.advance(2.1)
    await payer.until(f"/payments/{found[0]['id']}", "status", "Paid")


async def test_notifications_are_signed_and_verified(payer: Payer, box: Receiver) -> None:
    payer.stand_in.control("POST", "notifications", {"url": box.url, "secret": "shh"})
    payee = await payer.payee("seller-3")
    await payer.pay(payee, "told")
    await box.until(lambda events: "payment_submitted" in [event["type"] for event in events])
    about = [(event["type"], event["eventData"]["refCode"]) for event in box.events]
    assert ("payee_details_changed", "seller-3") in about
    assert about[-1] == ("payment_submitted", "told")
    body, signature = box.raw[-1]
    timestamp, digest = signature.split(",")
    assert digest == hmac.new(b"shh", timestamp.encode() + b"-" + body, hashlib.sha256).hexdigest()
    for sent, told in ((body, "VERIFIED"), (body + b" ", "INVALID"), (b"{}", "INVALID")):
        async with payer.session.post(f"{payer.stand_in.url}/notif/ipn.aspx", data=sent) as answer:
            assert await answer.text() == told


def test_filters() -> None:
    fields = {"refCode": "ref_code", "status": "status"}
    assert parse('refCode=="a b;c"', fields) == [("ref_code", ["a b;c"])]
    assert parse("refCode==plain", fields) == [("ref_code", ["plain"])]
    assert parse("""status=in=("Paid", 'Cleared') and refCode=="x\\"y" """, fields) == [
        ("status", ["Paid", "Cleared"]),
        ("ref_code", ['x"y']),
    ]
    assert parse("", fields) == []
    for bad in ("refCode", 'refCode="x"', 'colour=="x"', 'refCode=="x" or status=="y"'):
        with pytest.raises(TipaltiError):
            parse(bad, fields)
