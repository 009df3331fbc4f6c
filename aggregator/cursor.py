"""Cursors of pages: opaque to clients, stable while rows come and change."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from typing import TypeVar

import msgspec

from oncepay.errors import InvalidField


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The last row of a page, by the order of the page."""

    created_at: dt.datetime
    key: str

    def encode(self) -> str:
        """As it goes into an answer."""
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")


class EntryCursor(Cursor, frozen=True, array_like=True):
    """The last entry of a statement's page."""

    entry_id: str


C = TypeVar("C", bound=Cursor)


def decode(text: str, kind: type[C]) -> C:
    """The cursor that a client sent back. Raises InvalidField when it is none of ours."""
    try:
        cursor = msgspec.msgpack.decode(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True), type=kind)
    except (ValueError, binascii.Error, msgspec.DecodeError):
        raise InvalidField("this is not a cursor that an earlier page gave", field="cursor") from None
    if cursor.created_at.tzinfo is None or any("\0" in text for text in msgspec.structs.astuple(cursor)[1:]):
        raise InvalidField("this is not a cursor that an earlier page gave", field="cursor")
    return cursor
