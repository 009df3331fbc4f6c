"""The account: every object, the clock, and what happens to them. Handlers get one of these."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sandbox import ids
from sandbox.clock import SCHEMA as CLOCK_SCHEMA
from sandbox.clock import Clock, Timers
from sandbox.counts import Counts
from sandbox.delivery import SCHEMA as DELIVERY_SCHEMA
from sandbox.faults import Faults
from sandbox.store import Row, Store, Table
from sandbox.stripe import errors, model
from sandbox.stripe.settlement import Settlement

if TYPE_CHECKING:
    from sandbox.stripe.events import Events
    from sandbox.stripe.intents import MetadataIndex

SCHEMA_FILE = Path(__file__).with_name("schema.sql")
API_VERSION = "2026-10-28.endive"

R = TypeVar("R", bound=Row)


class World:
    """All state of one Stripe test account."""

    events: Events
    metadata: MetadataIndex

    def __init__(self, state: Path | None) -> None:
        self.store = Store(state, CLOCK_SCHEMA + DELIVERY_SCHEMA + SCHEMA_FILE.read_text())
        self.counts = Counts()
        self.faults = Faults(self.counts)
        self.clock = Clock(self.store)
        self.timers = Timers(self.store, self.clock)
        self.url = ""
        self.settlement = Settlement()
        store = self.store
        self.intents = Table(store, "payment_intents", "pi_", model.Intent, {"customer": lambda row: row.customer})
        self.charges = Table(
            store,
            "charges",
            "ch_",
            model.Charge,
            {"intent": lambda row: ids.ordinal(row.payment_intent), "customer": lambda row: row.customer},
        )
        self.balance_transactions = Table(
            store,
            "balance_transactions",
            "txn_",
            model.BalanceTransaction,
            {
                "source": lambda row: row.source,
                "type": lambda row: row.type,
                "currency": lambda row: row.currency,
                "net": lambda row: row.net,
                "available_on": lambda row: row.available_on,
            },
        )
        self.refunds = Table(
            store,
            "refunds",
            "re_",
            model.Refund,
            {"charge": lambda row: row.charge, "intent": lambda row: row.payment_intent},
        )
        self.disputes = Table(
            store,
            "disputes",
            "dp_",
            model.Dispute,
            {"charge": lambda row: row.charge, "intent": lambda row: row.payment_intent},
        )
        self.payment_methods = Table(store, "payment_methods", "pm_", model.PaymentMethod, {"customer": lambda row: row.customer})
        self.customers = Table(
            store,
            "customers",
            "cus_",
            model.Customer,
            {
                "deleted": lambda row: int(row.deleted),
                "email": lambda row: str(row.extra["email"]) if row.extra and row.extra.get("email") else None,
            },
        )
        self.payouts = Table(store, "payouts", "po_", model.Payout, {"status": lambda row: row.status})
        self.endpoints = Table(store, "webhook_endpoints", "we_", model.WebhookEndpoint)
        self.tables: dict[str, Table[Any]] = {
            "payment_intent": self.intents,
            "charge": self.charges,
            "balance_transaction": self.balance_transactions,
            "refund": self.refunds,
            "dispute": self.disputes,
            "payment_method": self.payment_methods,
            "customer": self.customers,
            "payout": self.payouts,
            "webhook_endpoint": self.endpoints,
        }
        self._kinds = {table.prefix: kind for kind, table in self.tables.items()}

    def kind_of(self, identifier: str) -> str | None:
        """Which kind of object an id names, or None."""
        return self._kinds.get(identifier[: identifier.find("_") + 1])

    def now_s(self) -> int:
        """The clock's whole seconds since 1970, as objects carry them."""
        return int(self.clock.now())


def _email(row: model.Customer) -> str | None:
    value = (row.extra or {}).get("email")
    return value if isinstance(value, str) else None


def need(table: Table[R], identifier: str, kind: str, param: str) -> R:
    """The object of that id; 404 as Stripe words it when there is none."""
    row = table.get(identifier)
    if row is None:
        raise errors.no_such(kind, identifier, param)
    return row


def pair_hash(key: str, value: str) -> int:
    """A pair of metadata as a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{key}\0{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
