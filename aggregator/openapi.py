"""The API document (OpenAPI 3.1), made from the types that the calls answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from aggregator.events.calls import (
    DeadLetters,
    Deliveries,
    EndpointChange,
    EndpointList,
    EndpointView,
    NewEndpoint,
    Replay,
    Replayed,
)
from aggregator.params import LIMIT_DEFAULT, LIMIT_MAX, ROWS_MAX
from aggregator.payout_docs import PAYOUT_SCHEMAS, payout_paths
from aggregator.reconcile.calls import Asked, Differences, Reconciliation, Reconciliations
from aggregator.status import AggregatorStatus
from aggregator.views import (
    History,
    Orders,
    PositionsView,
    Profit,
    Revenue,
    SellerBalance,
    Sellers,
    Statement,
    Totals,
    TrialBalance,
)
from oncepay import __doc__ as _about


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
_ROWS = _parameter("limit", "Rows a page.", {"type": "integer", "minimum": 1, "maximum": ROWS_MAX, "default": ROWS_MAX})
_CURSOR = _parameter("cursor", "What the page before gave.", _STRING)
_DAYS = [
    _parameter("from", "First day, inclusive; all by default.", _DAY),
    _parameter("to", "Last day, inclusive; all by default.", _DAY),
]
_ZONE = _parameter("timezone", "Whose days these are: an IANA name like Europe/Berlin; UTC by default.", _STRING)
_INTERVAL = _parameter(
    "interval",
    "A row a day, week (from Monday) or month; one row for the whole by default.",
    {"type": "string", "enum": ["day", "week", "month"]},
)
_AT = _parameter("at", "`shard:X/Y,…`: the books as they were at exactly these positions; now by default.", _STRING)
_NEEDED = _CURRENCY | {"required": True}
_CSV = "text/csv"

_CALLS: dict[str, tuple[str, type | str, list[dict[str, Any]]]] = {
    "/v1/sellers/{seller}/revenue": (
        "A seller's revenue, by the day of each ledger entry.",
        Revenue,
        [_SELLER, _NEEDED, *_DAYS, _INTERVAL, _ZONE, _ROWS, _CURSOR],
    ),
    "/v1/sellers/{seller}/balance": ("What a seller is owed.", SellerBalance, [_SELLER]),
    "/v1/sellers/{seller}/statement": (
        "A seller's statement, page by page.",
        Statement,
        [_SELLER, _NEEDED, *_DAYS, _ZONE, _ROWS, _CURSOR],
    ),
    "/v1/sellers/{seller}/statement.csv": (
        "A seller's statement, whole, as CSV.",
        _CSV,
        [_SELLER, _NEEDED, *_DAYS, _ZONE],
    ),
    "/v1/buyers/{buyer}/orders": (
        "A buyer's payments, newest first.",
        Orders,
        [_BUYER, _CURSOR, _LIMIT],
    ),
    "/v1/payments/{payment}/history": (
        "A payment's versions: what made each, who, when, and where in the log.",
        History,
        [_PAYMENT],
    ),
    "/v1/sellers": ("The sellers with the most gross.", Sellers, [_CURRENCY, _LIMIT]),
    "/v1/totals": ("The books as a whole.", Totals, []),
    "/v1/trial-balance": ("Every account, by currency, at positions of the shards.", TrialBalance, [_CURRENCY, _AT]),
    "/v1/profit": (
        "What the platform earned, by UTC day of each ledger entry.",
        Profit,
        [_NEEDED, *_DAYS, _INTERVAL, _ROWS, _CURSOR],
    ),
    "/v1/positions": ("How far each shard's feed is applied.", PositionsView, []),
}
PATHS = tuple(_CALLS)

_ID = _parameter("id", "Its id.", _STRING, where="path", required=True)
_PAGE = [_ROWS, _CURSOR]
_EVENTS = "/v1/event-endpoints"


class Call(NamedTuple):
    """A call beside the derived data."""

    method: str
    path: str
    text: str
    answer: type | str | None
    parameters: Sequence[dict[str, Any]] = ()
    body: type | None = None
    status: int = 200
    scope: str = "read"


_OTHERS = (
    Call("get", "/v1/reconciliations", "The latest reconciliations.", Reconciliations),
    Call("post", "/v1/reconciliations", "Begin one.", Reconciliation, body=Asked, status=202, scope="operate"),
    Call("get", "/v1/reconciliations/{id}", "One reconciliation.", Reconciliation, [_ID]),
    Call("get", "/v1/reconciliations/{id}/differences", "What differs, page by page.", Differences, [_ID, *_PAGE]),
    Call("get", "/v1/reconciliations/{id}/differences.csv", "What differs, whole, as CSV.", _CSV, [_ID]),
    Call("get", "/v1/status", "How far the feeds are, how much there is, what the audit found.", AggregatorStatus),
    Call("get", _EVENTS, "All event endpoints.", EndpointList, scope="operate"),
    Call("post", _EVENTS, "Make an event endpoint.", EndpointView, body=NewEndpoint, status=201, scope="operate"),
    Call("get", f"{_EVENTS}/{{id}}", "One event endpoint.", EndpointView, [_ID], scope="operate"),
    Call("patch", f"{_EVENTS}/{{id}}", "Change it.", EndpointView, [_ID], EndpointChange, scope="operate"),
    Call("delete", f"{_EVENTS}/{{id}}", "Remove it; what is waiting for it is not sent.", None, [_ID], None, 204, "operate"),
    Call(
        "post", f"{_EVENTS}/{{id}}/secret", "A new secret; the one before signs for a day.", EndpointView, [_ID], scope="operate"
    ),
    Call("post", f"{_EVENTS}/{{id}}/replay", "Send again.", Replayed, [_ID], Replay, 202, "operate"),
    Call("get", f"{_EVENTS}/{{id}}/deliveries", "The delivery log.", Deliveries, [_ID, _LIMIT, _CURSOR], scope="operate"),
    Call("get", f"{_EVENTS}/{{id}}/dead-letters", "What was given up.", DeadLetters, [_ID], scope="operate"),
)


def _operation(call: Call) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    names = {
        401: "No API key, or an unknown one",
        403: f"The key lacks the scope `{call.scope}`, or is another seller's own",
        422: "A parameter can't be used",
        503: "Not now; `Retry-After` says when",
    }
    names |= {400: "The body can't be read", 409: "Not while another one is under way"} if call.body else {}
    names |= {404: "There is none of this id"} if _ID in call.parameters else {}
    responses: dict[str, Any] = {str(status): {"description": name, "content": problem} for status, name in names.items()}
    if call.answer is None:
        good: dict[str, Any] = {"description": call.text}
    elif isinstance(call.answer, str):
        good = {"description": call.text, "content": {call.answer: {"schema": {"type": "string"}}}}
    else:
        about = (call.answer.__doc__ or "").strip()
        good = {"description": about, "content": {"application/json": {"schema": _reference(call.answer)}}}
    responses[str(call.status)] = good
    made = {"summary": call.text, "parameters": [*call.parameters], "responses": dict(sorted(responses.items()))}
    if call.body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(call.body)}}}
    return made


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def document() -> dict[str, Any]:
    """The document that `/openapi.json` answers."""
    calls = [Call("get", path, text, answer, [*wanted, _MIN_POSITION]) for path, (text, answer, wanted) in _CALLS.items()]
    calls += _OTHERS
    kinds = {kind for call in calls for kind in (call.answer, call.body) if isinstance(kind, type)}
    schemas = (*sorted(kinds, key=lambda kind: kind.__name__), *PAYOUT_SCHEMAS, Problem)
    _, components = msgspec.json.schema_components(schemas, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Oncepay aggregator", "version": "1", "description": (_about or "").strip()},
        "security": [{"key": []}],
        "paths": paths | payout_paths(),
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
