"""Bodies in and out."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.errors import MalformedBody, RateLimited, Unauthorized
from oncepay.web import PROBLEM_JSON, decode_bytes, json_response, problem_response


class Item(msgspec.Struct, forbid_unknown_fields=True):
    amount: Annotated[int, msgspec.Meta(ge=1)]
    names: dict[str, int] = {}


class Order(msgspec.Struct, forbid_unknown_fields=True):
    buyer: str
    items: list[Item]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "buyer"),
        (b'{"buyer": 1, "items": []}', "buyer"),
        (b'{"buyer": "b", "items": {}}', "items"),
        (b'{"buyer": "b", "items": [{"amount": "1"}]}', "items[0].amount"),
        (b'{"buyer": "b", "items": [{"amount": 1}, {"amount": 0}]}', "items[1].amount"),
        (b'{"buyer": "b", "items": [{}]}', "items[0].amount"),
        (b'{"buyer": "b", "items": [{"amount": 1, "x": 1}]}', "items[0].x"),
        (b'{"buyer": "b", "items": [{"amount": 1, "names": {"a": "b"}}]}', "items[0].names[...]"),
        (b"[]", None),
        (b"", None),
        (b"{", None),
        (b"\xff", None),
        (b'{"buyer": "\xff", "items": []}', None),
    ],
)
def test_what_doesn_t_fit_is_named(body: bytes, field: str | None) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode_bytes(body, Order)
    assert caught.value.field == field
    assert caught.value.detail
    assert "$" not in caught.value.detail


@given(st.binary(max_size=60))
def test_no_body_breaks_it(body: bytes) -> None:
    try:
        decode_bytes(body, Order)
    except MalformedBody:
        pass


def test_what_goes_out_comes_in() -> None:
    order = Order("b", [Item(3, {"a": 1})])
    body = json_response(order, 201).body
    assert isinstance(body, bytes)
    assert decode_bytes(body, Order) == order


def test_problems_say_when_to_come_back() -> None:
    response = problem_response(RateLimited(retry_after_s=7))
    assert (response.status, response.headers["Retry-After"], response.content_type) == (429, "7", PROBLEM_JSON)
    assert "Retry-After" not in problem_response(MalformedBody()).headers
    assert problem_response(Unauthorized()).headers["WWW-Authenticate"] == "Bearer"
