"""Money: exact splits, no mixing of currencies, exponents as ISO 4217 has them."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.cart import Fee, Item, check_cart, shares_of, shares_of_part
from oncepay.errors import InvalidAmount, InvalidField, UnknownCurrency
from oncepay.money import EXPONENTS, Money, allocate, exponent, format_minor, minimum_minor

weights = st.lists(st.integers(0, 10**8), min_size=1, max_size=40).filter(any)


@given(st.integers(0, 10**9), weights)
def test_parts_sum_to_the_whole_and_are_fair(total: int, by: list[int]) -> None:
    parts = allocate(total, by)
    assert sum(parts) == total
    whole = sum(by)
    for part, weight in zip(parts, by, strict=True):
        assert abs(part * whole - total * weight) < whole  # less than one unit from its exact part


@given(st.data(), weights)
def test_no_part_of_a_part_is_larger_than_its_weight(data: st.DataObject, by: list[int]) -> None:
    total = data.draw(st.integers(0, sum(by)))
    assert all(part <= weight for part, weight in zip(allocate(total, by), by, strict=True))


@pytest.mark.parametrize(("total", "by"), [(-1, [1]), (1, [0, 0]), (1, [2, -1])])
def test_what_cannot_be_split_is_refused(total: int, by: list[int]) -> None:
    with pytest.raises(ValueError, match="can't split"):
        allocate(total, by)


def test_currencies_do_not_mix() -> None:
    assert Money(5, "usd") + Money(7, "usd") == Money(12, "usd")
    assert Money(5, "usd") < Money(7, "usd")
    for operation in (operator.add, operator.sub, operator.lt):
        with pytest.raises(TypeError, match="can't mix usd and eur"):
            operation(Money(1, "usd"), Money(1, "eur"))


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [(1234, "usd", "12.34 USD"), (-5, "eur", "-0.05 EUR"), (500, "jpy", "500 JPY"), (1234567, "bhd", "1,234.567 BHD")],
)
def test_amounts_are_written_with_the_currencys_digits(amount: int, currency: str, text: str) -> None:
    assert format_minor(amount, currency) == text


def test_exponents_are_known() -> None:
    assert set(EXPONENTS.values()) == {0, 2, 3}
    assert exponent("usd") == 2
    assert minimum_minor("usd") == 50
    with pytest.raises(UnknownCurrency):
        exponent("xyz")


items = st.lists(
    st.builds(
        Item, seller=st.sampled_from(["a", "b", "c", "platform"]), amount=st.integers(0, 10**5), quantity=st.integers(1, 9)
    ),
    min_size=1,
    max_size=12,
).map(tuple)
fees = st.builds(Fee, basis_points=st.integers(0, 10_000), fixed_minor=st.integers(0, 500))


@given(items, fees, fees)
def test_shares_sum_to_the_cart_and_fees_never_exceed_them(cart: tuple[Item, ...], own: Fee, default: Fee) -> None:
    shares = shares_of(cart, {"a": own}, default)
    assert sum(share.gross for share in shares) == sum(item.amount * item.quantity for item in cart)
    assert all(0 <= share.fee <= share.gross for share in shares)
    assert all(share.fee == 0 for share in shares if share.seller == "platform")
    assert len({share.seller for share in shares}) == len(shares)


@given(st.data(), items, fees)
def test_a_part_is_spread_exactly(data: st.DataObject, cart: tuple[Item, ...], fee: Fee) -> None:
    shares = shares_of(cart, {}, fee)
    whole = sum(share.gross for share in shares)
    if not whole:
        return
    amount = data.draw(st.integers(0, whole))
    part = shares_of_part(shares, amount)
    assert sum(share.gross for share in part) == amount
    for share, of in zip(part, shares, strict=True):
        assert 0 <= share.gross <= of.gross
        assert 0 <= share.fee <= min(of.fee, share.gross)


@pytest.mark.parametrize(
    ("cart", "error", "field"),
    [
        ((), InvalidField, "items"),
        ((Item("a", 49),), InvalidAmount, "items"),
        ((Item("a", -1),), InvalidAmount, "items[0].amount"),
        ((Item("a", 100), Item("", 100)), InvalidField, "items[1].seller"),
        ((Item("a", 100, 0),), InvalidField, "items[0].quantity"),
        ((Item("a", 99_999_999, 2),), InvalidAmount, "items"),
        ((Item("a", 100, 1, "x" * 501),), InvalidField, "items[0].description"),
        (tuple(Item("a", 1) for _ in range(501)), InvalidField, "items"),
    ],
)
def test_a_cart_that_cannot_be_charged_names_the_field(
    cart: tuple[Item, ...], error: type[InvalidAmount | InvalidField], field: str
) -> None:
    with pytest.raises(error) as caught:
        check_cart("usd", cart)
    assert caught.value.field == field


@pytest.mark.parametrize("currency", ["mga", "ugx"])
def test_a_currency_that_stripe_counts_in_other_units_is_not_charged(currency: str) -> None:
    with pytest.raises(UnknownCurrency):
        check_cart(currency, (Item("a", 5000),))


@pytest.mark.parametrize(("currency", "amount", "fits"), [
    ("kwd", 5124, False), ("kwd", 5120, True), ("isk", 4010, False), ("isk", 4000, True), ("usd", 4001, True),
])  # fmt: skip
def test_a_total_is_a_multiple_of_what_stripe_takes(currency: str, amount: int, fits: bool) -> None:
    if fits:
        assert check_cart(currency, (Item("a", amount - 1), Item("b", 1))) == amount
    else:
        with pytest.raises(InvalidAmount):
            check_cart(currency, (Item("a", amount - 1), Item("b", 1)))
