"""Which answers of Stripe's are a no, and which leave the outcome unknown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from oncepay.errors import OncepayError, StripeUnavailable
from oncepay.settings import StripeSettings
from oncepay.stripe_client import Declined, StripeGateway, StripeRefused, StripeStored
from oncepay.stripe_http import form


def error(type_: str, code: str = "") -> bytes:
    return json.dumps({"error": {"type": type_, "code": code, "message": "no"}}).encode()


ANSWERS: dict[str, tuple[int, bytes, dict[str, str], type[OncepayError]]] = {
    "a refusal": (400, error("invalid_request_error", "parameter_unknown"), {}, StripeRefused),
    "nothing there": (404, error("invalid_request_error", "resource_missing"), {}, StripeRefused),
    "a decline": (402, error("card_error", "card_declined"), {}, Declined),
    "a decline that was stored": (402, error("card_error", "card_declined"), {"Idempotent-Replayed": "true"}, Declined),
    "a key that was rolled": (401, error("invalid_request_error"), {}, StripeUnavailable),
    "a key that may not": (403, error("invalid_request_error"), {}, StripeUnavailable),
    "too many requests": (429, error("invalid_request_error", "rate_limit"), {"Stripe-Should-Retry": "false"}, StripeUnavailable),
    "still running": (
        409,
        error("idempotency_error", "idempotency_key_in_use"),
        {"Stripe-Should-Retry": "false"},
        StripeUnavailable,
    ),
    "an error": (500, error("api_error"), {"Stripe-Should-Retry": "false"}, StripeUnavailable),
    "an error that was stored": (
        500,
        error("api_error"),
        {"Stripe-Should-Retry": "false", "Idempotent-Replayed": "true"},
        StripeStored,
    ),
    "other parameters under the key": (400, error("idempotency_error"), {}, StripeStored),
    "a wall in between": (403, b"<html>Forbidden</html>", {}, StripeUnavailable),
    "a wall that lies": (400, b"<html>Bad Request</html>", {}, StripeUnavailable),
    "a page for an answer": (200, b"<html>Welcome</html>", {}, StripeUnavailable),
    "half an answer": (200, b'{"id": "pi_1", "status": ', {}, StripeUnavailable),
    "another object": (200, b'{"object": "list"}', {}, StripeUnavailable),
}


@pytest.fixture
async def gateway(request: pytest.FixtureRequest) -> AsyncIterator[StripeGateway]:
    status, body, headers, _ = ANSWERS[request.node.callspec.params["what"]]

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings = StripeSettings(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", api_key="sk_test_x")
    async with StripeGateway(settings) as opened:
        yield opened
    await runner.cleanup()


@pytest.mark.parametrize("what", ANSWERS)
async def test_what_an_answer_means(gateway: StripeGateway, what: str) -> None:
    with pytest.raises(OncepayError) as caught:
        await gateway.confirm("pi_1", {"payment_method": "pm_card_visa"}, "key", StripeSettings().api_version)
    assert type(caught.value) is ANSWERS[what][3]


def test_a_form_is_as_stripe_reads_it() -> None:
    parameters = {
        "amount": 4201,
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "metadata": {"oncepay_key": "ok1_a-B~.", "naïve [x]": "a b&c=d/é"},
        "expand": ["latest_charge.balance_transaction"],
        "left_out": None,
        "empty": "",
    }
    assert form(parameters) == (
        "amount=4201&automatic_payment_methods%5Benabled%5D=true&automatic_payment_methods%5Ballow_redirects%5D=never"
        "&metadata%5Boncepay_key%5D=ok1_a-B~.&metadata%5Bna%C3%AFve+%5Bx%5D%5D=a+b%26c%3Dd%2F%C3%A9"
        "&expand%5B0%5D=latest_charge.balance_transaction&empty="
    )


@pytest.mark.parametrize("word", ["a b", "a\r\nX-Other: 1", "é", "a\x00"])
async def test_nothing_can_be_smuggled_into_a_request(word: str) -> None:
    async with StripeGateway(StripeSettings(base_url="http://127.0.0.1:1", api_key="sk_test_x")) as gateway:
        with pytest.raises(ValueError, match="can't stand"):
            await gateway.confirm(word, {}, "key", "2026-01-01")
        with pytest.raises(ValueError, match="can't stand"):
            await gateway.confirm("pi_1", {}, word, "2026-01-01")
