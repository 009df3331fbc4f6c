"""A cart: what a buyer pays, to which sellers, and which part of it is the platform's fee."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from oncepay.errors import InvalidAmount, InvalidField
from oncepay.money import MAXIMUM_MINOR, allocate, exponent, format_minor, minimum_minor, step_minor

ITEMS_MAX = 500
QUANTITY_MAX = 100_000
SELLER_LENGTH_MAX = 64
BUYER_LENGTH_MAX = 200
PLATFORM_SELLER = "platform"
"""The reserved seller of lines that belong to the platform itself: shipping, tax, service. It pays no fee."""


class Item(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One line of a cart. `amount` is the price of one unit in minor units of the cart's currency."""

    seller: str
    amount: int
    quantity: int = 1
    description: str = ""


class Fee(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The platform's fee for a seller: `basis_points` of the seller's total, half a unit rounded up, plus `fixed_minor`."""

    basis_points: int
    fixed_minor: int = 0

    def of(self, gross: int) -> int:
        """The fee on `gross` minor units, never more than `gross`."""
        return min(gross, (gross * self.basis_points + 5_000) // 10_000 + self.fixed_minor)


class Share(msgspec.Struct, frozen=True):
    """A seller's part of a payment in minor units: `gross` of its items, of which `fee` is the platform's."""

    seller: str
    gross: int
    fee: int

    @property
    def net(self) -> int:
        """What the seller is owed."""
        return self.gross - self.fee


def check_cart(currency: str, items: tuple[Item, ...]) -> int:
    """The cart's total in minor units, when it can be charged.

    Raises UnknownCurrency, InvalidField or InvalidAmount with the field's name otherwise. The limits are Stripe's for
    one charge and this module's for the number of lines.
    """
    exponent(currency)
    if not items:
        raise InvalidField("a payment needs at least one item", field="items")
    if len(items) > ITEMS_MAX:
        raise InvalidField(f"a payment has at most {ITEMS_MAX} items", field="items")
    total = 0
    for i, item in enumerate(items):
        _check_item(item, f"items[{i}]")
        total += item.amount * item.quantity
    minimum = minimum_minor(currency)
    if total < minimum:
        raise InvalidAmount(f"the total {total} is less than {format_minor(minimum, currency)}, the least that can be charged",
                            field="items")  # fmt: skip
    if total > MAXIMUM_MINOR:
        raise InvalidAmount(f"the total {total} is more than {MAXIMUM_MINOR} minor units, the most that can be charged",
                            field="items")  # fmt: skip
    if total % step_minor(currency):
        raise InvalidAmount(f"the total {total} is no multiple of {step_minor(currency)}, as {currency} needs it", field="items")
    return total


def _check_item(item: Item, path: str) -> None:
    if not item.seller or len(item.seller) > SELLER_LENGTH_MAX or not item.seller.isprintable():
        raise InvalidField(f"a seller's id has 1 to {SELLER_LENGTH_MAX} printable characters", field=f"{path}.seller")
    if item.amount < 0:
        raise InvalidAmount("the price of an item can't be negative", field=f"{path}.amount")
    if item.amount > MAXIMUM_MINOR:
        raise InvalidAmount(f"the price of an item is at most {MAXIMUM_MINOR} minor units", field=f"{path}.amount")
    if not 1 <= item.quantity <= QUANTITY_MAX:
        raise InvalidField(f"a quantity is 1 to {QUANTITY_MAX}", field=f"{path}.quantity")
    if len(item.description) > 500:
        raise InvalidField("a description has at most 500 characters", field=f"{path}.description")


def gross_of(items: Iterable[Item]) -> dict[str, int]:
    """Each seller's items in minor units, in the order in which the sellers first appear."""
    gross: dict[str, int] = {}
    for item in items:
        gross[item.seller] = gross.get(item.seller, 0) + item.amount * item.quantity
    return gross


def shares_of(items: Iterable[Item], fees: Mapping[str, Fee], default_fee: Fee) -> tuple[Share, ...]:
    """Each seller's share, in the order in which the sellers first appear. Gross sums to the cart's total."""
    return tuple(
        Share(seller, total, 0 if seller == PLATFORM_SELLER else fees.get(seller, default_fee).of(total))
        for seller, total in gross_of(items).items()
    )


def shares_of_part(shares: tuple[Share, ...], amount: int) -> tuple[Share, ...]:
    """The shares of a part of a payment (a capture or refund of `amount` minor units), spread by largest remainder.

    Fees go in proportion to each seller's own part, rounded half up, so that a whole is exactly the whole again.
    """
    whole = sum(share.gross for share in shares)
    if amount == whole:
        return shares
    parts = allocate(amount, [share.gross for share in shares])
    return tuple(
        Share(share.seller, part, (2 * share.fee * part + share.gross) // (2 * share.gross) if share.gross else 0)
        for share, part in zip(shares, parts, strict=True)
    )
