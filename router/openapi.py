"""The router's OpenAPI document: bodies are generated from the types that decode them."""

from __future__ import annotations

from typing import Any

import msgspec

from oncepay import errors
from router.bodies import ConfirmBody, PaymentBody

_KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": True,
    "description": "One key, at most one charge. From the key service, or up to 200 printable ASCII characters, quoted or raw.",
    "schema": {"type": "string", "maxLength": 202},
    "example": "order-10042",
}
_PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`wait=<seconds>`: how long settlement may take before the answer is 202 (default 10, at most 60).",
    "schema": {"type": "string"},
    "example": "wait=10",
}
_KEY_PATH = {"name": "key", "in": "path", "required": True, "schema": {"type": "string"}, "example": "order-10042"}
_EXAMPLE = {
    "buyer": "b-77",
    "currency": "usd",
    "items": [{"seller": "records-4", "amount": 1499, "quantity": 2}, {"seller": "platform", "amount": 399}],
    "payment_method": "pm_card_visa",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    bodies, components = msgspec.json.schema_components((PaymentBody, ConfirmBody), ref_template="#/components/schemas/{name}")
    payment_body, confirm_body = bodies
    return {
        "openapi": "3.1.0",
        "info": {"title": "Oncepay router", "version": "1", "description": "Payments that charge once."},
        "paths": {
            "/v1/payments": {"post": _submit(payment_body)},
            "/v1/payments/{key}": {
                "get": _call("Show a payment with its ledger entries", [_KEY_PATH], {"200": _payment("The payment")})
            },
            "/v1/payments/{key}/confirm": {
                "post": _call(
                    "Try another payment method on the same payment",
                    [_KEY_PATH, _PREFER],
                    {"200": _payment("Settled, or waiting"), "202": _payment("In flight")},
                    confirm_body,
                )
            },
            "/v1/payments/{key}/cancel": {
                "post": _call(
                    "Give a payment up",
                    [_KEY_PATH, _PREFER],
                    {"200": _payment("Settled"), "202": _payment("In flight")},
                )
            },
        },
        "components": {
            "schemas": {**components, "Payment": _payment_schema(), "Problem": _problem_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _submit(body: dict[str, Any]) -> dict[str, Any]:
    answers = {
        "201": _payment("Made by this call, and settled or waiting for the buyer or the merchant"),
        "200": _payment("A replay: the payment as it is now"),
        "202": _payment("In flight; `Location` tells where to look"),
    }
    call = _call("Submit a payment", [_KEY_HEADER, _PREFER], answers, body)
    call["requestBody"]["content"]["application/json"]["example"] = _EXAMPLE
    return call


def _call(
    summary: str, parameters: list[dict[str, Any]], answers: dict[str, Any], body: dict[str, Any] | None = None
) -> dict[str, Any]:
    problem = {
        "description": "A problem",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    call: dict[str, Any] = {"summary": summary, "parameters": parameters, "responses": {**answers, "default": problem}}
    if body is not None:
        call["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return call


def _payment(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Payment"}}},
    }


def _payment_schema() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "integer"}
    return {
        "type": "object",
        "required": ["key", "status", "buyer", "currency", "amount", "items", "version"],
        "properties": {
            "key": text,
            "status": text,
            "buyer": text,
            "currency": text,
            "amount": number,
            "amount_captured": number,
            "amount_refunded": number,
            "items": {"type": "array", "items": {"$ref": "#/components/schemas/Item"}},
            "platform_fee": number,
            "payment_intent": {"type": ["string", "null"]},
            "client_secret": text,
            "failure": {"type": "object"},
            "created_at": {"type": "string", "format": "date-time"},
            "updated_at": {"type": "string", "format": "date-time"},
            "version": number,
            "entries": {"type": "array", "items": {"type": "object"}},
        },
    }


def _problem_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["type", "title", "status"],
        "properties": {
            "type": {"type": "string", "description": f"Stable; begins with {errors.PROBLEM_BASE}"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "field": {"type": "string", "description": "The member of the body that is wrong, as `items[0].amount`"},
        },
    }
