"""All parts together: what `up` prepares for the services, and what is left after everything was killed."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse

import pytest

from cli.up import hooks
from deploy.local import Cluster
from deploy.local.etcd import Gateway
from deploy.local.secrets import api_key_record

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def call(cluster: Cluster, service: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, object]:
    """One call to a service of the cluster with its API key."""
    status = cluster.status()
    origin = urllib.parse.urlsplit(status.urls[service])
    connection = http.client.HTTPConnection(origin.hostname or "", origin.port, timeout=40)
    known = {"Authorization": f"Bearer {status.api_key}", "Content-Type": "application/json"}
    sent = {**known, **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_everything_is_healthy_and_has_its_place(cluster: Cluster) -> None:
    for _ in range(60):  # a probe may be slow on a busy machine
        status = cluster.status()
        if status.healthy:
            break
        time.sleep(0.5)
    assert status.healthy
    base = cluster.ports.base
    assert status.urls["router"] == f"http://127.0.0.1:{base}"
    assert status.urls["stripe"] == f"http://127.0.0.1:{base + 10}"
    assert [shard.ranges for shard in status.shards] == [[(0, 32767)], [(32768, 65535)]]
    assert all(process.pid for process in status.processes)


def test_the_stand_in_knows_where_to_send_events(cluster: Cluster) -> None:
    key = cluster.settings.stripe.api_key
    status, listed = call(cluster, "stripe", "GET", "/v1/webhook_endpoints", Authorization=f"Bearer {key}")
    assert status == 200
    assert isinstance(listed, dict)
    assert [each["url"] for each in listed["data"]] == [f"{cluster.status().urls['router']}/v1/webhooks/stripe"]
    assert cluster.layout.stripe_webhook_secret.read_text().startswith("whsec_")
    assert cluster.layout.stripe_webhook_secret.stat().st_mode & 0o777 == 0o600


def test_the_api_key_is_kept_hashed(cluster: Cluster) -> None:
    api_key = cluster.status().api_key
    digest, _ = api_key_record(api_key)
    gateway = Gateway(cluster.settings.etcd.endpoints)
    record = gateway.get(f"/oncepay/apikeys/{digest}")
    assert record is not None
    assert json.loads(record) == {"name": "local", "scopes": ["pay", "read", "refund", "operate"], "rate_limit_per_s": 0}
    assert api_key not in record


@pytest.mark.faults
def test_a_payment_outlives_a_kill_of_everything(cluster: Cluster) -> None:
    code, keys = call(cluster, "keygen", "POST", "/v1/keys", {"count": 1})
    assert code == 201
    assert isinstance(keys, dict)
    key = keys["keys"][0]
    body = {
        "buyer": "b1",
        "currency": "usd",
        "items": [{"seller": "acme", "amount": 1000}],
        "payment_method": "pm_card_visa",
    }
    code, paid = call(cluster, "router", "POST", "/v1/payments", body, Idempotency_Key=key)
    assert code == 201
    assert isinstance(paid, dict)
    assert paid["status"] == "succeeded"
    secret = cluster.layout.stripe_webhook_secret.read_text()
    cluster.kill()
    assert cluster.pids() == []
    cluster.up(hooks=hooks(cluster))
    code, found = call(cluster, "router", "GET", f"/v1/payments/{key}")
    assert code == 200
    assert isinstance(found, dict)
    assert (found["status"], found["payment_intent"]) == ("succeeded", paid["payment_intent"])
    code, again = call(cluster, "router", "POST", "/v1/payments", body, Idempotency_Key=key)
    assert code == 200
    assert isinstance(again, dict)
    assert again["payment_intent"] == paid["payment_intent"]
    assert cluster.layout.stripe_webhook_secret.read_text() == secret
