"""The payer's balances at Tipalti: fundings, what payments and fees take, and the day's cut-off time.

A payment is charged when it would be scheduled; without enough money it waits in `Pending funds` until some comes in. By
default money comes by itself (`automatic`) when a payment lacks it, as from a bank account that Tipalti may debit.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from sandbox.store import KeyedRows
from sandbox.tipalti import model
from sandbox.tipalti.world import World

AMOUNT_MAX = 10**15
AUTOMATIC_MINOR = 1_000_000
"""What comes by itself at least."""
DAY_MINUTES = 24 * 60
NO_CUTOFF = -1


class FundingSettings(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `PUT /_control/funding`."""

    automatic: bool


class Funds(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/funding`: minor units, negative to take money back to the bank."""

    amount: int
    currency: str = "USD"


class CutOff(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `PUT /_control/cutoff`: `at` is `HH:MM` (UTC), null for none."""

    at: str | None = None


class Account:
    """Balances by currency, and the account's settings."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._balances = KeyedRows(world.store, "balances", ("currency", "amount"))
        self._settings = KeyedRows(world.store, "account", ("name", "value"))
        self.balances: dict[str, int] = dict(world.store.query("SELECT currency, amount FROM balances"))
        known = dict(world.store.query("SELECT name, value FROM account"))
        self.automatic = bool(known.get("automatic", 1))
        self.cutoff_minutes = int(known.get("cutoff", NO_CUTOFF))

    def add(self, currency: str, amount: int) -> None:
        """Move a balance by `amount` minor units."""
        self.balances[currency] = self.balances.get(currency, 0) + amount
        self._balances.put(currency, self.balances[currency])

    def charge(self, currency: str, amount: int) -> bool:
        """Take `amount` for a payment and its fee; False when it isn't there."""
        lacking = amount - self.balances.get(currency, 0)
        if lacking > 0:
            if not self.automatic:
                return False
            self.fund(currency, max(lacking, AUTOMATIC_MINOR), automatic=True)
        self.add(currency, -amount)
        return True

    def fund(self, currency: str, amount: int, *, automatic: bool = False) -> model.Funding:
        """Money comes in from the bank, or goes back."""
        world = self._world
        row = model.Funding(world.fundings.new_id(), world.now_s(), amount, currency, automatic)
        world.fundings.save(row)
        self.add(currency, amount)
        return row

    def wait_s(self) -> float:
        """Seconds of the clock until a payment that was submitted now is worked on: past the cut-off, the next day."""
        if self.cutoff_minutes == NO_CUTOFF:
            return 0.0
        of_day_s = self._world.clock.now() % 86_400
        return 0.0 if of_day_s < self.cutoff_minutes * 60 else 86_400 - of_day_s

    def set_automatic(self, automatic: bool) -> None:
        """Whether money comes by itself."""
        self.automatic = automatic
        self._settings.put("automatic", int(automatic))

    def set_cutoff(self, minutes: int) -> None:
        """The cut-off, in minutes of the day (UTC), or NO_CUTOFF."""
        self.cutoff_minutes = minutes
        self._settings.put("cutoff", minutes)


def show(row: model.Funding, exponent: int) -> dict[str, object]:
    """A funding in the API's shape."""
    return {
        "id": row.id,
        "amount": {"amount": Decimal(row.amount).scaleb(-exponent), "currency": row.currency},
        "type": "AUTOMATIC" if row.automatic else "WIRE",
        "createdDate": row.created,
    }


def control_settings(account: Account, body: bytes) -> dict[str, object]:
    """`PUT /_control/funding`."""
    account.set_automatic(msgspec.json.decode(body, type=FundingSettings).automatic)
    return shown(account)


def control_fund(account: Account, body: bytes) -> dict[str, object]:
    """`POST /_control/funding`."""
    asked = msgspec.json.decode(body, type=Funds)
    if not 0 < abs(asked.amount) < AMOUNT_MAX or len(asked.currency) != 3:
        raise ValueError("amount is in minor units and not 0, currency has three letters")
    row = account.fund(asked.currency.upper(), asked.amount)
    return {"id": row.id, **shown(account)}


def control_cutoff(account: Account, body: bytes) -> dict[str, object]:
    """`PUT /_control/cutoff`."""
    asked = msgspec.json.decode(body or b"{}", type=CutOff)
    account.set_cutoff(NO_CUTOFF if asked.at is None else _minutes(asked.at))
    return shown(account)


def _minutes(text: str) -> int:
    hours, colon, minutes = text.partition(":")
    if not (colon and hours.isdigit() and minutes.isdigit() and int(minutes) < 60):
        raise ValueError("at is HH:MM")
    at = int(hours) * 60 + int(minutes)
    if at >= DAY_MINUTES:
        raise ValueError("at is before 24:00")
    return at


def shown(account: Account) -> dict[str, object]:
    """The account as the control API shows it; balances in minor units."""
    minutes = account.cutoff_minutes
    cutoff = None if minutes == NO_CUTOFF else f"{minutes // 60:02d}:{minutes % 60:02d}"
    return {"automatic": account.automatic, "cutoff": cutoff, "balances": dict(account.balances)}
