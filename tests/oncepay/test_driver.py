"""The driver against the stand-in for Stripe, whatever was left behind and however Stripe answers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
import stripe
from aiohttp import web
from msgspec.structs import replace
from yarl import URL

from oncepay.cart import Item, Share
from oncepay.driver import Driver, step_key
from oncepay.payment import Key, Payment, Status, Terms
from oncepay.settings import StripeSettings
from oncepay.stripe_client import StripeGateway, StripeRefused
from oncepay.stripe_objects import RefundList
from oncepay.transition import AttemptStarted, CaptureRequested, Event, IntentCreated, RefundRefused, RefundRequested, move
from tests.sandbox.process import KEY, StandIn, stripe_client

DECLINED = "pm_card_visa_chargeDeclined"
NEEDS_3DS = "pm_card_authenticationRequired"
DAY_MS = 86_400_000


class Rows:
    """A store of one row in memory, which moves as the real one does."""

    def __init__(self, payment: Payment) -> None:
        self.row = payment
        self.balances: dict[str, int] = {}

    async def get(self, key: str) -> Payment | None:
        return self.row

    async def apply(self, payment: Payment, *events: Event, event: str) -> Payment:
        after = self.row
        for item in events:
            moved = move(after, item)
            after = moved.payment
            for posting in (posting for entry in moved.entries for posting in entry.postings):
                self.balances[posting.account] = self.balances.get(posting.account, 0) + posting.amount_minor
        if after is self.row:
            return payment if payment.version == self.row.version else self.row
        self.row = replace(after, updated_at_ms=time.time_ns() // 1_000_000)
        return self.row


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    started = StandIn("stripe").start()
    yield started
    started.stop()


@pytest.fixture
async def gateway(stand_in: StandIn) -> AsyncIterator[StripeGateway]:
    stand_in.faults()
    async with StripeGateway(StripeSettings(base_url=stand_in.url, api_key=KEY)) as opened:
        yield opened


@pytest.fixture
async def client(stand_in: StandIn) -> AsyncIterator[stripe.StripeClient]:
    """Somebody else with the account's key: the Dashboard."""
    async with stripe_client(stand_in.url) as made:
        yield made


def payment(key: str, **terms: object) -> Payment:
    now_ms = time.time_ns() // 1_000_000
    made = Terms(
        items=(Item("ada", 1000),), shares=(Share("ada", 1000, 100),), api_version=StripeSettings().api_version, **terms  # type: ignore[arg-type]
    )  # fmt: skip
    return Payment(Key(key), Status.CREATED, 1, "b", "usd", 1000, made, b"f", now_ms, now_ms, now_ms + DAY_MS)


async def confirming(gateway: StripeGateway, rows: Rows, method: str) -> Payment:
    """A row whose first attempt is committed; nobody has called confirm."""
    view = await gateway.create({"amount": 1000, "currency": "usd", "metadata": {"oncepay_key": rows.row.key}},
                                step_key(rows.row.key, "create"), rows.row.terms.api_version)  # fmt: skip
    return await rows.apply(rows.row, IntentCreated(view.id, view.client_secret), AttemptStarted(1, method), event="test")


async def test_what_stripe_refuses_to_create_has_failed(gateway: StripeGateway) -> None:
    rows = Rows(payment("refused", customer="cus_nobody", payment_method="pm_card_visa"))
    after = await Driver(rows, gateway, fee_back=True).drive(rows.row)
    assert after.status is Status.FAILED
    assert after.progress.failure is not None
    assert (after.progress.failure.code, after.intent) == ("resource_missing", "")


async def test_a_decline_without_a_charge_after_one_with_a_charge(gateway: StripeGateway) -> None:
    """Off session a card that wants authentication is declined without a charge of its own."""
    rows = Rows(payment("no-charge", payment_method=DECLINED, on_decline="retry", off_session=True))
    driver = Driver(rows, gateway, fee_back=True)
    after = await driver.drive(rows.row)
    assert (after.status, len(after.progress.finished_charges)) == (Status.REQUIRES_PAYMENT_METHOD, 1)
    started = await rows.apply(after, AttemptStarted(2, NEEDS_3DS), event="test")
    after = await driver.drive(started)
    assert after.status is Status.REQUIRES_PAYMENT_METHOD
    assert after.progress.failure is not None
    assert after.progress.failure.code == "authentication_required"


