"""Tipalti's objects, as far as this project reads them. Unknown members are ignored; missing ones have defaults."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

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
    refCode: str
    status: str
    amountSubmitted: AmountObject
    payerFees: AmountObject | None = None
    payeeId: str = ""
    reason: str | None = None

    def view(self) -> PaymentView:
        """As the core knows it. Raises ValueError for an amount that can't be."""
        fee, submitted = self.payerFees, self.amountSubmitted
        return PaymentView(
            payment=self.id,
            ref_code=self.refCode,
            status=self.status,
            amount=submitted.minor(),
            currency=submitted.currency.lower(),
            fee=fee.minor() if fee else 0,
            fee_currency=fee.currency.lower() if fee else "",
            reason=self.reason or "",
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


class FundingObject(msgspec.Struct):
    """Money that came to the payer's balance from its bank (negative: went back)."""

    id: str
    amount: AmountObject
    type: str = ""
    createdDate: int = 0


class PaymentPage(msgspec.Struct):
    """A page of payments, oldest first; `nextCursor` leads on."""

    items: list[PaymentObject]
    nextCursor: str | None = None


class PayeePage(msgspec.Struct):
    """A page of payees."""

    items: list[PayeeObject]
    nextCursor: str | None = None


class FundingPage(msgspec.Struct):
    """A page of fundings, oldest first."""

    items: list[FundingObject]
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
