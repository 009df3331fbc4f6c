"""Currencies that can be charged, the least amount of each, and what the stand-in takes as fees. Amounts in minor units."""

from __future__ import annotations

from sandbox.stripe.forms import names

MINIMUM_MINOR = {
    "usd": 50, "aed": 200, "aud": 50, "bgn": 100, "brl": 50, "cad": 50, "chf": 50, "czk": 1_500, "dkk": 250, "eur": 50,
    "gbp": 30, "hkd": 400, "huf": 17_500, "inr": 50, "jpy": 50, "mxn": 1_000, "myr": 200, "nok": 300, "nzd": 50,
    "pln": 200, "ron": 200, "sek": 300, "sgd": 50, "thb": 1_000,
}  # fmt: skip
"""Stripe's page on minimum charge amounts; other currencies have the worth of $0.50, taken as `DEFAULT_MINIMUM_MINOR`."""

DEFAULT_MINIMUM_MINOR = 50
AMOUNT_MAX = 99_999_999
"""Eight digits; a few currencies of small units take more."""
AMOUNT_MAX_BY_CURRENCY = {
    "cop": 9_999_999_999,
    "huf": 9_999_999_999,
    "inr": 999_999_999,
    "idr": 999_999_999_999,
    "jpy": 999_999_999_999,
}

ZERO_DECIMAL = names(
    """
    bif clp djf gnf jpy kmf krw mga pyg rwf ugx vnd vuv xaf xof xpf
    """
)
THREE_DECIMAL = names(
    """
    bhd jod kwd omr tnd
    """
)

ALL = names(
    """
    aed afn all amd ang aoa ars aud awg azn bam bbd bdt bgn bhd bif bmd bnd bob brl bsd bwp byn bzd cad cdf chf clp cny
    cop crc cve czk djf dkk dop dzd egp etb eur fjd fkp gbp gel gip gmd gnf gtq gyd hkd hnl htg huf idr ils inr isk jmd
    jod jpy kes kgs khr kmf krw kwd kyd kzt lak lbp lkr lrd lsl mad mdl mga mkd mmk mnt mop mur mvr mwk mxn myr mzn nad
    ngn nio nok npr nzd omr pab pen pgk php pkr pln pyg qar ron rsd rub rwf sar sbd scr sek sgd shp sle sos srd std szl
    thb tjs tnd top try ttd twd tzs uah ugx usd uyu uzs vnd vuv wst xaf xcd xof xpf yer zar zmw
    """
)

FEE_PER_MILLE = 29
FEE_FIXED_MINOR = 30
DISPUTE_FEE_MINOR = 1_500
DISPUTE_FEE_BY_CURRENCY = {"eur": 2_000, "gbp": 2_000, "cad": 1_500, "aud": 2_500, "jpy": 1_500, "chf": 2_000, "mxn": 30_000}


def minimum(currency: str) -> int:
    """The least amount that can be charged."""
    return MINIMUM_MINOR.get(currency, DEFAULT_MINIMUM_MINOR)


def maximum(currency: str) -> int:
    """The largest amount that can be charged."""
    return AMOUNT_MAX_BY_CURRENCY.get(currency, AMOUNT_MAX)


def processing_fee(amount: int) -> int:
    """2.9 % of `amount`, rounded half up, plus 30 minor units."""
    return (amount * FEE_PER_MILLE + 500) // 1_000 + FEE_FIXED_MINOR


def dispute_fee(currency: str) -> int:
    """What a dispute costs; it isn't given back."""
    return DISPUTE_FEE_BY_CURRENCY.get(currency, DISPUTE_FEE_MINOR)


def shown(amount: int, currency: str) -> str:
    """The amount as Stripe's messages write it, for example `$10.50 usd`."""
    if currency in ZERO_DECIMAL:
        return f"{amount} {currency}"
    digits = 3 if currency in THREE_DECIMAL else 2
    whole, part = divmod(amount, 10**digits)
    sign = "$" if currency == "usd" else ""
    return f"{sign}{whole}.{part:0{digits}d} {currency}"
