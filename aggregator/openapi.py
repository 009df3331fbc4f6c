"""The API document (OpenAPI 3.1), made from the types that the calls answer with."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregator.params import LIMIT_DEFAULT, LIMIT_MAX
from aggregator.payout_docs import PAYOUT_SCHEMAS, payout_paths
from aggregator.views import History, Orders, PositionsView, Revenue, SellerBalance, Sellers, Totals
from oncepay import __doc__ as _about

_SCHEMAS = (Revenue, SellerBalance, Orders, History, Sellers, Totals, PositionsView)


class Problem(msgspec.Struct):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = ""
    field: str = ""


def _parameter(name: str, text: str, schema: dict[str, Any], *, where: str = "query", required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "description": text, "schema": schema}


_STRING = {"type": "string"}
_DAY = {"type": "string", "format": "date"}
_MIN_POSITION = _parameter(
    "min_position", "`shard:X/Y,…`: wait (up to 30 s, then 503) until the answer is at or past these positions.", _STRING
)
_CURRENCY = _parameter("currency", "ISO 4217 code in lower case.", _STRING)
_LIMIT = _parameter("limit", "Rows a page.", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT})
_SELLER = _parameter("seller", "The seller's id.", _STRING, where="path", required=True)
_BUYER = _parameter("buyer", "The buyer's id.", _STRING, where="path", required=True)
_PAYMENT = _parameter("payment", "The payment's key.", _STRING, where="path", required=True)
_REVENUE = [
    _SELLER,
    _CURRENCY | {"required": True},
    _parameter("from", "First day (UTC), inclusive; all by default.", _DAY),
    _parameter("to", "Last day (UTC), inclusive; all by default.", _DAY),
    _parameter(
        "interval", "A row a day, week (from Monday) or month; one row for the whole by default.",
        {"type": "string", "enum": ["day", "week", "month"]},
    ),
]  # fmt: skip

_CALLS: dict[str, tuple[str, type, list[dict[str, Any]]]] = {
    "/v1/sellers/{seller}/revenue": ("A seller's revenue, by the day of each ledger entry.", Revenue, _REVENUE),
    "/v1/sellers/{seller}/balance": ("What a seller is owed.", SellerBalance, [_SELLER]),
    "/v1/buyers/{buyer}/orders": (
        "A buyer's payments, newest first.",
        Orders,
        [_BUYER, _parameter("cursor", "What the page before gave.", _STRING), _LIMIT],
    ),
    "/v1/payments/{payment}/history": (
        "A payment's versions: what made each, who, when, and where in the log.",
        History,
        [_PAYMENT],
    ),
    "/v1/sellers": ("The sellers with the most gross.", Sellers, [_CURRENCY, _LIMIT]),
    "/v1/totals": ("The books as a whole.", Totals, []),
    "/v1/positions": ("How far each shard's feed is applied.", PositionsView, []),
}
PATHS = tuple(_CALLS)


def _operation(text: str, answer: type, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    names = {401: "No API key, or an unknown one", 403: "The key lacks the scope `read`", 422: "A parameter can't be used"}
    names[503] = "Not now; `Retry-After` says when"
    responses: dict[str, Any] = {str(status): {"description": name, "content": problem} for status, name in names.items()}
    schema = {"$ref": f"#/components/schemas/{answer.__name__}"}
    responses["200"] = {"description": (answer.__doc__ or "").strip(), "content": {"application/json": {"schema": schema}}}
    return {"summary": text, "parameters": [*parameters, _MIN_POSITION], "responses": dict(sorted(responses.items()))}


def document() -> dict[str, Any]:
    """The document that `/openapi.json` answers."""
    _, components = msgspec.json.schema_components(
        (*_SCHEMAS, *PAYOUT_SCHEMAS, Problem), ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Oncepay aggregator", "version": "1", "description": (_about or "").strip()},
        "security": [{"key": []}],
        "paths": {path: {"get": _operation(*call)} for path, call in _CALLS.items()} | payout_paths(),
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
