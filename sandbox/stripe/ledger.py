"""Charges, balance transactions and the balance, to be read."""

from __future__ import annotations

import msgspec

from sandbox import ids
from sandbox.store import SqlValue
from sandbox.stripe import errors, listing, model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import Json, JsonObject
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.world import World, need

UPDATE_CHARGE_PARAMS = frozenset(
    {"metadata", "description", "customer", "receipt_email", "shipping", "transfer_group", "fraud_details", "expand"}
)
BALANCE_PARAMS = COMMON | {"currency", "payout", "source", "type"}


def retrieve_charge(world: World, call: Call) -> Result:
    """GET /v1/charges/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("charge", need(world.charges, call.id, "charge", "id"))


def update_charge(world: World, call: Call) -> Result:
    """POST /v1/charges/{id}: metadata and description."""
    params = call.params
    params.allow(UPDATE_CHARGE_PARAMS)
    row = need(world.charges, call.id, "charge", "id")
    metadata, description = params.merge_metadata(row.metadata), params.text("description")
    row.metadata = metadata
    if "description" in params:
        row.description = description
    world.charges.save(row)
    world.events.emit("charge.updated", "charge", row)
    return Object("charge", row)


def list_charges(world: World, call: Call) -> Result:
    """GET /v1/charges."""
    params = call.params
    params.allow(COMMON | {"customer", "payment_intent", "transfer_group"})
    filters: list[tuple[str, SqlValue]] = []
    intent, customer = params.text("payment_intent"), params.text("customer")
    if intent:
        need(world.intents, intent, "payment_intent", "payment_intent")
        filters.append(("intent", ids.ordinal(intent)))
    if customer:
        filters.append(("customer", customer))
    return of_table(world.charges, params, "charge", "/v1/charges", lambda row: views.charge(world, row), filters)


def retrieve_transaction(world: World, call: Call) -> Result:
    """GET /v1/balance_transactions/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("balance_transaction", need(world.balance_transactions, call.id, "balance transaction", "id"))


def list_transactions(world: World, call: Call) -> Result:
    """GET /v1/balance_transactions, by source, type, currency and time."""
    params = call.params
    params.allow(BALANCE_PARAMS)
    source = params.text("source")
    url = "/v1/balance_transactions"
    if params.text("payout"):
        raise errors.invalid(
            "Balance transaction history can only be filtered on automatic payouts, not manual payouts.", param="payout"
        )
    if source:
        window = listing.Window(world.balance_transactions, params, "balance transaction")
        rows = sorted(_of_source(world, source), key=lambda row: ids.ordinal(row.id), reverse=not window.ascending)
        kept = [row for row in rows if window.low < ids.ordinal(row.id) < window.high]
        return listing.answer(kept, window, url, lambda row: views.balance_transaction(world, row))
    filters = [(name, value) for name in ("type", "currency") if (value := params.text(name))]
    return of_table(
        world.balance_transactions,
        params,
        "balance transaction",
        url,
        lambda row: views.balance_transaction(world, row),
        filters,
    )


def _of_source(world: World, source: str) -> list[model.BalanceTransaction]:
    """The balance transactions that a charge, refund, dispute or payout caused; they are named by it."""
    named: list[str | None] = []
    kind = world.kind_of(source)
    if kind not in ("charge", "refund", "dispute", "payout"):
        raise errors.no_such("source", source, "source")
    row = world.tables[kind].get(source)
    if row is None:
        raise errors.no_such("source", source, "source")
    if kind == "dispute":
        named += row.balance_transactions
    else:
        named.append(row.balance_transaction)
        if kind != "charge":
            named.append(row.failure_balance_transaction)
    return [found for name in named if name and (found := world.balance_transactions.get(name)) is not None]


class Posting(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /_control/balance_transactions`: one of Stripe's other postings. Amounts in minor units."""

    type: str
    amount: int
    currency: str = "usd"
    fee: int = 0
    description: str = ""


OTHER_CATEGORIES = {
    "adjustment": "other_adjustment",
    "stripe_fee": "fee",
    "topup": "topup",
    "topup_reversal": "topup_reversal",
    "reserve_transaction": "risk_reserved_funds",
    "reserved_funds": "risk_reserved_funds",
    "contribution": "contribution",
}
"""Reporting category by type, for what the sandbox posts on request."""


def post_other(world: World, asked: Posting) -> JsonObject:
    """Post a balance transaction that no payment caused (a billing fee, a reserve, a top-up, an adjustment)."""
    category = OTHER_CATEGORIES.get(asked.type)
    if category is None:
        raise ValueError(f"type is one of {', '.join(sorted(OTHER_CATEGORIES))}")
    row = model.BalanceTransaction(
        id=world.balance_transactions.new_id(),
        created=world.now_s(),
        amount=asked.amount,
        currency=asked.currency.lower(),
        type=asked.type,
        reporting_category=category,
        available_on=world.now_s(),
        fee=asked.fee,
        description=asked.description or None,
    )
    return views.balance_transaction(world, world.balance_transactions.save(row))


def totals(world: World) -> dict[str, tuple[int, int]]:
    """Available and pending sums by currency, in minor units."""
    rows = world.store.query(
        "SELECT currency, sum(CASE WHEN available_on <= ?1 THEN net ELSE 0 END), "
        "sum(CASE WHEN available_on > ?1 THEN net ELSE 0 END) FROM balance_transactions GROUP BY currency",
        (world.now_s(),),
    )
    return {currency: (available, pending) for currency, available, pending in rows}


def balance(world: World, call: Call) -> Result:
    """GET /v1/balance."""
    call.params.allow(frozenset({"expand"}))
    sums = totals(world) or {"usd": (0, 0)}
    available: list[Json] = []
    pending: list[Json] = []
    reserved: list[Json] = []
    for currency, (now, later) in sorted(sums.items()):
        available.append({"amount": now, "currency": currency, "source_types": {"card": now}})
        pending.append({"amount": later, "currency": currency, "source_types": {"card": later}})
        reserved.append({"amount": 0, "currency": currency})
    return {
        "object": "balance",
        "available": available,
        "connect_reserved": reserved,
        "livemode": False,
        "pending": pending,
    }
