"""What the payment driver needs of a store, so that routers and workers can drive payments with the same code."""

from __future__ import annotations

from typing import Protocol

from oncepay.payment import Payment
from oncepay.transition import Event


class StaleView(Exception):
    """The row changed since the look at Stripe that an event comes from: look again. Carries the row as it is."""

    def __init__(self, payment: Payment) -> None:
        super().__init__(payment.key)
        self.payment = payment


class PaymentStore(Protocol):
    """Reads and moves rows; each answer is behind the quorum."""

    async def get(self, key: str) -> Payment | None:
        """The row of `key`."""
        ...

    async def apply(self, payment: Payment, *events: Event, event: str) -> Payment:
        """Move the row in one commit; raises StaleView, and what `oncepay.transition.move` raises."""
        ...
