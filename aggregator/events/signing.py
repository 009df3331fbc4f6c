"""Signatures of Standard Webhooks (standardwebhooks.com): HMAC-SHA256 of `<id>.<timestamp>.<body>`, in base64."""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Iterable
from hashlib import sha256

PREFIX = "whsec_"
SECRET_BYTES = 32


def new_secret() -> str:
    """A fresh secret, as libraries of Standard Webhooks take it."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signature(secret: str, event: str, timestamp: int, body: bytes) -> str:
    """`v1,<base64>` for one secret; `timestamp` in seconds since 1970."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = b".".join((event.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.new(key, signed, sha256).digest()).decode()


def headers(secrets_: Iterable[str], event: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of one delivery, with a signature for each secret (several while one is rolled)."""
    signatures = " ".join(signature(secret, event, timestamp, body) for secret in secrets_)
    return {"webhook-id": event, "webhook-timestamp": str(timestamp), "webhook-signature": signatures}
