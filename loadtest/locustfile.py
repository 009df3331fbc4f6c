"""Locust users: buyers who pay (some impatiently), and sellers who look at their revenue.

    make load                      a minute, headless, against the local cluster
    make load WEB=1                with locust's own page
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080

ONCEPAY_KEYGEN, ONCEPAY_AGGREGATOR and ONCEPAY_API_KEY name what isn't the router; `make load` sets them.
"""

from __future__ import annotations

import os
import random
from collections import deque
from typing import Any

from locust import FastHttpUser, between, events, task

from loadtest.purchases import Purchase, purchases

KEYGEN = os.environ.get("ONCEPAY_KEYGEN", "http://127.0.0.1:8081")
AGGREGATOR = os.environ.get("ONCEPAY_AGGREGATOR", "http://127.0.0.1:8082")
API_KEY = os.environ.get("ONCEPAY_API_KEY", "")
KEYS_AT_ONCE = 50
IMPATIENT = 0.1
"""The share of buyers who send again, with the same key, before the first answer can be there."""
SELLERS_PER_BUYER = 20

HEADERS = {"Authorization": f"Bearer {API_KEY}"}
CARTS: list[Purchase] = [purchase for purchase in purchases() if purchase.amount_minor]


class Buyer(FastHttpUser):
    """Takes a key, pays, and now and then sends the same once more; both answers must name the same payment."""

    weight = SELLERS_PER_BUYER
    wait_time = between(0.05, 0.25)
    network_timeout = 60.0
    connection_timeout = 10.0

    def on_start(self) -> None:
        """A supply of keys of one's own."""
        self.keys: deque[str] = deque()

    def key(self) -> str:
        """The next key; the key service is asked for KEYS_AT_ONCE at a time."""
        if not self.keys:
            with self.client.post(
                f"{KEYGEN}/v1/keys", json={"count": KEYS_AT_ONCE}, headers=HEADERS, name="POST /v1/keys", catch_response=True
            ) as answer:
                if answer.status_code != 201:
                    answer.failure(f"{answer.status_code}: {answer.text}")
                    return ""
                self.keys.extend(answer.json()["keys"])
        return self.keys.popleft()

    @task
    def pay(self) -> None:
        """One purchase."""
        key, purchase = self.key(), random.choice(CARTS)
        if not key:
            return
        first = self.submit(key, purchase, wait_s=0 if random.random() < IMPATIENT else 10)
        if first is None or first["status"] in {"succeeded", "failed"}:
            return
        again = self.submit(key, purchase, wait_s=10)
        if again is not None and first.get("payment_intent") not in (None, again.get("payment_intent")):
            events.request.fire(  # type: ignore[no-untyped-call]
                request_type="CHECK",
                name="one key, one payment",
                response_time=0,
                response_length=0,
                exception=AssertionError(f"{key}: {first} and {again}"),
            )

    def submit(self, key: str, purchase: Purchase, wait_s: float) -> dict[str, Any] | None:
        """POST /v1/payments; None after a failure, which locust counts."""
        body = {
            "buyer": f"customer-{purchase.buyer}",
            "currency": "usd",
            "items": purchase.items(),
            "payment_method": purchase.card(seed=1),
        }
        headers = {**HEADERS, "Idempotency-Key": key, "Prefer": f"wait={wait_s}"}
        name = f"POST /v1/payments (wait={wait_s})"
        with self.client.post("/v1/payments", json=body, headers=headers, name=name, catch_response=True) as answer:
            if answer.status_code not in {200, 201, 202}:
                answer.failure(f"{answer.status_code}: {answer.text}")
                return None
            payment: dict[str, Any] = answer.json()
            return payment


class Seller(FastHttpUser):
    """Looks at the revenue by day, and checks that the days sum to the whole."""

    weight = 1
    wait_time = between(0.5, 1.5)

    @task
    def revenue(self) -> None:
        """GET the revenue of a random seller."""
        seller = f"seller-{random.randint(1, 40):02d}"
        with self.client.get(
            f"{AGGREGATOR}/v1/sellers/{seller}/revenue?currency=usd&interval=day",
            headers=HEADERS,
            name="GET /v1/sellers/{id}/revenue",
            catch_response=True,
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text}")
                return
            for row in answer.json()["rows"]:
                if row["gross"] - row["refunded"] - row["disputed"] - row["fees"] != row["net"]:
                    answer.failure(f"{seller}: {row} doesn't add up")
