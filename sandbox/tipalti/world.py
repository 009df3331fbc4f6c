"""The payer's account at Tipalti: all its state."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from pathlib import Path

from sandbox.clock import SCHEMA as CLOCK_SCHEMA
from sandbox.clock import Clock, Timers
from sandbox.counts import Counts
from sandbox.delivery import SCHEMA as DELIVERY_SCHEMA
from sandbox.delivery import Deliveries, Outgoing
from sandbox.faults import Faults
from sandbox.store import KeyedRows, Store, Table
from sandbox.tipalti import model

SCHEMA_FILE = Path(__file__).with_name("schema.sql")
USER_AGENT = "Tipalti-IPN"
RECEIVERS_MAX = 10


class World:
    """State, clock and notifications of one payer."""

    def __init__(self, state: Path | None) -> None:
        self.store = Store(state, CLOCK_SCHEMA + DELIVERY_SCHEMA + SCHEMA_FILE.read_text())
        self.counts = Counts()
        self.faults = Faults(self.counts)
        self.clock = Clock(self.store)
        self.timers = Timers(self.store, self.clock)
        self.payees = Table(self.store, "payees", "payee_", model.Payee, {"ref_code": lambda row: row.ref_code})
        self.batches = Table(self.store, "batches", "batch_", model.Batch)
        self.payments = Table(
            self.store,
            "payments",
            "pay_",
            model.Payment,
            {
                "ref_code": lambda row: row.ref_code,
                "payee": lambda row: row.payee,
                "status": lambda row: row.status,
                "batch": lambda row: row.batch,
            },
        )
        self.fundings = Table(self.store, "fundings", "fund_", model.Funding, {"currency": lambda row: row.currency})
        self.notices = Table(self.store, "notices", "ipn_", model.Notice)
        self.receivers = Table(self.store, "receivers", "recv_", model.Receiver)
        self.tokens = KeyedRows(self.store, "tokens", ("token", "expires"))
        self.deliveries = Deliveries(
            store=self.store,
            clock=self.clock,
            counts=self.counts,
            faults=self.faults,
            user_agent=USER_AGENT,
            render=self._render,
        )

    def now_s(self) -> int:
        """The clock's whole seconds since 1970."""
        return int(self.clock.now())

    def notify(self, type_: str, **about: object) -> None:
        """Tell every receiver that `type_` happened."""
        receivers = self.receivers.page(RECEIVERS_MAX)
        identifier = self.notices.new_id()
        now = self.now_s()
        body = json.dumps({"id": identifier, "type": type_, "createdDate": now, "eventData": about}, separators=(",", ":"))
        self.notices.save(model.Notice(identifier, now, type_, body.encode()))
        ids = [row.id for row in receivers]
        if ids and self.faults.hits("webhook_doubled", "event"):
            self.counts.webhooks["doubled"] += 1
            self.deliveries.enqueue(identifier, ids, lossless=True)
        self.deliveries.enqueue(identifier, ids)

    def _render(self, notice_id: str, receiver_id: str) -> Outgoing | None:
        notice, receiver = self.notices.get(notice_id), self.receivers.get(receiver_id)
        if notice is None or receiver is None:
            return None
        return Outgoing(
            receiver.url, notice.body, {"tipalti-signature": signature(receiver.secret, int(time.time()), notice.body)}
        )


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """The `tipalti-signature` header: the time and the HMAC-SHA256 of `<time>-<body>` in hex."""
    digest = hmac.new(secret.encode(), f"{timestamp}-".encode() + body, hashlib.sha256).hexdigest()
    return f"{timestamp},{digest}"
