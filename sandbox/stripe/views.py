"""Objects in Stripe's shape: every member that Stripe answers, built from what the stand-in remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandbox.stripe import cards, model
from sandbox.stripe.errors import DOC_URL
from sandbox.stripe.forms import Json, JsonObject, names
from sandbox.stripe.world import API_VERSION, World

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
    captured_whole = row.captured and row.amount_captured == row.amount
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
        "refunded": row.amount_refunded > 0 and row.amount_refunded == row.amount_captured and (captured_whole or row.captured),
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


def balance_transaction(world: World, row: model.BalanceTransaction) -> JsonObject:
    """A balance transaction; it becomes available by the clock."""
    details: list[Json] = []
    if row.fee:
        details.append(
            {
                "amount": row.fee,
                "application": None,
                "currency": row.currency,
                "description": row.fee_description,
                "type": "stripe_fee",
            }
        )
    return {
        "id": row.id,
        "object": "balance_transaction",
        "amount": row.amount,
        "available_on": row.available_on,
        "balance_type": "payments",
        "created": row.created,
        "currency": row.currency,
        "description": row.description,
        "exchange_rate": None,
        "fee": row.fee,
        "fee_details": details,
        "net": row.net,
        "reporting_category": row.reporting_category,
        "source": row.source,
        "status": "available" if row.available_on <= world.clock.now() else "pending",
        "type": row.type,
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


EVIDENCE = names(
    """
    access_activity_log billing_address cancellation_policy cancellation_policy_disclosure cancellation_rebuttal
    customer_communication customer_email_address customer_name customer_purchase_ip customer_signature
    duplicate_charge_documentation duplicate_charge_explanation duplicate_charge_id product_description receipt
    refund_policy refund_policy_disclosure refund_refusal_explanation service_date service_documentation shipping_address
    shipping_carrier shipping_date shipping_documentation shipping_tracking_number uncategorized_file uncategorized_text
    """
)


def dispute(world: World, row: model.Dispute) -> JsonObject:
    """A dispute, its balance transactions whole."""
    transactions: list[Json] = []
    for identifier in row.balance_transactions:
        entry = world.balance_transactions.get(identifier)
        if entry is not None:
            transactions.append(balance_transaction(world, entry))
    evidence: JsonObject = {name: row.evidence.get(name) for name in sorted(EVIDENCE)}
    evidence["enhanced_evidence"] = {}
    card = cards.CARDS[row.card]
    return {
        "id": row.id,
        "object": "dispute",
        "amount": row.amount,
        "balance_transactions": transactions,
        "charge": row.charge,
        "created": row.created,
        "currency": row.currency,
        "enhanced_eligibility_types": [],
        "evidence": evidence,
        "evidence_details": {
            "due_by": row.due_by,
            "enhanced_eligibility": {},
            "has_evidence": bool(row.evidence),
            "past_due": row.due_by < world.clock.now(),
            "submission_count": row.submission_count,
        },
        "is_charge_refundable": row.status.startswith("warning"),
        "livemode": False,
        "metadata": {**row.metadata},
        "payment_intent": row.payment_intent,
        "payment_method_details": {
            "card": {
                "brand": card.brand,
                "case_type": "inquiry" if row.status.startswith("warning") else "chargeback",
                "network": card.brand,
                "network_reason_code": "13.1" if row.reason == "product_not_received" else "10.4",
            },
            "type": "card",
        },
        "reason": row.reason,
        "status": row.status,
    }


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


def customer(world: World, row: model.Customer) -> JsonObject:
    """A customer."""
    if row.deleted:
        return {"id": row.id, "object": "customer", "deleted": True}
    view: JsonObject = {
        "id": row.id,
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": row.created,
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "description": None,
        "discount": None,
        "email": None,
        "invoice_prefix": row.invoice_prefix,
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": None,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": False,
        "metadata": {**row.metadata},
        "name": None,
        "next_invoice_sequence": 1,
        "phone": None,
        "preferred_locales": [],
        "shipping": None,
        "tax_exempt": "none",
        "test_clock": None,
    }
    if row.extra:
        view.update(row.extra)
    return view


def payout(world: World, row: model.Payout) -> JsonObject:
    """A payout to the bank."""
    return {
        "id": row.id,
        "object": "payout",
        "amount": row.amount,
        "application_fee": None,
        "application_fee_amount": None,
        "arrival_date": row.arrival_date,
        "automatic": False,
        "balance_transaction": row.balance_transaction,
        "created": row.created,
        "currency": row.currency,
        "description": row.description,
        "destination": row.destination,
        "failure_balance_transaction": row.failure_balance_transaction,
        "failure_code": row.failure_code,
        "failure_message": row.failure_message,
        "livemode": False,
        "metadata": {**row.metadata},
        "method": row.method,
        "original_payout": row.original_payout,
        "payout_method": None,
        "reconciliation_status": "not_applicable",
        "reversed_by": row.reversed_by,
        "source_type": "card",
        "statement_descriptor": row.statement_descriptor,
        "status": row.status,
        "trace_id": {"status": "pending" if row.status in ("pending", "in_transit") else "supported", "value": None},
        "type": "bank_account",
    }


def webhook_endpoint(world: World, row: model.WebhookEndpoint) -> JsonObject:
    """A webhook endpoint, without its secret."""
    return {
        "id": row.id,
        "object": "webhook_endpoint",
        "api_version": row.api_version,
        "application": None,
        "created": row.created,
        "description": row.description,
        "enabled_events": [*row.enabled_events],
        "livemode": False,
        "metadata": {**row.metadata},
        "status": row.status,
        "url": row.url,
    }


def event(world: World, row: model.Event, pending_webhooks: int) -> JsonObject:
    """An event, its object as it was then."""
    data: JsonObject = {"object": of_snapshot(world, row.kind, row.snapshot)}
    if row.previous is not None:
        data["previous_attributes"] = row.previous
    return {
        "id": row.id,
        "object": "event",
        "api_version": API_VERSION,
        "created": row.created,
        "data": data,
        "livemode": False,
        "pending_webhooks": pending_webhooks,
        "request": {"id": row.request, "idempotency_key": row.idempotency_key},
        "type": row.type,
    }


Render = Callable[[World, Any], JsonObject]

RENDER: dict[str, Render] = {
    "payment_intent": intent,
    "charge": charge,
    "balance_transaction": balance_transaction,
    "refund": refund,
    "dispute": dispute,
    "payment_method": payment_method,
    "customer": customer,
    "payout": payout,
    "webhook_endpoint": webhook_endpoint,
}
"""How each kind of object is shown; takes a row of that kind's table."""


def of_snapshot(world: World, kind: str, snapshot: bytes) -> JsonObject:
    """The object of `kind` that was packed as `snapshot`."""
    return RENDER[kind](world, world.tables[kind].unpack(snapshot))


def by_id(world: World, identifier: str) -> JsonObject | None:
    """The object of any id that can be expanded, or None."""
    kind = world.kind_of(identifier)
    if kind is None:
        return None
    row = world.tables[kind].get(identifier)
    return RENDER[kind](world, row) if row is not None else None
