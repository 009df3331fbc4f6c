"""Payment intents, charges, refunds and payment methods in Stripe's shape: every member that Stripe answers."""

from __future__ import annotations

from sandbox.stripe import cards, model
from sandbox.stripe.errors import DOC_URL
from sandbox.stripe.forms import Json, JsonObject, names
from sandbox.stripe.world import World

NO_ADDRESS: JsonObject = {"city": None, "country": None, "line1": None, "line2": None, "postal_code": None, "state": None}
NO_BILLING: JsonObject = {"address": NO_ADDRESS, "email": None, "name": None, "phone": None, "tax_id": None}


def intent(world: World, row: model.Intent) -> JsonObject:
    """A payment intent."""
    view: JsonObject = {
        "id": row.id,
        "object": "payment_intent",
        "amount": row.amount,
        "amount_capturable": row.amount_capturable,
        "amount_details": {"tip": {}},
        "amount_received": row.amount_received,
        "application": None,
        "application_fee_amount": None,
        "automatic_payment_methods": {"allow_redirects": "always", "enabled": True} if row.automatic_payment_methods else None,
        "canceled_at": row.canceled_at,
        "cancellation_reason": row.cancellation_reason,
        "capture_method": row.capture_method,
        "client_secret": row.client_secret,
        "confirmation_method": row.confirmation_method,
        "created": row.created,
        "currency": row.currency,
        "customer": row.customer,
        "customer_account": None,
        "description": row.description,
        "excluded_payment_method_types": None,
        "last_payment_error": last_error(world, row.last_error) if row.last_error else None,
        "latest_charge": row.latest_charge,
        "livemode": False,
        "managed_payments": {"enabled": False},
        "metadata": {**row.metadata},
        "next_action": None,
        "on_behalf_of": None,
        "payment_method": row.payment_method,
        "payment_method_configuration_details": (
            {"id": "pmc_1SandboxB7SandboxXdefault0", "parent": None} if row.automatic_payment_methods else None
        ),
        "payment_method_options": {
            "card": {"installments": None, "mandate_options": None, "network": None, "request_three_d_secure": "automatic"}
        },
        "payment_method_types": [*row.payment_method_types],
        "processing": None,
        "receipt_email": None,
        "review": None,
        "setup_future_usage": None,
        "shipping": None,
        "source": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": row.status,
        "transfer_data": None,
        "transfer_group": None,
    }
    if row.status == "processing":
        view["processing"] = {"card": {"customer_notification": None}, "type": "card"}
    elif row.status == "requires_action":
        view["next_action"] = {
            "redirect_to_url": {"return_url": row.return_url, "url": row.action_url},
            "type": "redirect_to_url",
        }
    if row.extra:
        view.update(row.extra)
    return view


PUBLISHABLE_MEMBERS = names(
    """
    id object amount amount_details automatic_payment_methods canceled_at cancellation_reason capture_method client_secret
    confirmation_method created currency description last_payment_error livemode next_action payment_method
    payment_method_configuration_details payment_method_types processing receipt_email setup_future_usage shipping source
    status excluded_payment_method_types
    """
)
"""What a browser with a publishable key gets to see of an intent."""


def last_error(world: World, error: model.LastError) -> JsonObject:
    """An intent's `last_payment_error`."""
    view: JsonObject = {}
    if error.charge:
        view["charge"] = error.charge
    view["code"] = error.code
    if error.decline_code:
        view["decline_code"] = error.decline_code
    view["doc_url"] = DOC_URL + error.code.replace("_", "-")
    view["message"] = error.message
    view["param"] = None
    if error.code == "incorrect_cvc":
        view["param"] = "cvc"
    elif error.code == "expired_card":
        view["param"] = "exp_month"
    if view["param"] is None:
        del view["param"]
    if error.payment_method:
        row = world.payment_methods.get(error.payment_method)
        view["payment_method"] = payment_method(world, row) if row else None
    view["type"] = error.type
    return view


def charge(world: World, row: model.Charge) -> JsonObject:
    """A charge."""
    card = cards.CARDS[row.card]
    extra = row.extra or {}
    refunds: list[Json] = []
    for identifier in reversed(row.refunds[-10:]):
        entry = world.refunds.get(identifier)
        if entry is not None:
            refunds.append(refund(world, entry))
    view: JsonObject = {
        "id": row.id,
        "object": "charge",
        "amount": row.amount,
        "amount_captured": row.amount_captured,
        "amount_refunded": row.amount_refunded,
        "application": None,
        "application_fee": None,
        "application_fee_amount": None,
        "balance_transaction": row.balance_transaction,
        "billing_details": NO_BILLING,
        "calculated_statement_descriptor": "SANDBOX",
        "captured": row.captured,
        "created": row.created,
        "currency": row.currency,
        "customer": row.customer,
        "description": row.description,
        "disputed": row.dispute is not None,
        "failure_balance_transaction": None,
        "failure_code": row.failure.code if row.failure else None,
        "failure_message": row.failure.message if row.failure else None,
        "fraud_details": {},
        "livemode": False,
        "metadata": {**row.metadata},
        "on_behalf_of": None,
        "outcome": _outcome(row),
        "paid": row.status == "succeeded",
        "payment_intent": row.payment_intent,
        "payment_method": row.payment_method,
        "payment_method_details": {"card": _card_details(row, card), "type": "card"},
        "receipt_email": None,
        "receipt_number": None,
        "receipt_url": f"{world.url}/_receipts/{row.id}" if row.status == "succeeded" and row.captured else None,
        "refunded": 0 < row.amount_refunded == (row.amount_captured if row.captured else row.amount),
        "refunds": {
            "object": "list",
            "data": refunds,
            "has_more": len(row.refunds) > 10,
            "total_count": len(row.refunds),
            "url": f"/v1/charges/{row.id}/refunds",
        },
        "review": None,
        "shipping": None,
        "source": None,
        "source_transfer": None,
        "statement_descriptor": None,
        "statement_descriptor_suffix": None,
        "status": row.status,
        "transfer_data": None,
        "transfer_group": None,
    }
    view.update(extra)
    return view


