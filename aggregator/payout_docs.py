"""The payout calls in the API document."""

from __future__ import annotations

from typing import Any

from aggregator.params import LIMIT_DEFAULT, LIMIT_MAX
from aggregator.payout_views import (
    BookBody,
    DeclineBody,
    OnePayout,
    PayoutPage,
    PayoutView,
    RunBody,
    RunView,
    SellerPayouts,
)
from oncepay.payout import PayoutStatus

PAYOUT_SCHEMAS = (RunBody, DeclineBody, BookBody, RunView, OnePayout, PayoutView, PayoutPage, SellerPayouts)

Json = dict[str, Any]
_STRING: Json = {"type": "string"}
_PROBLEM: Json = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_REFUSED = {
    400: "The body is not what this call takes",
    401: "No API key, or an unknown one",
    403: "The key lacks the scope, or the operator may not approve what they started",
    404: "There is no such payout",
    409: "The payout's state doesn't allow this",
    422: "A parameter can't be used",
    502: "Tipalti refused",
    503: "Not now; `Retry-After` says when",
}


def _schema(kind: type) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def _parameter(name: str, text: str, schema: Json = _STRING, *, where: str = "query") -> Json:
    return {"name": name, "in": where, "required": where == "path", "description": text, "schema": schema}


_KEY = _parameter("key", "The payout's key, percent-encoded: `payout:<seller>:<currency>:<sequence>`.", where="path")
_SELLER = _parameter("seller", "The seller's id.", where="path")
_LIMIT = _parameter("limit", "Rows a page.", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT})
_PAGE = [
    _parameter("currency", "ISO 4217 code in lower case."),
    _parameter("cursor", "What the page before gave."),
    _LIMIT,
    _parameter("min_position", "`shard:X/Y,…`: wait (up to 30 s, then 503) until the answer is at or past these positions."),
]


def _operation(text: str, answer: type, parameters: list[Json], refused: tuple[int, ...], body: type | None = None) -> Json:
    responses: Json = {str(status): {"description": _REFUSED[status], "content": _PROBLEM} for status in refused}
    responses["200"] = {"description": (answer.__doc__ or "").strip(), "content": _schema(answer)}
    if answer is RunView:
        responses["201"] = responses["200"] | {"description": "The run has made payouts."}
    operation: Json = {"summary": text, "parameters": parameters, "responses": dict(sorted(responses.items()))}
    if body is not None:
        operation["requestBody"] = {"required": body is not DeclineBody, "content": _schema(body)}
    return operation


def payout_paths() -> Json:
    """The paths, as they stand in the document."""
    reads, commands = (401, 403, 422, 503), (400, 401, 403, 404, 409, 422, 503)
    filters = [
        _parameter("seller", "Only this seller's."),
        _parameter("status", "Only in this state.", {"type": "string", "enum": list(PayoutStatus)}),
        _parameter("run", "Only of this run."),
    ]
    return {
        "/v1/payouts": {
            "get": _operation("Payouts, newest first.", PayoutPage, [*filters, *_PAGE], reads),
            "post": _operation(
                "A payout run: what each seller is owed becomes a payout, or is held for a reason.",
                RunView, [], (400, 401, 403, 422, 502, 503), RunBody,
            ),
        },
        "/v1/payouts/{key}": {"get": _operation("One payout with its entries.", OnePayout, [_KEY], (401, 403, 404, 503))},
        "/v1/payouts/{key}/approve": {"post": _operation("A second operator agrees.", PayoutView, [_KEY], commands)},
        "/v1/payouts/{key}/decline": {
            "post": _operation("Stop a payout before Tipalti is told.", PayoutView, [_KEY], commands, DeclineBody)
        },
        "/v1/payouts/{key}/book": {
            "post": _operation("Book a payout that was paid by hand.", PayoutView, [_KEY], commands, BookBody)
        },
        "/v1/sellers/{seller}/payouts": {
            "get": _operation("A seller's payouts, newest first.", SellerPayouts, [_SELLER, *_PAGE], reads)
        },
    }  # fmt: skip
