"""Disputes and inquiries of the test cards, decided by evidence text, with the money that they move."""

from __future__ import annotations

from sandbox.stripe import cards, currencies, errors, model
from sandbox.stripe.call import Call, Object, Result
from sandbox.stripe.listing import COMMON, of_table
from sandbox.stripe.views import EVIDENCE, dispute
from sandbox.stripe.world import World, need

RESPONSE_S = 21 * 86_400
WINNING, LOSING = "winning_evidence", "losing_evidence"
CLOSED = ("won", "lost", "warning_closed", "prevented")
LIST_PARAMS = COMMON | {"charge", "payment_intent"}
UPDATE_PARAMS = frozenset({"evidence", "metadata", "submit", "expand"})


def open_for_card(world: World, charge: model.Charge) -> None:
    """Open the dispute that the charge's test card brings, if it brings one."""
    card = cards.CARDS[charge.card]
    if card.dispute is None:
        return
    now = world.now_s()
    row = model.Dispute(
        id=world.disputes.new_id(),
        created=now,
        amount=charge.amount_captured,
        currency=charge.currency,
        charge=charge.id,
        payment_intent=charge.payment_intent,
        card=charge.card,
        reason=card.dispute,
        status="warning_needs_response" if card.inquiry else "needs_response",
        due_by=now + RESPONSE_S,
    )
    charge.dispute = row.id
    world.charges.save(charge)
    world.disputes.save(row)
    world.events.emit("charge.dispute.created", "dispute", row)
    if not card.inquiry:
        _move(world, row, -row.amount, currencies.dispute_fee(row.currency), "dispute", "Chargeback withdrawal")
        world.events.emit("charge.dispute.funds_withdrawn", "dispute", row)


def _move(world: World, row: model.Dispute, amount: int, fee: int, category: str, what: str) -> None:
    settled, currency = world.settlement.of(amount, row.currency)
    transaction = model.BalanceTransaction(
        id=world.balance_transactions.new_id(),
        created=world.now_s(),
        amount=settled,
        currency=currency,
        type="adjustment",
        reporting_category=category,
        available_on=world.now_s(),
        fee=fee,
        fee_description="Dispute fee",
        source=row.id,
        description=f"{what} for {row.charge}",
    )
    world.balance_transactions.save(transaction)
    row.balance_transactions = [*row.balance_transactions, transaction.id]
    world.disputes.save(row)


def _finish(world: World, row: model.Dispute, *, won: bool) -> None:
    inquiry = row.status.startswith("warning")
    if inquiry:
        row.status = "warning_closed"
    else:
        row.status = "won" if won else "lost"
        if won:
            _move(world, row, row.amount, 0, "dispute_reversal", "Chargeback reversal")
    world.disputes.save(row)
    if won and not inquiry:
        world.events.emit("charge.dispute.funds_reinstated", "dispute", row)
    world.events.emit("charge.dispute.closed", "dispute", row)


def retrieve(world: World, call: Call) -> Result:
    """GET /v1/disputes/{id}."""
    call.params.allow(frozenset({"expand"}))
    return Object("dispute", need(world.disputes, call.id, "dispute", "dispute"))


def update(world: World, call: Call) -> Result:
    """POST /v1/disputes/{id}: evidence; submitted unless `submit` is false. Winning or losing evidence closes the dispute."""
    params = call.params
    params.allow(UPDATE_PARAMS)
    row = need(world.disputes, call.id, "dispute", "dispute")
    evidence = params.inner("evidence")
    submit = params.boolean("submit")
    metadata = params.merge_metadata(row.metadata)
    given: dict[str, str] = {}
    if evidence is not None:
        evidence.allow(EVIDENCE)
        given = {name: evidence.text(name) or "" for name in evidence.values}
    if given and row.status in CLOSED:
        raise errors.invalid("This dispute is already closed.", stored=True)
    row.metadata = metadata
    row.evidence = {name: text for name, text in {**row.evidence, **given}.items() if text}
    submitted = submit is not False and evidence is not None
    before = row.status
    if submitted:
        row.submission_count += 1
        row.status = "warning_under_review" if row.status.startswith("warning") else "under_review"
    world.disputes.save(row)
    world.events.emit("charge.dispute.updated", "dispute", row, {"status": before} if submitted else None)
    if submitted:
        texts = set(row.evidence.values())
        if WINNING in texts:
            _finish(world, row, won=True)
        elif LOSING in texts:
            _finish(world, row, won=False)
    return Object("dispute", row)


def close(world: World, call: Call) -> Result:
    """POST /v1/disputes/{id}/close: accept that it is lost."""
    call.params.allow(frozenset({"expand"}))
    row = need(world.disputes, call.id, "dispute", "dispute")
    if row.status in CLOSED:
        raise errors.invalid("This dispute is already closed.", stored=True)
    _finish(world, row, won=False)
    return Object("dispute", row)


def index(world: World, call: Call) -> Result:
    """GET /v1/disputes."""
    params = call.params
    params.allow(LIST_PARAMS)
    filters = [
        (column, value)
        for column, value in (("charge", params.text("charge")), ("intent", params.text("payment_intent")))
        if value
    ]
    return of_table(world.disputes, params, "dispute", "/v1/disputes", lambda row: dispute(world, row), filters)
