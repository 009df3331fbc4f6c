"""How long a caller waits, and where to look afterwards."""

from __future__ import annotations

import re
from urllib.parse import quote

from aiohttp import web

WAIT_DEFAULT_S = 10.0
WAIT_MAX_S = 60.0
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d+(?:\.\d+)?)")


def wait_s(request: web.Request) -> float:
    """How long the caller's `Prefer: wait=<seconds>` lets settlement take (RFC 7240), at most WAIT_MAX_S."""
    match = _WAIT.search(request.headers.get("Prefer", ""))
    return min(float(match[1]), WAIT_MAX_S) if match else WAIT_DEFAULT_S


def location(key: str) -> str:
    """The path of a payment."""
    return f"/v1/payments/{quote(key, safe='')}"
