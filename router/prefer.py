"""What a request says beside its body: the payment it is about, how long its caller waits; and where to look afterwards."""

from __future__ import annotations

import functools
import re
from urllib.parse import quote

from oncepay.errors import InvalidKey, NotFound
from oncepay.keys import check_characters
from oncepay.web import Request

WAIT_DEFAULT_S = 10.0
WAIT_MAX_S = 60.0
_UNQUOTED = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d+(?:\.\d+)?)")


def wait_s(request: Request) -> float:
    """How long the caller's `Prefer: wait=<seconds>` lets settlement take (RFC 7240), at most WAIT_MAX_S."""
    return _wait_s(request.headers.get("Prefer", ""))


@functools.lru_cache(256)
def _wait_s(prefer: str) -> float:
    match = _WAIT.search(prefer)
    return min(float(match[1]), WAIT_MAX_S) if match else WAIT_DEFAULT_S


def key_in_path(request: Request) -> str:
    """The key of the payment that the path names. Raises NotFound for what can be no key, before a shard is asked."""
    key = request.match_info["key"]
    try:
        return check_characters(key)
    except InvalidKey:
        raise NotFound(f"there is no payment {key[:200]!r}") from None


def location(key: str) -> str:
    """The path of a payment."""
    return f"/v1/payments/{key if _UNQUOTED(key) else quote(key, safe='')}"
