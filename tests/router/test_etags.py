from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from router.etags import shown


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (None, 200),
        ("", 200),
        ('"3"', 304),
        ('W/"3"', 304),
        ('"1", "3"', 304),
        ('"1",W/"3" ', 304),
        ("*", 304),
        ('"33"', 200),
        ("3", 200),
        ('"3', 200),
        ('"1", *', 200),
    ],
)
def test_only_another_version_is_sent(asked: str | None, status: int) -> None:
    request = make_mocked_request("GET", "/", headers={} if asked is None else {"If-None-Match": asked})
    answer = shown(request, 3, lambda: {"version": 3})
    assert (answer.status, answer.headers["ETag"]) == (status, '"3"')
    assert bool(answer.body) == (status == 200)
