"""Parts of the document: parameters, answers, problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oncepay.apikeys import Scope
from oncepay.errors import (
    BodyTooLarge,
    EtcdUnavailable,
    Forbidden,
    MalformedBody,
    OncepayError,
    OutcomeUnknown,
    RateLimited,
    ShardUnavailable,
    TooBusy,
    Unauthorized,
    Unavailable,
)

Json = dict[str, Any]
Problems = Sequence[type[OncepayError]]

STORE: Problems = (ShardUnavailable, OutcomeUnknown, EtcdUnavailable, TooBusy)
BODY: Problems = (MalformedBody, BodyTooLarge)
AUTH: Problems = (Unauthorized, Forbidden, RateLimited, Unavailable)

REQUEST_ID: Json = {"X-Request-Id": {"description": "The request's id, as in the logs.", "schema": {"type": "string"}}}
ETAG: Json = {"ETag": {"description": "The version, quoted.", "required": True, "schema": {"type": "string"}, "example": '"3"'}}
LOCATION: Json = {"Location": {"description": "Where to look.", "required": True, "schema": {"type": "string"}}}
REPLAYED: Json = {
    "Idempotent-Replayed": {
        "description": "`true` when an earlier call with this key was the first.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}


def ref(name: str) -> Json:
    """A schema of the document, by name."""
    return {"$ref": f"#/components/schemas/{name}"}


def parameter(name: str, where: str, text: str, schema: Json, **more: object) -> Json:
    """A parameter; those of a path are always required."""
    required = {"required": True} if where == "path" else {}
    return {"name": name, "in": where, "description": text, **required, "schema": schema, **more}


def answer(
    text: str, schema: Json | None, example: object = None, headers: Json | None = None, media: str = "application/json"
) -> Json:
    """An answer with a body of `schema`; without one when that is None."""
    made: Json = {"description": text, "headers": {**REQUEST_ID, **(headers or {})}}
    if schema is not None:
        made["content"] = {media: {"schema": schema, **({"example": example} if example is not None else {})}}
    return made


def call(
    name: str,
    summary: str,
    answers: Mapping[str, Json],
    *,
    tag: str,
    scope: Scope | None,
    about: str = "",
    parameters: Sequence[Json] = (),
    body: Json | None = None,
    problems: Problems = (),
) -> Json:
    """An operation. A call with a scope may also be answered with what authorization refuses; each with 500."""
    raised = (*problems, *(BODY if body else ()), *(AUTH if scope else ()))
    needs = f"Needs the scope `{scope}`." if scope else "Needs no API key."
    made: Json = {
        "operationId": name,
        "summary": summary,
        "description": f"{about} {needs}".strip(),
        "tags": [tag],
        "security": [{"api_key": [scope]}] if scope else [],
        "parameters": list(parameters),
        "responses": dict(sorted({**answers, **_problems((*raised, OncepayError))}.items())),
    }
    if body:
        made["requestBody"] = body
    return made


def request_body(schema: Json, examples: Mapping[str, object], *, required: bool = True) -> Json:
    """A JSON body with named examples; one that isn't required may be left out altogether."""
    shown = {name: {"value": value} for name, value in examples.items()}
    return {"required": required, "content": {"application/json": {"schema": schema, "examples": shown}}}


def _problems(raised: Problems) -> Json:
    """An answer for each status, with an example for each problem type."""
    by_status: dict[int, list[type[OncepayError]]] = {}
    for error in dict.fromkeys(raised):
        by_status.setdefault(error.status, []).append(error)
    return {str(status): _problem(errors) for status, errors in by_status.items()}


def _problem(errors: list[type[OncepayError]]) -> Json:
    headers: Json = dict(REQUEST_ID)
    if any(error.retry_after_s for error in errors):
        headers["Retry-After"] = {
            "description": "Seconds.",
            "required": True,
            "schema": {"type": "string", "pattern": "^[0-9]+$"},
        }
    if errors[0].status == 401:
        headers["WWW-Authenticate"] = {"required": True, "schema": {"type": "string"}, "example": "Bearer"}
    return {
        "description": ", ".join(f"`{error.slug}`" for error in errors),
        "headers": headers,
        "content": {
            "application/problem+json": {
                "schema": ref("Problem"),
                "examples": {error.slug: {"summary": error().title, "value": error().problem()} for error in errors},
            }
        },
    }
