"""Cursors of pages: opaque to clients, stable while rows come and change."""

from __future__ import annotations

import base64
import binascii
import datetime as dt

import msgspec

from oncepay.errors import InvalidField


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The last row of a page, by the order of the page."""

    created_at: dt.datetime
    key: str

    def encode(self) -> str:
        """As it goes into an answer."""
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")


_decoder = msgspec.msgpack.Decoder(Cursor)


def decode(text: str) -> Cursor:
    """The cursor that a client sent back. Raises InvalidField when it is none of ours."""
    try:
        cursor = _decoder.decode(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, msgspec.DecodeError):
        raise InvalidField("this is not a cursor that an earlier page gave", field="cursor") from None
    if cursor.created_at.tzinfo is None:
        raise InvalidField("this is not a cursor that an earlier page gave", field="cursor")
    return cursor
