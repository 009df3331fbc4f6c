"""Stripe's test cards: what happens to a payment made with each. Names as in Stripe's testing page."""

from __future__ import annotations

import msgspec


class Decline(msgspec.Struct, frozen=True):
    """Why a charge is refused. `code` is the error's code, `decline_code` the issuer's."""

    code: str
    decline_code: str | None
    message: str
    blocked: bool = False


class Card(msgspec.Struct, frozen=True):
    """A test card's face and fate."""

    name: str
    brand: str = "visa"
    last4: str = "4242"
    funding: str = "credit"
    decline: Decline | None = None
    authenticate: bool = False
    """3-D Secure is asked for at every on-session payment; off session it is declined."""
    dispute: str | None = None
    """Reason of the dispute that follows, or None."""
    inquiry: bool = False
    refund: str = "succeeded"
    """`succeeded`, `pending` (then succeeded) or `failing` (succeeded, then failed)."""
    available_at_once: bool = False
    processing: str | None = None
    """The sandbox's own: the payment goes to `processing` first, then `succeeded` or `failed`."""


DECLINED = "Your card was declined."
GENERIC = Decline("card_declined", "generic_decline", DECLINED)
AUTHENTICATION_REQUIRED = Decline(
    "authentication_required", "authentication_required", "Your card was declined. This transaction requires authentication."
)
AUTHENTICATION_FAILED = Decline(
    "payment_intent_authentication_failure",
    None,
    "We are unable to authenticate your payment method. Please choose a different payment method and try again.",
)
_INSUFFICIENT = Decline("card_declined", "insufficient_funds", "Your card has insufficient funds.")
_LOST = Decline("card_declined", "lost_card", DECLINED)
_STOLEN = Decline("card_declined", "stolen_card", DECLINED)
_VELOCITY = Decline(
    "card_declined",
    "card_velocity_exceeded",
    "Your card was declined for making repeated attempts too frequently or exceeding its amount limit.",
)
_EXPIRED = Decline("expired_card", None, "Your card has expired.")
_CVC = Decline("incorrect_cvc", None, "Your card's security code is incorrect.")
_PROCESSING = Decline("processing_error", None, "An error occurred while processing your card. Try again in a little bit.")
_BLOCKED = Decline("card_declined", "fraudulent", DECLINED, blocked=True)

_CARDS = (
    Card("visa"),
    Card("visa_debit", funding="debit", last4="5556"),
    Card("mastercard", brand="mastercard", last4="4444"),
    Card("mastercard_debit", brand="mastercard", funding="debit", last4="8210"),
    Card("mastercard_prepaid", brand="mastercard", funding="prepaid", last4="5100"),
    Card("amex", brand="amex", last4="8431"),
    Card("discover", brand="discover", last4="9424"),
    Card("diners", brand="diners", last4="3237"),
    Card("jcb", brand="jcb", last4="0505"),
    Card("unionpay", brand="unionpay", last4="0005"),
    Card("us"),
    Card("visa_chargeDeclined", last4="0002", decline=GENERIC),
    Card("visa_chargeDeclinedInsufficientFunds", last4="9995", decline=_INSUFFICIENT),
    Card("visa_chargeDeclinedLostCard", last4="9987", decline=_LOST),
    Card("visa_chargeDeclinedStolenCard", last4="9979", decline=_STOLEN),
    Card("visa_chargeDeclinedVelocityLimitExceeded", last4="6975", decline=_VELOCITY),
    Card("chargeDeclinedExpiredCard", last4="0069", decline=_EXPIRED),
    Card("chargeDeclinedIncorrectCvc", last4="0127", decline=_CVC),
    Card("chargeDeclinedProcessingError", last4="0119", decline=_PROCESSING),
    Card("chargeCustomerFail", last4="0341", decline=GENERIC),
    Card("radarBlock", last4="0019", decline=_BLOCKED),
    Card("authenticationRequired", last4="3184", authenticate=True),
    Card("threeDSecure2Required", last4="3220", authenticate=True),
    Card("threeDSecureRequired", last4="3063", authenticate=True),
    Card("threeDSecureRequiredChargeDeclined", last4="1629", authenticate=True, decline=GENERIC),
    Card("authenticationRequiredChargeDeclinedInsufficientFunds", last4="8260", authenticate=True, decline=_INSUFFICIENT),
    Card("threeDSecureOptional", last4="3055"),
    Card("threeDSecureNotSupported", last4="0505"),
    Card("createDispute", last4="0259", dispute="fraudulent"),
    Card("createDisputeProductNotReceived", last4="2685", dispute="product_not_received"),
    Card("createDisputeInquiry", last4="1976", dispute="fraudulent", inquiry=True),
    Card("pendingRefund", last4="7726", refund="pending"),
    Card("refundFail", last4="5126", refund="failing"),
    Card("bypassPending", last4="0077", available_at_once=True),
    Card("sandboxProcessing", last4="7001", processing="succeeded"),
    Card("sandboxProcessingFails", last4="7002", processing="failed"),
)

