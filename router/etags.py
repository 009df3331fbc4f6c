"""Entity tags: a thing's version, quoted; and answers that say only that nothing has changed (RFC 9110, 13.1.2)."""

from __future__ import annotations

import re
from collections.abc import Callable

from aiohttp import web

from oncepay.service import Request, json_response
from oncepay.web import WholeResponse

_TAG = re.compile(r'(?:W/)?("[^"]*")')


def etag(version: int) -> str:
    """The entity tag of that version."""
    return f'"{version}"'


def shown(request: Request, version: int, view: Callable[[], object]) -> web.Response:
    """The answer to a GET: 304 when `If-None-Match` names the version, else `view()` with its tag."""
    tag = etag(version)
    asked = request.headers.get("If-None-Match", "").strip()
    if asked == "*" or tag in _TAG.findall(asked):
        return WholeResponse(status=304, headers={"ETag": tag})
    return json_response(view(), headers={"ETag": tag})
