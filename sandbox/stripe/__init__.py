"""A stateful stand-in for Stripe: payment intents and all that follows from them, over Stripe's HTTP API."""