CARDS = {card.name: card for card in _CARDS}

_ALIASES = {
    "chargeDeclined": "visa_chargeDeclined",
    "chargeDeclinedInsufficientFunds": "visa_chargeDeclinedInsufficientFunds",
    "chargeDeclinedLostCard": "visa_chargeDeclinedLostCard",
    "chargeDeclinedStolenCard": "visa_chargeDeclinedStolenCard",
    "chargeDeclinedVelocityLimitExceeded": "visa_chargeDeclinedVelocityLimitExceeded",
    "visa_chargeDeclinedExpiredCard": "chargeDeclinedExpiredCard",
    "visa_chargeDeclinedIncorrectCvc": "chargeDeclinedIncorrectCvc",
    "visa_chargeDeclinedProcessingError": "chargeDeclinedProcessingError",
    "chargeDeclinedFraudulent": "radarBlock",
    "disputeProductNotReceived": "createDisputeProductNotReceived",
    "disputeInquiry": "createDisputeInquiry",
    "createDisputeFraudulent": "createDispute",
}

_NUMBERS = {
    "4242424242424242": "visa",
    "4000056655665556": "visa_debit",
    "5555555555554444": "mastercard",
    "378282246310005": "amex",
    "4000000000000002": "visa_chargeDeclined",
    "4000000000009995": "visa_chargeDeclinedInsufficientFunds",
    "4000000000009987": "visa_chargeDeclinedLostCard",
    "4000000000009979": "visa_chargeDeclinedStolenCard",
    "4000000000006975": "visa_chargeDeclinedVelocityLimitExceeded",
    "4000000000000069": "chargeDeclinedExpiredCard",
    "4000000000000127": "chargeDeclinedIncorrectCvc",
    "4000000000000119": "chargeDeclinedProcessingError",
    "4000000000000341": "chargeCustomerFail",
    "4100000000000019": "radarBlock",
    "4000002760003184": "authenticationRequired",
    "4000000000003220": "threeDSecure2Required",
    "4000000000003063": "threeDSecureRequired",
    "4000008400001629": "threeDSecureRequiredChargeDeclined",
    "4000008260003178": "authenticationRequiredChargeDeclinedInsufficientFunds",
    "4000000000000259": "createDispute",
    "4000000000002685": "createDisputeProductNotReceived",
    "4000000000001976": "createDisputeInquiry",
    "4000000000007726": "pendingRefund",
    "4000000000005126": "refundFail",
    "4000000000000077": "bypassPending",
}


def by_token(token: str) -> Card | None:
    """The card of `pm_card_<name>` or `tok_<name>`, or None when there is none of that name."""
    for prefix in ("pm_card_", "tok_"):
        if token.startswith(prefix):
            name = token[len(prefix) :]
            return CARDS.get(_ALIASES.get(name, name))
    return None


def by_number(number: str) -> Card | None:
    """The card of a published test number, or None."""
    name = _NUMBERS.get(number.replace(" ", "").replace("-", ""))
    return CARDS[name] if name else None
