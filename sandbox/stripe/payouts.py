"""Payouts of the balance to the bank: pending, in transit, paid; or failed, also after they were paid."""

from __future__ import annotations

from sandbox.stripe import currencies, errors, ledger, model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import names
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.world import World, need

DEPART_S = 10.0
"""How long a payout stays `pending` and can be canceled."""
ARRIVE_S = 86_400.0
"""How long it is `in_transit`."""
RETURN_S = 86_400.0
"""How long after it was paid a bank returns it."""
DEFAULT_BANK = "ba_3SandboxB7SandboxXsuccess0"
FAILING_BANKS = {
    "ba_sandbox_no_account": (
        "no_account",
        "No bank account could be found for the details on file.",
    ),
    "ba_sandbox_account_closed": ("account_closed", "The bank account has been closed."),
}
"""Banks that refuse a payout instead of paying it."""
RETURNING_BANK = "ba_sandbox_returned"
"""The bank that returns a payout after it was `paid`."""
BANKS = (DEFAULT_BANK, RETURNING_BANK, *FAILING_BANKS)
CREATE_PARAMS = names(
    "amount currency description destination expand metadata method source_type statement_descriptor payout_method"
)


def register(world: World) -> None:
    """Connect the timers of this module."""
    world.timers.on("payout", lambda payout: _step(world, payout))


def _post(world: World, row: model.Payout, amount: int, type_: str, category: str) -> str:
    transaction = model.BalanceTransaction(
        id=world.balance_transactions.new_id(),
        created=world.now_s(),
        amount=amount,
        currency=row.currency,
        type=type_,
        reporting_category=category,
        available_on=world.now_s(),
        source=row.id,
        description=row.description or "STRIPE PAYOUT",
    )
    return world.balance_transactions.save(transaction).id


def create(world: World, call: Call) -> Result:
    """POST /v1/payouts, out of what is available."""
    params = call.params
    params.allow(CREATE_PARAMS)
    amount, currency = params.integer("amount"), params.text("currency")
    if amount is None:
        raise errors.missing_param("amount")
    if currency is None:
        raise errors.missing_param("currency")
    currency = currency.lower()
    if amount < 1:
        raise errors.invalid("Invalid positive integer", code="parameter_invalid_integer", param="amount")
    bank = params.text("destination") or DEFAULT_BANK
    if bank not in BANKS:
        raise errors.no_such("external account", bank, "destination")
    metadata, method = params.merge_metadata({}), params.choice("method", ("standard", "instant")) or "standard"
    available = ledger.totals(world).get(currency, (0, 0))[0]
    if amount > available:
        raise errors.invalid(
            f"You have insufficient funds in your Stripe account for this transfer. Your card balance is too low: "
            f"{currencies.shown(max(0, available), currency)}.",
            code="balance_insufficient",
            stored=True,
        )
    row = model.Payout(
        id=world.payouts.new_id(),
        created=world.now_s(),
        amount=amount,
        currency=currency,
        arrival_date=int(world.now_s() + ARRIVE_S),
        destination=bank,
        metadata=metadata,
        description=params.text("description"),
        method=method,
        statement_descriptor=params.text("statement_descriptor"),
    )
    row.balance_transaction = _post(world, row, -amount, "payout", "payout")
    world.payouts.save(row)
    world.events.emit("payout.created", "payout", row)
    world.timers.add("payout", row.id, DEPART_S)
    return Object("payout", row)


def _step(world: World, payout_id: str) -> None:
    row = world.payouts.get(payout_id)
    if row is None:
        return
    if row.status == "pending":
        _change(world, row, "in_transit", "payout.updated")
        world.timers.add("payout", row.id, ARRIVE_S)
    elif row.status == "in_transit":
        if row.destination in FAILING_BANKS:
            code, message = FAILING_BANKS[row.destination]
            _fail(world, row, code, message)
            return
        _change(world, row, "paid", "payout.paid")
        if row.destination == RETURNING_BANK:
            world.timers.add("payout", row.id, RETURN_S)
    elif row.status == "paid" and row.destination == RETURNING_BANK:
        _fail(world, row, "could_not_process", "The bank could not process this payout, and returned it.")


def _change(world: World, row: model.Payout, status: str, event: str) -> None:
    before = row.status
    row.status = status
    world.payouts.save(row)
    world.events.emit(event, "payout", row, {"status": before} if event == "payout.updated" else None)


def _fail(world: World, row: model.Payout, code: str, message: str) -> None:
    row.failure_code, row.failure_message = code, message
    row.failure_balance_transaction = _post(world, row, row.amount, "payout_failure", "payout_reversal")
    _change(world, row, "failed", "payout.failed")


def cancel(world: World, call: Call) -> Result:
    """POST /v1/payouts/{id}/cancel, while it is pending."""
    call.params.allow(frozenset({"expand"}))
    row = need(world.payouts, call.id, "payout", "payout")
    if row.status != "pending":
        raise errors.invalid("Payouts can only be canceled while they are pending.", code="payouts_not_allowed", stored=True)
    row.failure_balance_transaction = _post(world, row, row.amount, "payout_cancel", "payout_reversal")
    _change(world, row, "canceled", "payout.canceled")
    return Object("payout", row)


def reverse(world: World, call: Call) -> Result:
    """POST /v1/payouts/{id}/reverse, once it is paid: a payout of the negative amount."""
    params = call.params
    params.allow(frozenset({"expand", "metadata"}))
    row = need(world.payouts, call.id, "payout", "payout")
    if row.status != "paid" or row.reversed_by is not None:
        raise errors.invalid("Only paid payouts can be reversed, and once only.", stored=True)
    back = model.Payout(
        id=world.payouts.new_id(),
        created=world.now_s(),
        amount=-row.amount,
        currency=row.currency,
        arrival_date=world.now_s(),
        destination=row.destination,
        status="paid",
        metadata=params.merge_metadata({}),
        original_payout=row.id,
    )
    back.balance_transaction = _post(world, back, row.amount, "payout", "payout_reversal")
    row.reversed_by = back.id
    world.payouts.save(back)
    world.payouts.save(row)
    world.events.emit("payout.created", "payout", back)
    world.events.emit("payout.paid", "payout", back)
    world.events.emit("payout.updated", "payout", row, {"reversed_by": None})
    return Object("payout", back)


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/payouts/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("payout", need(world.payouts, call.id, "payout", "payout"))


def update(world: World, call: Call) -> Result:
    """POST /v1/payouts/{id}: metadata."""
    params = call.params
    params.allow(frozenset({"metadata", "expand"}))
    row = need(world.payouts, call.id, "payout", "payout")
    row.metadata = params.merge_metadata(row.metadata)
    world.payouts.save(row)
    world.events.emit("payout.updated", "payout", row)
    return Object("payout", row)


def index(world: World, call: Call) -> Result:
    """GET /v1/payouts."""
    params = call.params
    params.allow(COMMON | {"status", "arrival_date", "destination"})
    status = params.text("status")
    return of_table(
        world.payouts,
        params,
        "payout",
        "/v1/payouts",
        lambda row: views.payout(world, row),
        [("status", status)] if status else [],
    )
