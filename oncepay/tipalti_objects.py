"""Tipalti's objects, as far as this project reads them. Unknown members are ignored; missing ones have defaults."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from oncepay.money import EXPONENTS
from oncepay.payout import PaymentView


class AmountObject(msgspec.Struct):
    """Money in whole units of its currency, for example 12.34."""

    amount: Decimal
    currency: str

    def minor(self) -> int:
        """Minor units. Raises ValueError when it isn't a whole number of them, or the currency is not known."""
        exponent = EXPONENTS.get(self.currency.lower())
        if exponent is None:
            raise ValueError(f"the currency {self.currency!r} is not known")
        try:
            scaled = self.amount.scaleb(exponent)
            whole = int(scaled)
        except (InvalidOperation, OverflowError) as error:
            raise ValueError(f"{self.amount} is no amount") from error
        if whole != scaled:
            raise ValueError(f"{self.amount} {self.currency} is no whole number of minor units")
        return whole


def amount_object(amount_minor: int, currency: str) -> AmountObject:
    """Minor units as Tipalti takes them."""
    return AmountObject(Decimal(amount_minor).scaleb(-EXPONENTS[currency]), currency.upper())


MILLISECONDS_FROM = 10**11
"""A number of at least so much is in milliseconds: as seconds it would be in the year 5138."""


def moment_s(value: object) -> int:
    """Whole seconds since 1970 of a time in an answer: a number of seconds or milliseconds since then, or ISO 8601.

    0 where there is none, or it can't be read. A time without a zone is UTC.
    """
    if isinstance(value, str):
        try:
            found = dt.datetime.fromisoformat(value)
            return max(0, int((found if found.tzinfo else found.replace(tzinfo=dt.UTC)).timestamp()))
        except (ValueError, OverflowError):
            return 0
    if not isinstance(value, int | float) or not 0 < value < MILLISECONDS_FROM * 1000:
        return 0
    return int(value / 1000 if value >= MILLISECONDS_FROM else value)


class InstructionObject(msgspec.Struct):
    """A line of a batch."""

    payeeId: str
    amountSubmitted: AmountObject
    refCode: str


class LineObject(msgspec.Struct):
    """What became of a line: `OK`, `Warning` (a payment was made, in a state that says why it won't be paid) or `Error`."""

    refCode: str
    result: str
    paymentId: str | None = None
    errorCode: str | None = None
    errorMessage: str | None = None


class BatchObject(msgspec.Struct):
    """A batch's answer."""

    id: str
    paymentInstructions: list[LineObject]


class PaymentObject(msgspec.Struct):
    """A payment order."""

    id: str
    status: str
    amountSubmitted: AmountObject
    refCode: str | None = None
    payerFees: AmountObject | None = None
    payeeId: str = ""
    reason: str | None = None
    submittedDate: Any = None
    statusChangedDate: Any = None

    def view(self) -> PaymentView:
        """As the core knows it. Raises ValueError for an amount that can't be."""
        fee, submitted = self.payerFees, self.amountSubmitted
        return PaymentView(
            payment=self.id,
            ref_code=self.refCode or "",
            status=self.status,
            amount=submitted.minor(),
            currency=submitted.currency.lower(),
            fee=fee.minor() if fee else 0,
            fee_currency=fee.currency.lower() if fee else "",
            reason=self.reason or "",
            submitted_s=moment_s(self.submittedDate),
            changed_s=moment_s(self.statusChangedDate),
        )


class PayeeObject(msgspec.Struct):
    """A payee. `refCode` is the payer's own id for it."""

    id: str
    refCode: str = ""
    isPayable: bool = False
    notPayableReasons: list[str] = []
    status: str = ""

    @property
    def held_because(self) -> str:
        """Why it can't be paid; empty when it can."""
        return "" if self.isPayable else ", ".join(self.notPayableReasons) or self.status or "not payable"


class FundingView(msgspec.Struct, frozen=True):
    """A funding as the core knows it: `amount` in minor units of `currency`, `created_s` since 1970 (0: not told)."""

    funding: str
    currency: str
    amount: int
    created_s: int


class FundingObject(msgspec.Struct):
    """Money that came to the payer's balance from its bank (negative: went back)."""

    id: str
    amount: AmountObject
    type: str = ""
    createdDate: Any = None

    def view(self) -> FundingView:
        """Raises ValueError for an amount that can't be."""
        return FundingView(self.id, self.amount.currency.lower(), self.amount.minor(), moment_s(self.createdDate))


class PaymentPage(msgspec.Struct):
    """A page of payments, oldest first; `nextCursor` leads on."""

    items: list[PaymentObject]
    nextCursor: str | None = None


class RawPage(msgspec.Struct):
    """A page whose items are read one by one: one of them may be such as nobody expects."""

    items: list[msgspec.Raw]
    nextCursor: str | None = None


class PayeePage(msgspec.Struct):
    """A page of payees."""

    items: list[PayeeObject]
    nextCursor: str | None = None


class TokenObject(msgspec.Struct):
    """An access token and for how many seconds it is good; a new refresh token when the old one is used up."""

    access_token: str
    expires_in: int = 3600
    refresh_token: str = ""


class NotificationData(msgspec.Struct):
    """What a notification is about."""

    paymentId: str = ""
    refCode: str = ""
    payeeId: str = ""


class NotificationObject(msgspec.Struct):
    """A notification (IPN)."""

    id: str
    type: str
    eventData: NotificationData = msgspec.field(default_factory=NotificationData)
