"""The router's API document (OpenAPI 3.1). What it says of bodies and answers is made by the code that reads and writes them.

`calls` has a line for each route, `schemas` the shapes, `examples` real values, `parts` the small change.
"""

from __future__ import annotations

from typing import Any

from oncepay.apikeys import SCOPES
from router.openapi.calls import PATHS, TAGS
from router.openapi.schemas import SCHEMAS

ABOUT = """\
Payments that charge once. One idempotency key leads to at most one charge, whatever is retried, doubled or killed: after a lost
answer, a timeout or a 5xx send the same call again **under the same key**.

Amounts are integers in the currency's minor unit (cents; yen have none). Every call needs `Authorization: Bearer <API key>`, and
the key has to have the call's scope. Errors are `application/problem+json` (RFC 9457) with a stable `type`; 429 and 503 bring
`Retry-After`. An `X-Request-Id` that is sent comes back and is in the logs; else the service makes one.
"""


def document() -> dict[str, Any]:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Oncepay router",
            "version": "1",
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": [{"api_key": []}],
        "paths": PATHS,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "api_key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": f"An API key (`oncepay apikeys create`) with scopes: {', '.join(SCOPES)}.",
                }
            },
        },
    }
