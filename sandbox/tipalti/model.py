"""What the stand-in remembers. Amounts are minor units of their currency, times whole seconds since 1970."""

from __future__ import annotations

import msgspec


class Payee(msgspec.Struct, array_like=True):
    """Someone who can be paid. `ref_code` is the payer's own id for them, at most 64 characters.

    `status` is one of `payees.STATUSES`. `payable` is whether the payee has said how it wants to be paid, `tax_form` whether
    it has handed one in; `show` tells whether it can be paid.
    """

    id: str
    created: int
    ref_code: str
    name: str | None = None
    email: str | None = None
    entity_type: str = "INDIVIDUAL"
    status: str = "PENDING_ONBOARDING"
    payable: bool = False
    tax_form: bool = True


class Batch(msgspec.Struct, array_like=True):
    """A payment batch and what became of each of its lines."""

    id: str
    created: int
    lines: list[dict[str, str | None]]


class Payment(msgspec.Struct, array_like=True):
    """One payment order."""

    id: str
    created: int
    ref_code: str
    payee: str
    batch: str
    amount: int
    currency: str
    status: str = "Submitted"
    changed: int = 0
    reason: str | None = None
    fee: int = 0
    funded: bool = False
    """Whether the payer's balance was charged with it."""
    step: int = 0
    """The number of its next step."""


class Funding(msgspec.Struct, array_like=True):
    """Money that came to the payer's balance from its bank; minor units, negative when it was taken back."""

    id: str
    created: int
    amount: int
    currency: str
    automatic: bool = False


class Notice(msgspec.Struct, array_like=True):
    """A notification (IPN): `type`, about the payment or payee `subject`, as JSON."""

    id: str
    created: int
    type: str
    body: bytes


class Receiver(msgspec.Struct, array_like=True):
    """Where notifications are sent, and the secret that they are signed with."""

    id: str
    created: int
    url: str
    secret: str
