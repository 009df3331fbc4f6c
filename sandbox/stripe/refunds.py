"""Refunds: whole or part, pending ones, and ones that fail after they had succeeded."""

from __future__ import annotations

from sandbox.stripe import cards, currencies, errors, model, views
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.forms import JsonObject, names
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.world import World, need

STEP_S = 2.0
"""How long a test refund stays `pending`, or `succeeded` before it fails."""
REASONS = ("duplicate", "fraudulent", "requested_by_customer")
CREATE_PARAMS = names(
    """
    amount charge currency customer expand instructions_email metadata origin payment_intent reason refund_application_fee
    reverse_transfer
    """
)


def register(world: World) -> None:
    """Connect the timers of this module."""
    world.timers.on("refund", lambda refund: _step(world, refund))


def _post(world: World, row: model.Refund, amount: int, category: str) -> str:
    settled, currency = world.settlement.of(amount, row.currency)
    transaction = model.BalanceTransaction(
        id=world.balance_transactions.new_id(),
        created=world.now_s(),
        amount=settled,
        currency=currency,
        type=category,
        reporting_category=category,
        available_on=world.now_s(),
        source=row.id,
        description="REFUND FOR CHARGE" if category == "refund" else "REFUND FAILURE",
    )
    return world.balance_transactions.save(transaction).id


def _charge_of(world: World, call: Call) -> model.Charge:
    """The charge that the call means, by charge or by intent."""
    charge_id, intent_id = call.params.text("charge"), call.params.text("payment_intent")
    if charge_id is not None:
        charge = need(world.charges, charge_id, "charge", "id")
        if intent_id is not None and charge.payment_intent != intent_id:
            raise errors.invalid("The charge doesn't belong to that PaymentIntent.", param="payment_intent")
    elif intent_id is not None:
        intent = need(world.intents, intent_id, "payment_intent", "payment_intent")
        found = world.charges.get(intent.latest_charge) if intent.latest_charge else None
        if found is None or found.status != "succeeded":
            raise errors.invalid(
                f"This PaymentIntent ({intent.id}) does not have a successful charge to refund.",
                code="payment_intent_unexpected_state" if intent.status == "processing" else None,
                param="payment_intent",
            )
        charge = found
    else:
        raise errors.invalid(
            "One of the following params should be provided for this request: payment_intent or charge.", code="parameter_missing"
        )
    return charge


def create(world: World, call: Call) -> Result:
    """POST /v1/refunds."""
    params = call.params
    params.allow(CREATE_PARAMS)
    asked = params.integer("amount")
    reason = params.choice("reason", REASONS)
    metadata = params.merge_metadata({})
    charge = _charge_of(world, call)
    if charge.status != "succeeded" or not charge.captured:
        raise errors.invalid(
            f"Charge {charge.id} has not been captured; cancel its PaymentIntent instead.",
            code="charge_not_refundable",
            stored=True,
        )
    if charge.dispute is not None:
        dispute = world.disputes.get(charge.dispute)
        if dispute is not None and not dispute.status.startswith("warning"):
            raise errors.invalid(
                f"Charge {charge.id} has been charged back; cannot issue a refund.", code="charge_disputed", stored=True
            )
    left = charge.amount_captured - charge.amount_refunded
    if left <= 0:
        raise errors.invalid(f"Charge {charge.id} has already been refunded.", code="charge_already_refunded", stored=True)
    amount = left if asked is None else asked
    if amount < 1:
        raise errors.invalid("Invalid positive integer", code="parameter_invalid_integer", param="amount")
    if amount > left:
        raise errors.invalid(
            f"Refund amount ({currencies.shown(amount, charge.currency)}) is greater than unrefunded amount on charge "
            f"({currencies.shown(left, charge.currency)})",
            param="amount",
            stored=True,
        )
    fate = cards.CARDS[charge.card].refund
    row = model.Refund(
        id=world.refunds.new_id(),
        created=world.now_s(),
        amount=amount,
        currency=charge.currency,
        charge=charge.id,
        payment_intent=charge.payment_intent,
        payment_method=charge.payment_method,
        status="pending" if fate == "pending" else "succeeded",
        metadata=metadata,
        reason=reason,
    )
    row.balance_transaction = _post(world, row, -amount, "refund")
    before = charge.amount_refunded
    charge.amount_refunded += amount
    charge.refunds = [*charge.refunds, row.id]
    world.refunds.save(row)
    world.charges.save(charge)
    world.events.emit("refund.created", "refund", row)
    world.events.emit("charge.refunded", "charge", charge, {"amount_refunded": before})
    if fate != "succeeded":
        world.timers.add("refund", row.id, STEP_S)
    return Object("refund", row)


def _step(world: World, refund_id: str) -> None:
    row = world.refunds.get(refund_id)
    if row is None:
        return
    if row.status == "pending":
        _change(world, row, "succeeded")
        return
    if row.status != "succeeded":
        return
    charge = world.charges.get(row.charge)
    assert charge is not None
    row.failure_reason = "expired_or_canceled_card"
    row.failure_balance_transaction = _post(world, row, row.amount, "refund_failure")
    charge.amount_refunded -= row.amount
    world.charges.save(charge)
    _change(world, row, "failed")


def _change(world: World, row: model.Refund, status: str) -> None:
    previous: JsonObject = {"status": row.status}
    row.status = status
    world.refunds.save(row)
    world.events.emit("refund.updated", "refund", row, previous)
    world.events.emit("charge.refund.updated", "refund", row, previous)
    if status == "failed":
        world.events.emit("refund.failed", "refund", row)


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/refunds/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("refund", need(world.refunds, call.id, "refund", "refund"))


def update(world: World, call: Call) -> Result:
    """POST /v1/refunds/{id}: metadata."""
    params = call.params
    params.allow(frozenset({"metadata", "expand"}))
    row = need(world.refunds, call.id, "refund", "refund")
    row.metadata = params.merge_metadata(row.metadata)
    world.refunds.save(row)
    world.events.emit("refund.updated", "refund", row)
    return Object("refund", row)


def cancel(world: World, call: Call) -> Result:
    """POST /v1/refunds/{id}/cancel: card refunds can't be canceled."""
    call.params.allow(frozenset({"expand"}))
    row = need(world.refunds, call.id, "refund", "refund")
    raise errors.invalid(
        f"Refund {row.id} has a status of {row.status}; only refunds in requires_action can be canceled.", stored=True
    )


def index(world: World, call: Call) -> Result:
    """GET /v1/refunds?charge=&payment_intent= and GET /v1/charges/{id}/refunds."""
    params = call.params
    params.allow(COMMON | {"charge", "payment_intent"})
    charge, intent = call.id or params.text("charge"), params.text("payment_intent")
    filters = [(column, value) for column, value in (("charge", charge), ("intent", intent)) if value]
    url = f"/v1/charges/{call.id}/refunds" if call.id else "/v1/refunds"
    return of_table(world.refunds, params, "refund", url, lambda row: views.refund(world, row), filters)
