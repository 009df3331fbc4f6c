"""A router that has not read etcd yet refuses no key for good."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from oncepay.errors import EtcdUnavailable, InvalidKey, OncepayError
from oncepay.etcd import Etcd
from oncepay.settings import EtcdSettings, Settings
from router.fees import Fees
from router.inflight import InFlight
from router.macs import Macs
from router.payments import PaymentCalls


class Empty:
    """A store without a row."""

    async def get(self, key: str) -> None:
        return None


@pytest.mark.parametrize(("read", "refusal"), [(False, EtcdUnavailable), (True, InvalidKey)])
async def test_a_key_that_can_not_be_checked_yet(read: bool, refusal: type[OncepayError]) -> None:
    macs = Macs(Etcd(EtcdSettings()))
    if read:
        macs._mirror._replace([], 1)
    store: Any = Empty()
    calls = PaymentCalls(Settings(), store, Fees(store), driver=None, in_flight=InFlight(store), macs=macs)  # type: ignore[arg-type]
    caught: list[OncepayError] = []

    async def submit(request: web.Request) -> web.Response:
        try:
            return await calls.submit(request)
        except OncepayError as error:
            caught.append(error)
            raise web.HTTPBadRequest from None

    app = web.Application()
    app.router.add_post("/", submit)
    async with TestClient(TestServer(app)) as http:
        body = {"buyer": "b", "currency": "usd", "items": [{"seller": "a", "amount": 1000}]}
        await http.post("/", json=body, headers={"Idempotency-Key": "ok1_" + "A" * 32})
    assert [type(error) for error in caught] == [refusal]