async def test_a_buyer_who_fails_to_authenticate_may_try_another_card(gateway: StripeGateway, stand_in: StandIn) -> None:
    rows = Rows(payment("no-3ds", payment_method=DECLINED, on_decline="retry"))
    driver = Driver(rows, gateway, fee_back=True)
    started = await rows.apply(await driver.drive(rows.row), AttemptStarted(2, NEEDS_3DS), event="test")
    waiting = await driver.drive(started)
    assert waiting.status is Status.REQUIRES_ACTION
    async with aiohttp.ClientSession() as http:
        async with http.post(waiting.progress.next_action_url, data={"outcome": "fail"}, allow_redirects=False) as answer:
            assert answer.status < 400
    looked = await driver.look(rows.row.key, "test")
    assert looked is not None
    assert looked.status is Status.REQUIRES_PAYMENT_METHOD
    paid = await driver.drive(await rows.apply(looked, AttemptStarted(3, "pm_card_visa"), event="test"))
    assert paid.status is Status.SUCCEEDED


async def test_an_attempt_whose_key_stripe_has_forgotten_is_looked_for(
    gateway: StripeGateway, client: stripe.StripeClient
) -> None:
    """A confirm under a key that is gone would be a second try at the buyer's card."""
    rows = Rows(payment("forgotten", on_decline="retry"))
    row = await confirming(gateway, rows, DECLINED)
    with pytest.raises(stripe.CardError):
        await client.v1.payment_intents.confirm_async(row.intent, {"payment_method": DECLINED})
    rows.row = replace(row, updated_at_ms=row.updated_at_ms - 2 * DAY_MS)
    after = await Driver(rows, gateway, fee_back=True).drive(rows.row)
    assert after.status is Status.REQUIRES_PAYMENT_METHOD
    charges = await client.v1.charges.list_async({"payment_intent": row.intent})
    assert len(charges.data) == 1


async def test_other_parameters_under_the_same_key_are_no_decline(gateway: StripeGateway, client: stripe.StripeClient) -> None:
    """Another version of this code sent the confirm with other parameters, and its answer was lost."""
    rows = Rows(payment("other-parameters", payment_method="pm_card_visa", on_decline="fail"))
    row = await confirming(gateway, rows, "pm_card_visa")
    await client.v1.payment_intents.confirm_async(
        row.intent,
        {"payment_method": "pm_card_visa", "return_url": "https://shop.example"},
        {"idempotency_key": step_key(row.key, "confirm:1")},
    )
    after = await Driver(rows, gateway, fee_back=True).drive(row)
    assert after.status is Status.SUCCEEDED
    assert after.progress.attempt == 1


async def succeeded(gateway: StripeGateway, key: str) -> tuple[Rows, Driver]:
    rows = Rows(payment(key, payment_method="pm_card_visa"))
    driver = Driver(rows, gateway, fee_back=True)
    assert (await driver.drive(rows.row)).status is Status.SUCCEEDED
    return rows, driver


async def test_a_refund_that_the_dashboard_came_before(gateway: StripeGateway, client: stripe.StripeClient) -> None:
    """The whole was refunded at Stripe while a refund that was asked for here had not been sent: its router had died."""
    rows, driver = await succeeded(gateway, "came-before")
    asked = RefundRequested("r1", (Share("ada", 600, 60),), "", rows.row.created_at_ms)
    await rows.apply(rows.row, asked, event="test")
    made = await client.v1.refunds.create_async({"payment_intent": rows.row.intent})
    after = await driver.drive_on(rows.row.key)
    assert after is not None
    assert {r.key: r.status for r in after.progress.refunds} == {"r1": "failed", f"stripe:{made.id}": "succeeded"}
    assert after.amount_refunded == 1000


@pytest.mark.parametrize("fee_back", [True, False])
async def test_a_refund_made_at_stripe_gives_the_fee_back_where_refunds_do(
    gateway: StripeGateway, client: stripe.StripeClient, fee_back: bool
) -> None:
    rows, _ = await succeeded(gateway, f"adopted-{fee_back}")
    await client.v1.refunds.create_async({"payment_intent": rows.row.intent, "amount": 500})
    after = await Driver(rows, gateway, fee_back=fee_back).look_after(rows.row.key, "refunds", "test")
    assert after is not None
    assert after.amount_refunded == 500
    fees, payable = (-50, -450) if fee_back else (-100, -400)
    assert (rows.balances["platform:fees"], rows.balances["seller:ada:payable"]) == (fees, payable)


