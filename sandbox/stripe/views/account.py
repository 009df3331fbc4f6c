"""Balance transactions, disputes, customers, payouts and webhook endpoints in Stripe's shape."""

from __future__ import annotations

from sandbox.stripe import cards, model
from sandbox.stripe.forms import Json, JsonObject, names
from sandbox.stripe.world import World


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
