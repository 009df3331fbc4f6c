"""API keys: who may call what, and how often.

The records live in etcd under `apikeys/<sha256 of the key, hex>`; the key itself is stored nowhere. Each process holds
a mirror of them, so that a request costs one hash and one look-up.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Literal

import msgspec

from oncepay.errors import Forbidden, RateLimited, Unauthorized, Unavailable
from oncepay.logs import get_logger

if TYPE_CHECKING:
    from oncepay.etcd import KeyValue, Mirror

PREFIX = "apikeys/"
KEY_PREFIX = "ok_"

HEADERS_MAX = 10_000
"""Headers whose key is known that a process remembers."""

Scope = Literal["pay", "read", "refund", "operate"]
SCOPES: tuple[Scope, ...] = ("pay", "read", "refund", "operate")

_log = get_logger("apikeys")


class ApiKey(msgspec.Struct, frozen=True):
    """One key's record. `rate_limit_per_s` holds for each process that the key calls; 0 is no limit.

    `slot_rate_limit_per_s` is how often it may submit payments of one slot, in each router: None is the deployment's
    setting, 0 no limit. `created_at_ms` in milliseconds since 1970, 0 where it isn't known. A key with a `seller` is that
    seller's own: only what a route shows of that one seller is open to it.
    """

    name: str
    scopes: tuple[Scope, ...] = SCOPES
    rate_limit_per_s: float = 0.0
    slot_rate_limit_per_s: float | None = None
    created_at_ms: int = 0
    seller: str = ""


NO_AUTH = ApiKey("anonymous")
"""Who calls when the deployment has turned authorization off."""


def new_key() -> str:
    """A fresh API key of 256 random bits. Store only its digest."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """The name of the key's record under PREFIX."""
    return hashlib.sha256(key.encode()).hexdigest()


class _Entry:
    """A key with its token bucket, which holds one second's worth (at least one)."""

    __slots__ = ("filled_at", "key", "scopes", "tokens")

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self.scopes = frozenset(key.scopes)
        self.tokens = max(key.rate_limit_per_s, 1.0)
        self.filled_at = time.monotonic()

    def take(self) -> None:
        """RateLimited when the bucket is empty."""
        rate = self.key.rate_limit_per_s
        now = time.monotonic()
        tokens = min(self.tokens + (now - self.filled_at) * rate, max(rate, 1.0))
        self.filled_at = now
        if tokens < 1.0:
            self.tokens = tokens
            retry_after_s = max(1, round((1.0 - tokens) / rate))
            raise RateLimited(f"{self.key.name} may call {rate:g} times a second", retry_after_s=retry_after_s)
        self.tokens = tokens - 1.0


class Authenticator:
    """Checks `Authorization: Bearer <key>` against the mirrored records."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._entries: dict[str, _Entry] = {}
        self._headers: dict[str, _Entry] = {}
        mirror.on_change(self._changed)

    def check(self, authorization: str | None, scope: Scope) -> ApiKey:
        """Who calls. Unauthorized, Forbidden, RateLimited; Unavailable while the records couldn't be read yet."""
        entry = self._headers.get(authorization or "") or self._find(authorization)
        if scope not in entry.scopes:
            raise Forbidden(f"{entry.key.name} lacks the scope {scope}")
        if entry.key.rate_limit_per_s > 0:
            entry.take()
        return entry.key

    def _find(self, authorization: str | None) -> _Entry:
        """By the digest. The header is remembered until any record changes, so that the next request costs no hash."""
        if authorization is None or not authorization.startswith("Bearer "):
            raise Unauthorized("send Authorization: Bearer <API key>")
        entry = self._entries.get(hashlib.sha256(authorization[7:].encode("utf-8", "surrogateescape")).hexdigest())
        if entry is None:
            if not self._mirror.synced:
                raise Unavailable("the API keys could not be read yet")
            raise Unauthorized
        if len(self._headers) < HEADERS_MAX:
            self._headers[authorization] = entry
        return entry

    def _changed(self, name: str, kv: KeyValue | None) -> None:
        self._headers.clear()
        if kv is None:
            self._entries.pop(name, None)
            return
        try:
            key = msgspec.json.decode(kv.value, type=ApiKey)
        except msgspec.DecodeError as error:
            _log.error("API key record can't be read", record=name, reason=str(error))
            self._entries.pop(name, None)
            return
        entry = self._entries.get(name)
        if entry is None or entry.key != key:
            self._entries[name] = _Entry(key)
