"""The key service's API document (OpenAPI 3.1)."""

from __future__ import annotations

from typing import Any

import msgspec

from keygen.pool import PoolState
from keygen.slots import NARROWEST_SLOTS
from oncepay.keys import SLOTS

_PROBLEM = {
    "description": "A problem document (RFC 9457) with a stable `type`.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


def document(most: int) -> dict[str, Any]:
    """The document; `most` is how many keys one request may ask for."""
    (state,), components = msgspec.json.schema_components([PoolState], ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Oncepay key service", "version": "1", "description": "Issues idempotency keys, each once."},
        "security": [{"api_key": []}],
        "paths": {
            "/v1/keys": {
                "post": {
                    "operationId": "issueKeys",
                    "summary": "Issue keys",
                    "description": "Needs the scope `pay`. Keys of an answer that got lost are simply never used.",
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/IssueRequest"}}},
                    },
                    "responses": {
                        "201": {
                            "description": "As many keys as were asked for.",
                            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Issued"}}},
                        },
                        **{status: _PROBLEM for status in ("400", "401", "403", "413", "422", "429")},
                        "503": _PROBLEM | {"headers": {"Retry-After": {"schema": {"type": "integer"}}}},
                    },
                }
            },
            "/v1/keys/pool": {
                "get": {
                    "operationId": "getPool",
                    "summary": "The pool as this replica sees it",
                    "description": "Needs the scope `operate`.",
                    "responses": {
                        "200": {"description": "Counts of blocks and keys.", "content": {"application/json": {"schema": state}}},
                        **{status: _PROBLEM for status in ("401", "403", "429", "503")},
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                **components,
                "IssueRequest": {
                    "type": "object",
                    "properties": {
                        "count": {"type": "integer", "minimum": 1, "maximum": most},
                        "slots": {
                            "type": ["array", "null"],
                            "description": f"First and last slot that the keys may have: at least {NARROWEST_SLOTS} slots.",
                            "prefixItems": [{"type": "integer", "minimum": 0, "maximum": SLOTS - 1}] * 2,
                            "minItems": 2,
                            "maxItems": 2,
                        },
                    },
                    "required": ["count"],
                    "additionalProperties": False,
                },
                "Issued": {
                    "type": "object",
                    "properties": {"keys": {"type": "array", "items": {"type": "string", "pattern": "^ok1_[A-Za-z0-9_-]{32}$"}}},
                    "required": ["keys"],
                },
                "Problem": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "format": "uri"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "field": {"type": "string"},
                    },
                    "required": ["type", "title", "status"],
                },
            },
        },
    }
