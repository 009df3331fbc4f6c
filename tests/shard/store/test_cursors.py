from __future__ import annotations

import base64
import json

import pytest

from oncepay.errors import InvalidField
from shard.store.lists import _START, Cursor, parse_cursor


def encoded(value: object) -> str:
    """As a cursor is carried."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize("cursor", [Cursor(0, ""), Cursor(1_700_000_000_000, 'a "key"'), _START])
def test_a_cursor_comes_back(cursor: Cursor) -> None:
    assert parse_cursor(cursor.text()) == cursor


@pytest.mark.parametrize(
    "text",
    [
        *("!", "a", "AAAA", "é"),
        *map(encoded, ([1], [1, 2], ["1", "a"], {}, [-1, "a"], [_START.created_at_ms + 1, "a"], [2**63 - 1, "a"], [1, "a\0b"])),
    ],
)
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_cursor(text)
    assert caught.value.field == "cursor"
