"""A client of the whole cluster, and plain HTTP to its routers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from deploy.local import Cluster
from deploy.local.status import Status
from oncepay.client import Oncepay


@pytest.fixture
def status(cluster: Cluster) -> Status:
    return cluster.status()


@pytest.fixture
async def client(status: Status) -> AsyncIterator[Oncepay]:
    urls = status.urls
    async with Oncepay(
        router=urls["router"], keygen=urls["keygen"], aggregator=urls.get("aggregator", ""), api_key=status.api_key, deadline_s=60
    ) as opened:
        yield opened


@pytest.fixture
async def http(status: Status) -> AsyncIterator[aiohttp.ClientSession]:
    """Sends to the routers as anyone would."""
    headers = {"Authorization": f"Bearer {status.api_key}"}
    async with aiohttp.ClientSession(status.urls["router"], headers=headers) as session:
        yield session


@pytest.fixture
async def stripe(status: Status) -> AsyncIterator[aiohttp.ClientSession]:
    """Sends to the stand-in for Stripe, as the platform's account."""
    headers = {"Authorization": "Bearer sk_test_witness"}
    async with aiohttp.ClientSession(status.urls["stripe"], headers=headers) as session:
        yield session


@pytest.fixture
def fresh() -> Callable[[], str]:
    """Client-chosen keys that no other test has."""
    prefix = os.urandom(6).hex()
    numbers = iter(range(1_000_000))
    return lambda: f"test-{prefix}-{next(numbers)}"


CART: dict[str, Any] = {
    "buyer": "buyer-1",
    "currency": "usd",
    "items": [{"seller": "records-4", "amount": 1499, "quantity": 2}, {"seller": "platform", "amount": 399}],
}


async def intents_of(stripe: aiohttp.ClientSession, key: str) -> list[dict[str, Any]]:
    """Every PaymentIntent at Stripe whose metadata names the key."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        query = {"limit": "100", **({"starting_after": after} if after else {})}
        async with stripe.get("/v1/payment_intents", params=query) as answer:
            page = await answer.json()
        found += [item for item in page["data"] if item["metadata"].get("oncepay_key") == key]
        if not page["has_more"]:
            return found
        after = page["data"][-1]["id"]