async def test_a_refund_that_a_restore_has_lost_keeps_its_key(gateway: StripeGateway, client: stripe.StripeClient) -> None:
    """Adopted under another, it would be made again for a buyer who asks again with the key that it had."""
    rows, driver = await succeeded(gateway, "lost-refund")
    restored = rows.row
    asked = RefundRequested("r1", (Share("ada", 300, 30),), "", rows.row.created_at_ms)
    await driver.drive(await rows.apply(rows.row, asked, event="test"))
    rows.row = restored
    adopted = await driver.look_after(rows.row.key, "refunds", "test")
    assert adopted is not None
    assert [(r.key, r.status, r.amount) for r in adopted.progress.refunds] == [("r1", "succeeded", 300)]
    after = await driver.drive(await rows.apply(adopted, asked, event="test"))
    assert after.amount_refunded == 300
    assert not after.open_work
    assert len((await client.v1.refunds.list_async({"payment_intent": after.intent})).data) == 1


@pytest.mark.parametrize("name", ["stripe:re_1", " r1", "refund:x"])
async def test_a_refund_of_the_dashboard_has_no_key_of_ours(
    gateway: StripeGateway, client: stripe.StripeClient, name: str
) -> None:
    """Whatever somebody writes there: only what a client could have sent is a key."""
    rows, driver = await succeeded(gateway, f"no-key-{name}")
    made = await client.v1.refunds.create_async(
        {"payment_intent": rows.row.intent, "amount": 300, "metadata": {"oncepay_refund": name}}
    )
    adopted = await driver.look_after(rows.row.key, "refunds", "test")
    assert adopted is not None
    assert [r.key for r in adopted.progress.refunds] == [f"stripe:{made.id}"]


async def test_a_refund_whose_key_stripe_has_forgotten_is_looked_for(gateway: StripeGateway, client: stripe.StripeClient) -> None:
    """It was made, its answer was lost, and no one drove it on for two days: a second one must not be made."""
    rows, driver = await succeeded(gateway, "forgotten-refund")
    asked = RefundRequested("r1", (Share("ada", 300, 30),), "", rows.row.created_at_ms - 2 * DAY_MS)
    row = await rows.apply(rows.row, asked, event="test")
    await client.v1.refunds.create_async(
        {"payment_intent": row.intent, "amount": 300, "metadata": {"oncepay_key": row.key, "oncepay_refund": "r1"}}
    )
    after = await driver.drive(row)
    assert [(r.key, r.status) for r in after.progress.refunds] == [("r1", "succeeded")]
    assert len((await client.v1.refunds.list_async({"payment_intent": row.intent})).data) == 1


async def test_a_refund_that_was_given_up_and_made_all_the_same(gateway: StripeGateway, client: stripe.StripeClient) -> None:
    """A process froze before it sent the refund, others gave it up meanwhile, and then it woke up."""
    rows, driver = await succeeded(gateway, "given-up-refund")
    asked = RefundRequested("r1", (Share("ada", 300, 30),), "", rows.row.created_at_ms)
    row = await rows.apply(rows.row, asked, RefundRefused("r1", "processing_error"), event="test")
    assert row.amount_refunded == 0
    late = await client.v1.refunds.create_async(
        {"payment_intent": row.intent, "amount": 300, "metadata": {"oncepay_key": row.key, "oncepay_refund": "r1"}}
    )
    after = await driver.look_after(row.key, "refunds", "test")
    assert after is not None
    assert {r.key: r.status for r in after.progress.refunds} == {"r1": "failed", f"stripe:{late.id}": "succeeded"}
    assert after.amount_refunded == 300
    assert sum(amount for account, amount in rows.balances.items() if account == "refunds:held") == 0


