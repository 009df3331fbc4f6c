"""The currency in which the account settles: what is charged, refunded or disputed in another is exchanged at a fixed rate."""

from __future__ import annotations

from fractions import Fraction

RATES = {"eur": Fraction(108, 100), "gbp": Fraction(125, 100), "jpy": Fraction(67, 100)}
"""Minor units of US dollars for one minor unit; every other currency is exchanged one to one."""


class Settlement:
    """`currency` is empty where each currency settles in itself."""

    def __init__(self, currency: str = "") -> None:
        self.currency = currency

    def of(self, amount: int, currency: str) -> tuple[int, str]:
        """What `amount` minor units of `currency` come to, rounded half away from zero, and in which currency."""
        if not self.currency or currency == self.currency:
            return amount, currency
        exact = abs(amount) * RATES.get(currency, Fraction(1)) / RATES.get(self.currency, Fraction(1))
        rounded = int(exact + Fraction(1, 2))
        return (rounded if amount >= 0 else -rounded), self.currency
