"""`python -m sandbox.stripe --port P [--state FILE]`."""

from __future__ import annotations

from sandbox.serve import arguments, run
from sandbox.stripe.service import RATE_LIMIT_DEFAULT, StripeService

DEFAULT_PORT = 8090


def main() -> None:
    """Serve until SIGTERM."""
    parser = arguments("stripe", DEFAULT_PORT)
    parser.add_argument(
        "--rate-limit", type=int, default=RATE_LIMIT_DEFAULT, help="calls per endpoint and second (Stripe's own default is 25)"
    )
    parser.add_argument(
        "--settlement-currency", default="", help="settle everything in this currency (default: each currency in itself)"
    )
    options = parser.parse_args()
    run(lambda: StripeService(options.state, options.rate_limit, options.settlement_currency.lower()), options.host, options.port)


if __name__ == "__main__":
    main()
