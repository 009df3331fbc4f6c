"""Errors of the Tipalti stand-in."""

from __future__ import annotations


class TipaltiError(Exception):
    """An error answer: status, code and what to tell the caller."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def body(self, trace_id: str) -> dict[str, object]:
        """The JSON body."""
        return {"status": self.status, "code": self.code, "detail": self.message, "traceId": trace_id}


def invalid(message: str) -> TipaltiError:
    """400: the body or a parameter can't be used."""
    return TipaltiError(400, "INVALID_REQUEST", message)


def not_found(what: str) -> TipaltiError:
    """404."""
    return TipaltiError(404, "NOT_FOUND", f"There is no {what}.")
