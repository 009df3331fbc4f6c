"""Stripe's error objects."""

from __future__ import annotations

from sandbox.stripe.forms import JsonObject

DOC_URL = "https://stripe.com/docs/error-codes/"


class StripeError(Exception):
    """An error answer. `stored`: execution had begun, so an idempotency key keeps and replays it."""

    def __init__(
        self,
        status: int,
        type_: str,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        stored: bool = False,
        headers: dict[str, str] | None = None,
        more: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type_
        self.message = message
        self.code = code
        self.param = param
        self.stored = stored
        self.headers = headers or {}
        self.more = more or {}

    def body(self, request_id: str) -> dict[str, object]:
        """The JSON body; `request_id` goes into the log's address."""
        error: dict[str, object] = {}
        if self.code is not None:
            error["code"] = self.code
            error["doc_url"] = DOC_URL + self.code.replace("_", "-")
        error["message"] = self.message
        if self.param is not None:
            error["param"] = self.param
        error.update(self.more)
        error["request_log_url"] = f"https://dashboard.stripe.com/test/logs/{request_id}"
        error["type"] = self.type
        return {"error": error}


def invalid(
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    stored: bool = False,
    more: dict[str, object] | None = None,
) -> StripeError:
    """400 invalid_request_error; a validation failure unless `stored`."""
    return StripeError(400, "invalid_request_error", message, code=code, param=param, stored=stored, more=more)


def missing_param(param: str) -> StripeError:
    """A parameter that the call needs isn't there."""
    return invalid(f"Missing required param: {param}.", code="parameter_missing", param=param)


def unknown_param(param: str) -> StripeError:
    """A parameter that the call doesn't take."""
    return invalid(f"Received unknown parameter: {param}", code="parameter_unknown", param=param)


def no_such(kind: str, identifier: str, param: str) -> StripeError:
    """404: there is no object `kind` of that id. `param` is what Stripe names it in this call."""
    return StripeError(404, "invalid_request_error", f"No such {kind}: '{identifier}'", code="resource_missing", param=param)


def unexpected_state(message: str, intent: JsonObject) -> StripeError:
    """400: the intent's status doesn't allow this."""
    return invalid(message, code="payment_intent_unexpected_state", stored=True, more={"payment_intent": intent})


def unauthorized(message: str) -> StripeError:
    """401."""
    return StripeError(401, "invalid_request_error", message, headers={"WWW-Authenticate": 'Basic realm="Stripe"'})


def rate_limited(reason: str) -> StripeError:
    """429; never stored."""
    return StripeError(
        429,
        "invalid_request_error",
        "Request rate limit exceeded. You can learn more about rate limits here https://stripe.com/docs/rate-limits.",
        code="rate_limit",
        headers={"Stripe-Rate-Limited-Reason": reason},
    )


def api_error(*, stored: bool) -> StripeError:
    """500; stored when execution had begun."""
    return StripeError(
        500,
        "api_error",
        "An unknown error occurred. (A fault of the sandbox.)",
        stored=stored,
    )