def _outcome(row: model.Charge) -> Json:
    failure = row.failure
    if row.status == "pending":
        return None
    if failure is None:
        return {
            "advice_code": None,
            "network_advice_code": None,
            "network_decline_code": None,
            "network_status": "approved_by_network",
            "reason": None,
            "risk_level": "normal",
            "risk_score": 20,
            "seller_message": "Payment complete.",
            "type": "authorized",
        }
    return {
        "advice_code": None if failure.blocked else "try_again_later",
        "network_advice_code": None,
        "network_decline_code": None if failure.blocked else "01",
        "network_status": "not_sent_to_network" if failure.blocked else "declined_by_network",
        "reason": "highest_risk_level" if failure.blocked else failure.decline_code or failure.code,
        "risk_level": "highest" if failure.blocked else "normal",
        "risk_score": 92 if failure.blocked else 20,
        "seller_message": (
            "Stripe blocked this payment as too risky." if failure.blocked else "The bank did not return any further details."
        ),
        "type": "blocked" if failure.blocked else "issuer_declined",
    }


def _card_details(row: model.Charge, card: cards.Card) -> JsonObject:
    three_d_secure: JsonObject | None = None
    if row.authenticated:
        three_d_secure = {
            "authentication_flow": "challenge",
            "electronic_commerce_indicator": "05",
            "exemption_indicator": None,
            "result": "authenticated",
            "result_reason": None,
            "transaction_id": f"{row.id}-3ds",
            "version": "2.2.0",
        }
    failed = row.status == "failed"
    return {
        "amount_authorized": None if failed else row.amount,
        "authorization_code": None if failed else "123456",
        "brand": card.brand,
        "checks": {
            "address_line1_check": None,
            "address_postal_code_check": None,
            "cvc_check": "fail" if row.failure and row.failure.code == "incorrect_cvc" else "pass",
        },
        "country": "US",
        "exp_month": 8,
        "exp_year": 2034,
        "extended_authorization": {"status": "disabled"},
        "fingerprint": f"Sandbox{card.last4}card0"[:16],
        "funding": card.funding,
        "incremental_authorization": {"status": "unavailable"},
        "installments": None,
        "last4": card.last4,
        "mandate": None,
        "multicapture": {"status": "unavailable"},
        "network": card.brand,
        "network_token": {"used": False},
        "network_transaction_id": None if failed else row.id[-15:],
        "overcapture": {"maximum_amount_capturable": row.amount, "status": "unavailable"},
        "regulated_status": "unregulated",
        "three_d_secure": three_d_secure,
        "transaction_link_id": None,
        "wallet": None,
    }


def refund(world: World, row: model.Refund) -> JsonObject:
    """A refund; its failure's members are there only when it failed, as at Stripe."""
    view: JsonObject = {
        "id": row.id,
        "object": "refund",
        "amount": row.amount,
        "balance_transaction": row.balance_transaction,
        "charge": row.charge,
        "created": row.created,
        "currency": row.currency,
        "customer": None,
        "customer_account": None,
        "destination_details": {
            "card": {
                "reference_status": "pending" if row.status != "failed" else "unavailable",
                "reference_type": "acquirer_reference_number",
                "type": "refund",
            },
            "type": "card",
        },
        "metadata": {**row.metadata},
        "payment_intent": row.payment_intent,
        "payment_method": row.payment_method,
        "reason": row.reason,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": row.status,
        "transfer_reversal": None,
    }
    if row.status == "failed":
        view["failure_balance_transaction"] = row.failure_balance_transaction
        view["failure_reason"] = row.failure_reason
    return view


def payment_method(world: World, row: model.PaymentMethod) -> JsonObject:
    """A payment method."""
    card = cards.CARDS[row.card]
    return {
        "id": row.id,
        "object": "payment_method",
        "allow_redisplay": "unspecified",
        "billing_details": {**NO_BILLING, **(row.billing_details or {})},
        "card": {
            "brand": card.brand,
            "checks": {"address_line1_check": None, "address_postal_code_check": None, "cvc_check": None},
            "country": "US",
            "display_brand": card.brand,
            "exp_month": row.exp_month,
            "exp_year": row.exp_year,
            "fingerprint": f"Sandbox{card.last4}card0"[:16],
            "funding": card.funding,
            "generated_from": None,
            "last4": card.last4,
            "networks": {"available": [card.brand], "preferred": None},
            "regulated_status": "unregulated",
            "three_d_secure_usage": {"supported": True},
            "wallet": None,
        },
        "created": row.created,
        "customer": row.customer,
        "customer_account": None,
        "livemode": False,
        "metadata": {**row.metadata},
        "type": "card",
    }
