"""Money: integers of a currency's minor unit. No float comes near it.

Exponents are ISO 4217's, except that of ISK, which is Stripe's; minimum and maximum charges are Stripe's (its "Currencies"
page), in minor units. Where Stripe's unit is another than ISO's by a factor (MGA, UGX) the currency is left out: an amount
that both sides read differently would be charged a hundredfold.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from oncepay.errors import UnknownCurrency

_EXPONENT_0 = "bif clp djf gnf jpy kmf krw pyg rwf vnd vuv xaf xof xpf"
_EXPONENT_2 = (
    "aed afn all amd ang aoa ars aud awg azn bam bbd bdt bmd bnd bob brl bsd bwp byn bzd cad cdf chf cny cop crc cve czk"
    " dkk dop dzd egp etb eur fjd fkp gbp gel gip gmd gtq gyd hkd hnl htg huf idr ils inr isk jmd kes kgs khr kyd kzt lak"
    " lbp lkr lrd lsl mad mdl mkd mmk mnt mop mur mvr mwk mxn myr mzn nad ngn nio nok npr nzd pab pen pgk php pkr pln"
    " qar ron rsd rub sar sbd scr sek sgd shp sle sos srd std svc szl thb tjs top try ttd twd tzs uah usd uyu uzs wst xcd"
    " yer zar zmw"
)
_EXPONENT_3 = "bhd jod kwd omr tnd"

EXPONENTS: dict[str, int] = (
    dict.fromkeys(_EXPONENT_0.split(), 0) | dict.fromkeys(_EXPONENT_2.split(), 2) | dict.fromkeys(_EXPONENT_3.split(), 3)
)

_MINIMUM_MINOR: dict[str, int] = {
    "usd": 50, "aed": 200, "aud": 50, "brl": 50, "cad": 50, "chf": 50, "czk": 1500, "dkk": 250, "eur": 50, "gbp": 30,
    "hkd": 400, "huf": 17500, "inr": 50, "jpy": 50, "mxn": 1000, "myr": 200, "nok": 300, "nzd": 50, "pln": 200,
    "ron": 200, "sek": 300, "sgd": 50, "thb": 1000,
}  # fmt: skip

_STEP_MINOR: dict[str, int] = dict.fromkeys(_EXPONENT_3.split(), 10) | {"isk": 100}

MAXIMUM_MINOR = 99_999_999
"""Stripe takes at most eight digits (IDR, COP and a few others take more; nobody has asked for those yet)."""


def exponent(currency: str) -> int:
    """The number of digits of the minor unit: 0, 2 or 3.

    Raises UnknownCurrency when `currency` is not a lower-case ISO 4217 code that can be charged.
    """
    try:
        return EXPONENTS[currency]
    except KeyError:
        raise UnknownCurrency(f"{currency!r} is not a currency that can be charged", field="currency") from None


def minimum_minor(currency: str) -> int:
    """The smallest amount that Stripe charges in `currency`, in minor units; 1 where Stripe names none."""
    return _MINIMUM_MINOR.get(currency, 1)


def step_minor(currency: str) -> int:
    """What an amount at Stripe has to be a multiple of: the last of three digits is 0, and ISK has no fractions."""
    return _STEP_MINOR.get(currency, 1)


def payout_step_minor(currency: str) -> int:
    """What can be paid to a bank account is a multiple of this: a króna has no fraction (ISO 4217), Stripe's has two digits."""
    return 100 if currency == "isk" else 1


class Money(msgspec.Struct, frozen=True, order=False):
    """An amount in minor units with its currency. Amounts of two currencies can't be added or compared."""

    amount_minor: int
    currency: str

    def _same(self, other: Money) -> None:
        if self.currency != other.currency:
            raise TypeError(f"can't mix {self.currency} and {other.currency}")

    def __add__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.amount_minor + other.amount_minor, self.currency)

    def __sub__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.amount_minor - other.amount_minor, self.currency)

    def __neg__(self) -> Money:
        return Money(-self.amount_minor, self.currency)

    def __lt__(self, other: Money) -> bool:
        self._same(other)
        return self.amount_minor < other.amount_minor

    def __str__(self) -> str:
        return format_minor(self.amount_minor, self.currency)


def format_minor(amount_minor: int, currency: str) -> str:
    """The amount as people write it: `format_minor(1234, "usd")` is `12.34 USD`."""
    digits = exponent(currency)
    sign = "-" if amount_minor < 0 else ""
    whole, part = divmod(abs(amount_minor), 10**digits)
    tail = f".{part:0{digits}d}" if digits else ""
    return f"{sign}{whole:,}{tail} {currency.upper()}"


def allocate(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` (0 or more) in proportion to `weights` (each 0 or more, not all 0), exactly: the parts sum to `total`.

    Largest remainder: each part is first rounded down, then the units left go to the largest remainders, the earlier
    part first where two are equal. With `total` at most the sum of the weights, no part is larger than its weight.
    """
    whole = sum(weights)
    if total < 0 or whole <= 0 or min(weights) < 0:
        raise ValueError(f"can't split {total} by {list(weights)}")
    parts = [total * weight // whole for weight in weights]
    left = total - sum(parts)
    if left:
        by_remainder = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
        for i in by_remainder[:left]:
            parts[i] += 1
    return parts
