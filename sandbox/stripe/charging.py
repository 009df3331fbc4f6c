"""What a card does to an intent: charges, their balance transactions, authentication, processing, captures.

Each function changes the working copy and emits the events in Stripe's order: what happened to the charge comes before
what that means for the intent.
"""

from __future__ import annotations

from sandbox.stripe import cards, currencies, disputes, model
from sandbox.stripe.world import World

AVAILABLE_AFTER_S = 2 * 86_400
ASYNC_CAPTURE_S = 0.3
"""How long after success the balance transaction of an `automatic_async` capture comes."""
AUTHORIZATION_S = 7 * 86_400
"""How long an authorization can be captured."""
PROCESSING_CARD_S = 2.0
"""How long the sandbox's own processing cards take when no fault says otherwise."""


def register(world: World) -> None:
    """Connect the timers of this module."""
    world.timers.on("balance", lambda charge: _post_later(world, charge))
    world.timers.on("settle", lambda subject: _settle(world, subject))
    world.timers.on("expire", lambda intent: _expire(world, intent))


def attempt(
    world: World, intent: model.Intent, method: model.PaymentMethod, *, off_session: bool, return_url: str | None
) -> model.LastError | None:
    """Try to pay `intent` with `method`. Returns why the card refused, or None; the intent says what came of it."""
    card = cards.CARDS[method.card]
    intent.payment_method = method.id
    intent.return_url = return_url
    intent.action_url = None
    if card.authenticate and off_session:
        return _decline(world, intent, method, cards.AUTHENTICATION_REQUIRED)
    if card.authenticate:
        intent.status = "requires_action"
        intent.action_url = f"{world.url}/_3ds/{intent.id}"
        world.intents.save(intent)
        world.events.emit("payment_intent.requires_action", "payment_intent", intent)
        return None
    return _charge(world, intent, method, authenticated=False)


def authenticated(world: World, intent: model.Intent, *, passed: bool) -> model.LastError | None:
    """The buyer has come through 3-D Secure, or hasn't `passed`. The intent is in `requires_action`."""
    assert intent.status == "requires_action"
    assert intent.payment_method is not None
    method = world.payment_methods.get(intent.payment_method)
    assert method is not None
    intent.action_url = None
    if passed:
        return _charge(world, intent, method, authenticated=True)
    failure = cards.AUTHENTICATION_FAILED
    error = model.LastError(
        failure.code, failure.decline_code, failure.message, "invalid_request_error", payment_method=method.id
    )
    _give_back(world, intent, error)
    return error


def _charge(world: World, intent: model.Intent, method: model.PaymentMethod, *, authenticated: bool) -> model.LastError | None:
    card = cards.CARDS[method.card]
    if card.decline is not None:
        return _decline(world, intent, method, card.decline, authenticated=authenticated)
    charge = _new_charge(world, intent, method, authenticated=authenticated)
    charge.status = "pending"
    intent.latest_charge = charge.id
    if card.processing is not None or world.faults.hits("processing", "confirm"):
        seconds = world.faults.between("processing_s", "confirm") or PROCESSING_CARD_S
        intent.status = "processing"
        world.charges.save(charge)
        world.intents.save(intent)
        world.events.emit("charge.pending", "charge", charge)
        world.events.emit("payment_intent.processing", "payment_intent", intent)
        world.timers.add("settle", intent.id, seconds)
        return None
    _succeed(world, intent, charge)
    return None


def _new_charge(world: World, intent: model.Intent, method: model.PaymentMethod, *, authenticated: bool) -> model.Charge:
    extra = intent.extra
    shared = (
        "receipt_email",
        "shipping",
        "transfer_group",
        "statement_descriptor",
        "statement_descriptor_suffix",
        "on_behalf_of",
    )
    return model.Charge(
        id=world.charges.new_id(),
        created=world.now_s(),
        amount=intent.amount,
        currency=intent.currency,
        payment_intent=intent.id,
        payment_method=method.id,
        card=method.card,
        metadata=dict(intent.metadata),
        customer=intent.customer,
        description=intent.description,
        authenticated=authenticated,
        extra={name: extra[name] for name in shared if name in extra} if extra else None,
    )


def _decline(
    world: World,
    intent: model.Intent,
    method: model.PaymentMethod,
    decline: cards.Decline,
    *,
    authenticated: bool = False,
    charge: model.Charge | None = None,
) -> model.LastError:
    if charge is None:
        charge = _new_charge(world, intent, method, authenticated=authenticated)
    error = model.LastError(
        decline.code,
        decline.decline_code,
        decline.message,
        charge=charge.id,
        payment_method=method.id,
        blocked=decline.blocked,
    )
    charge.status = "failed"
    charge.failure = error
    world.charges.save(charge)
    world.events.emit("charge.failed", "charge", charge)
    intent.latest_charge = charge.id
    _give_back(world, intent, error)
    return error


