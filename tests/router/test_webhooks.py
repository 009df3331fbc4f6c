"""Webhooks that don't say what they could: the effect is committed all the same, or they are not answered 2xx."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from stripe import WebhookSignature

from deploy.local import Cluster
from oncepay.client import Oncepay
from oncepay.keys import slot
from tests.router.conftest import CART, intents_of

pytestmark = pytest.mark.cluster


async def send(http: aiohttp.ClientSession, cluster: Cluster, type_: str, object_: Mapping[str, object]) -> tuple[int, str]:
    """Deliver an event, signed; the answer's status and outcome."""
    body = json.dumps({"id": "evt_x", "type": type_, "created": int(time.time()), "data": {"object": object_}})
    secret = Path(cluster.settings.stripe.webhook_secret_files[0]).read_text().split()[0]
    now = int(time.time())
    signature = WebhookSignature._compute_signature(f"{now}.{body}", secret)
    headers = {"Stripe-Signature": f"t={now},v1={signature}"}
    async with http.post("/v1/webhooks/stripe", data=body.encode(), headers=headers) as answer:
        return answer.status, (await answer.json(content_type=None)).get("outcome", "")


async def test_what_contradicts_is_not_waved_through(
    client: Oncepay, http: aiohttp.ClientSession, cluster: Cluster, fresh: Callable[[], str]
) -> None:
    """A payment that is over here and paid at Stripe: nobody may think that all is well."""
    payment = await client.pay(fresh(), **CART, payment_method="pm_card_visa_chargeDeclined")
    assert payment.status == "failed"
    intent = {"id": payment.payment_intent, "object": "payment_intent", "status": "succeeded", "amount_received": 3397}
    paid = {**intent, "latest_charge": "ch_x", "metadata": {"oncepay_key": payment.key}}
    assert (await send(http, cluster, "payment_intent.succeeded", paid))[0] >= 400


async def test_an_event_without_a_key_whose_range_is_on_no_shard_is_found_through_stripe(
    client: Oncepay, http: aiohttp.ClientSession, cluster: Cluster, stripe: aiohttp.ClientSession, fresh: Callable[[], str]
) -> None:
    """While a range is moved no shard owns it: answered 2xx then, the event would be lost."""
    key = fresh()
    while slot(key) >= 32_768:
        key = fresh()
    payment = await client.pay(key, **CART, payment_method="pm_card_visa")
    assert await intents_of(stripe, key)
    shard = next(each for each in cluster.status().shards if each.name == "s0")
    leader = next(node for node in shard.nodes if node.name == shard.leader)
    postgres = cluster.settings.postgres
    connection = await asyncpg.connect(
        host="127.0.0.1", port=leader.port, user=postgres.superuser, password=postgres.superuser_password,
        database=postgres.database,
    )  # fmt: skip
    try:
        await connection.execute("delete from oncepay.ranges where first = 0")
        dispute = {"id": "dp_x", "object": "dispute", "payment_intent": payment.payment_intent}
        sent = asyncio.create_task(send(http, cluster, "charge.dispute.updated", dispute))
        done, _ = await asyncio.wait({sent}, timeout=1.5)
        assert not done
    finally:
        await connection.execute("insert into oncepay.ranges values (0, 32767, 2)")
        await connection.close()
    assert await sent == (200, "looked")
