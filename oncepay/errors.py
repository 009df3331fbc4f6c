"""One family of errors. Each becomes one problem type (RFC 9457), one log event and one metric label.

`status` is the HTTP status, `slug` the stable end of the problem's type, the class's docstring its title.
"""

from __future__ import annotations

PROBLEM_BASE = "https://oncepay.dev/problems/"


class OncepayError(Exception):
    """Something went wrong."""

    status = 500
    slug = "internal"
    retry_after_s: int | None = None

    def __init__(self, detail: str = "", *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip())
        self.detail = detail
        self.field = field
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    @property
    def title(self) -> str:
        """What a person sees first."""
        return (type(self).__doc__ or "").strip().splitlines()[0].rstrip(".")

    def problem(self) -> dict[str, object]:
        """The body of an application/problem+json answer."""
        body: dict[str, object] = {
            "type": PROBLEM_BASE + self.slug,
            "title": self.title,
            "status": self.status,
        }
        if self.detail:
            body["detail"] = self.detail
        if self.field:
            body["field"] = self.field
        return body


class SettingsError(OncepayError):
    """The settings can't be used."""

    slug = "settings"


class MalformedBody(OncepayError):
    """The body is not what this call takes."""

    status = 400
    slug = "malformed-body"


class BodyTooLarge(OncepayError):
    """The body is too large."""

    status = 413
    slug = "body-too-large"


class MissingKey(OncepayError):
    """The Idempotency-Key header is missing."""

    status = 400
    slug = "missing-idempotency-key"


class InvalidKey(OncepayError):
    """The idempotency key can't be used."""

    status = 400
    slug = "invalid-idempotency-key"


class KeyReused(OncepayError):
    """The idempotency key was used before, with other fields."""

    status = 422
    slug = "idempotency-key-reused"


class InvalidField(OncepayError):
    """A field has a value that can't be accepted."""

    status = 422
    slug = "invalid-field"


class InvalidAmount(OncepayError):
    """An amount can't be charged."""

    status = 422
    slug = "invalid-amount"


class UnknownCurrency(OncepayError):
    """The currency is not known."""

    status = 422
    slug = "unknown-currency"


class Unauthorized(OncepayError):
    """The API key is missing or not known."""

    status = 401
    slug = "unauthorized"


class Forbidden(OncepayError):
    """The API key lacks the scope for this call."""

    status = 403
    slug = "forbidden"


class NotFound(OncepayError):
    """There is no such thing."""

    status = 404
    slug = "not-found"


class WrongState(OncepayError):
    """The payment's state doesn't allow this."""

    status = 409
    slug = "wrong-state"


class PredecessorNotOver(OncepayError):
    """The payment named by `after` has not failed."""

    status = 409
    slug = "predecessor-not-over"


class BadSignature(OncepayError):
    """The webhook's signature doesn't check."""

    status = 400
    slug = "bad-signature"


class TooBusy(OncepayError):
    """Too much is waiting already."""

    status = 503
    slug = "too-busy"
    retry_after_s = 1


class RateLimited(OncepayError):
    """Too many requests."""

    status = 429
    slug = "rate-limited"
    retry_after_s = 1


class Unavailable(OncepayError):
    """A part that this call needs can't be reached now."""

    status = 503
    slug = "unavailable"
    retry_after_s = 2


class ShardUnavailable(Unavailable):
    """The payment's shard has no leader that can acknowledge."""

    slug = "shard-unavailable"


class OutcomeUnknown(Unavailable):
    """Whether this was committed is not known yet; send it again with the same key."""

    slug = "outcome-unknown"


class NotOwner(Unavailable):
    """The slot moved to another shard."""

    slug = "moved"


class EtcdUnavailable(Unavailable):
    """etcd can't be reached."""

    slug = "etcd-unavailable"


class NoKeys(Unavailable):
    """No keys are left that may be issued now."""

    slug = "no-keys"


class StripeUnavailable(Unavailable):
    """Stripe can't be reached, or gave no usable answer."""

    slug = "stripe-unavailable"