def _give_back(world: World, intent: model.Intent, error: model.LastError) -> None:
    """The attempt failed: the intent waits for another payment method."""
    intent.status = "requires_payment_method"
    intent.payment_method = None
    intent.last_error = error
    world.intents.save(intent)
    world.events.emit("payment_intent.payment_failed", "payment_intent", intent)


def _succeed(world: World, intent: model.Intent, charge: model.Charge) -> None:
    """The card agreed."""
    charge.status = "succeeded"
    intent.last_error = None
    if intent.capture_method == "manual":
        intent.status = "requires_capture"
        intent.amount_capturable = charge.amount
        world.charges.save(charge)
        world.intents.save(intent)
        world.events.emit("charge.succeeded", "charge", charge)
        world.events.emit("payment_intent.amount_capturable_updated", "payment_intent", intent)
        world.timers.add("expire", intent.id, AUTHORIZATION_S)
        return
    charge.captured = True
    charge.amount_captured = charge.amount
    if intent.capture_method == "automatic":
        post(world, charge)
    else:
        world.timers.add("balance", charge.id, ASYNC_CAPTURE_S)
    world.charges.save(charge)
    world.events.emit("charge.succeeded", "charge", charge)
    _received(world, intent, charge)


def _received(world: World, intent: model.Intent, charge: model.Charge) -> None:
    """The money is in: a test dispute comes first, then the intent's own event."""
    disputes.open_for_card(world, charge)
    intent.status = "succeeded"
    intent.amount_received = charge.amount_captured
    intent.amount_capturable = 0
    world.intents.save(intent)
    world.events.emit("payment_intent.succeeded", "payment_intent", intent)


def post(world: World, charge: model.Charge) -> None:
    """Post the charge to the balance, with Stripe's fee."""
    now = world.now_s()
    amount, currency = world.settlement.of(charge.amount_captured, charge.currency)
    row = model.BalanceTransaction(
        id=world.balance_transactions.new_id(),
        created=now,
        amount=amount,
        currency=currency,
        type="charge",
        reporting_category="charge",
        available_on=now if cards.CARDS[charge.card].available_at_once else now + AVAILABLE_AFTER_S,
        fee=currencies.processing_fee(amount),
        source=charge.id,
        description=charge.description,
    )
    world.balance_transactions.save(row)
    charge.balance_transaction = row.id


def _post_later(world: World, charge_id: str) -> None:
    charge = world.charges.get(charge_id)
    if charge is None or charge.balance_transaction is not None:
        return
    post(world, charge)
    world.charges.save(charge)
    world.events.emit("charge.updated", "charge", charge, {"balance_transaction": None})


def _settle(world: World, intent_id: str) -> None:
    """The end of `processing`."""
    intent = world.intents.get(intent_id)
    if intent is None or intent.status != "processing" or intent.latest_charge is None:
        return
    charge = world.charges.get(intent.latest_charge)
    assert charge is not None
    if cards.CARDS[charge.card].processing == "failed":
        method = world.payment_methods.get(charge.payment_method)
        assert method is not None
        _decline(world, intent, method, cards.GENERIC, charge=charge)
    else:
        _succeed(world, intent, charge)


def capture(world: World, intent: model.Intent, amount: int) -> None:
    """Capture `amount` of an authorized intent; what is left of the authorization is released."""
    assert intent.status == "requires_capture"
    assert intent.latest_charge is not None
    charge = world.charges.get(intent.latest_charge)
    assert charge is not None
    assert 0 < amount <= charge.amount
    charge.captured = True
    charge.amount_captured = amount
    post(world, charge)
    world.charges.save(charge)
    world.events.emit("charge.captured", "charge", charge, {"captured": False, "amount_captured": 0, "balance_transaction": None})
    _received(world, intent, charge)


def cancel(world: World, intent: model.Intent, reason: str | None) -> None:
    """Cancel an intent whose status allows it, and release its authorization."""
    if intent.status == "requires_capture" and intent.latest_charge is not None:
        charge = world.charges.get(intent.latest_charge)
        assert charge is not None
        charge.amount_refunded = charge.amount
        world.charges.save(charge)
        expired = reason == "automatic"
        world.events.emit("charge.expired" if expired else "charge.refunded", "charge", charge, {"amount_refunded": 0})
    intent.status = "canceled"
    intent.canceled_at = world.now_s()
    intent.cancellation_reason = reason
    intent.amount_capturable = 0
    intent.action_url = None
    world.intents.save(intent)
    world.events.emit("payment_intent.canceled", "payment_intent", intent)


def _expire(world: World, intent_id: str) -> None:
    intent = world.intents.get(intent_id)
    if intent is not None and intent.status == "requires_capture":
        cancel(world, intent, "automatic")