@asynccontextmanager
async def declining(stand_in: StandIn, path: str, field: str) -> AsyncIterator[StripeGateway]:
    """The stand-in behind a door that answers 402, with Stripe's error body, to what is posted to `path` with `field` in it."""

    async def answer(request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.method == "POST" and request.path.endswith(path) and field.encode() in body:
            error = {"type": "card_error", "code": "expired_or_canceled_card", "message": "The card's bank says no."}
            return web.json_response({"error": error}, status=402)
        headers = {name: value for name, value in request.headers.items() if name not in {"Host", "Content-Length"}}
        url = URL(stand_in.url + request.raw_path, encoded=True)
        async with http.request(request.method, url, data=body, headers=headers) as found:
            return web.Response(status=found.status, body=await found.read(), content_type="application/json")

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=1.0)
    async with aiohttp.ClientSession() as http:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            settings = StripeSettings(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", api_key=KEY)
            async with StripeGateway(settings) as opened:
                yield opened
        finally:
            await runner.cleanup()


async def test_a_refund_that_is_declined_has_failed_and_holds_up_no_other(gateway: StripeGateway, stand_in: StandIn) -> None:
    rows, _ = await succeeded(gateway, "declined-refund")
    asked = [RefundRequested(f"r{n}", (Share("ada", n * 100, n * 10),), "", rows.row.created_at_ms) for n in (3, 2)]
    row = await rows.apply(rows.row, *asked, event="test")
    async with declining(stand_in, "/v1/refunds", "amount=300") as declines:
        after = await Driver(rows, declines, fee_back=True).drive(row)
    assert [(r.key, r.status, r.failure) for r in after.progress.refunds] == [
        ("r3", "failed", "expired_or_canceled_card"),
        ("r2", "succeeded", ""),
    ]
    assert after.amount_refunded == 200
    assert rows.balances["refunds:held"] == 0


async def test_a_refund_that_was_made_before_a_decline_is_found(
    gateway: StripeGateway, stand_in: StandIn, client: stripe.StripeClient
) -> None:
    rows, _ = await succeeded(gateway, "made-and-declined")
    asked = RefundRequested("r1", (Share("ada", 300, 30),), "", rows.row.created_at_ms)
    row = await rows.apply(rows.row, asked, event="test")
    await client.v1.refunds.create_async(
        {"payment_intent": row.intent, "amount": 300, "metadata": {"oncepay_key": row.key, "oncepay_refund": "r1"}}
    )
    async with declining(stand_in, "/v1/refunds", "amount=300") as declines:
        after = await Driver(rows, declines, fee_back=True).drive(row)
    assert [(r.key, r.status) for r in after.progress.refunds] == [("r1", "succeeded")]


async def test_a_capture_that_is_declined_is_over_and_may_be_asked_for_again(gateway: StripeGateway, stand_in: StandIn) -> None:
    rows = Rows(payment("declined-capture", payment_method="pm_card_visa", capture_method="manual"))
    driver = Driver(rows, gateway, fee_back=True)
    assert (await driver.drive(rows.row)).status is Status.REQUIRES_CAPTURE
    asked = CaptureRequested(1000, (Share("ada", 1000, 100),))
    row = await rows.apply(rows.row, asked, event="test")
    async with declining(stand_in, "/capture", "amount_to_capture") as declines:
        after = await Driver(rows, declines, fee_back=True).drive(row)
    assert (after.status, after.progress.capture, after.settled) == (Status.REQUIRES_CAPTURE, None, True)
    after = await driver.drive(await rows.apply(after, asked, event="test"))
    assert (after.status, after.amount_captured, after.progress.captures) == (Status.SUCCEEDED, 1000, 2)


async def test_an_intent_that_the_account_does_not_have_is_given_up_only_past_its_time(
    gateway: StripeGateway, client: stripe.StripeClient
) -> None:
    """Until then it may be Stripe's mistake, and past it nobody confirms it any more."""
    rows = Rows(payment("gone"))
    driver = Driver(rows, gateway, fee_back=True)
    rows.row = replace(await driver.drive(rows.row), intent="pi_nobody_knows")
    with pytest.raises(StripeRefused):
        await driver.drive_on(rows.row.key)
    assert rows.row.status is Status.ATTEMPTED
    await client.v1.payment_intents.create_async({"amount": 1000, "currency": "usd", "metadata": {"oncepay_key": "another"}})
    after = await driver.drive_on(rows.row.key, now_ms=rows.row.expires_at_ms + 1)
    assert after is not None
    assert after.status is Status.CANCELED


async def test_an_account_that_knows_none_of_ours_says_nothing_of_what_is_gone() -> None:
    """The key of another account was put into the settings: then nothing is there, and nothing may be given up for it."""
    other = StandIn("stripe").start()
    try:
        async with StripeGateway(StripeSettings(base_url=other.url, api_key=KEY)) as gateway:
            row = replace(payment("elsewhere"), status=Status.CANCELING, version=3, intent="pi_elsewhere")
            rows = Rows(row)
            with pytest.raises(StripeRefused):
                await Driver(rows, gateway, fee_back=True).drive(row)
            assert rows.row.status is Status.CANCELING
    finally:
        other.stop()


def test_a_status_of_a_refund_that_is_new_at_stripe_leaves_the_list_readable() -> None:
    body = b'{"data": [{"id": "re_1", "amount": 5, "status": "on_the_moon"}, {"id": "re_2", "amount": 5, "status": "failed"}]}'
    views = [item.view() for item in msgspec.json.decode(body, type=RefundList).data]
    assert [view.status for view in views] == ["pending", "failed"]
