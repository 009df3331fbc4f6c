"""The bank's page of 3-D Secure: the buyer completes or fails the authentication with a button."""

from __future__ import annotations

from html import escape
from urllib.parse import urlencode

from aiohttp import web

from sandbox.stripe import charging, currencies
from sandbox.stripe.forms import decode
from sandbox.stripe.model import Intent
from sandbox.stripe.world import World

PREFIX = "/_3ds/"
OUTCOMES = ("complete", "fail")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0; background: #f5f6f8; color: #1d2430; }}
main {{ max-width: 26rem; margin: 12vh auto 0; padding: 2rem; background: #fff; border: 1px solid #d9dde3; border-radius: 8px; }}
h1 {{ font-size: 1.25rem; margin: 0 0 .5rem; }}
form {{ display: flex; gap: .75rem; margin-top: 1.5rem; }}
button {{ flex: 1; font: inherit; padding: .7rem; border-radius: 6px; border: 1px solid #1d2430; background: #fff; }}
button[value=complete] {{ background: #1d2430; color: #fff; }}
</style></head><body><main><h1>{title}</h1><p>{text}</p>{form}</main></body></html>
"""
_FORM = (
    '<form method="post"><button name="outcome" value="complete">Complete</button>'
    '<button name="outcome" value="fail">Fail</button></form>'
)


def _page(title: str, text: str, form: str = "", status: int = 200) -> web.Response:
    body = _PAGE.format(title=escape(title), text=escape(text), form=form)
    return web.Response(text=body, status=status, content_type="text/html")


def show(world: World, intent_id: str) -> web.Response:
    """GET: the page with two buttons."""
    intent = world.intents.get(intent_id)
    if intent is None:
        return _page("Not found", "There is no such payment.", status=404)
    if intent.status != "requires_action":
        return _page("Nothing to do", f"This payment is in status {intent.status}.")
    amount = currencies.shown(intent.amount, intent.currency)
    return _page("3-D Secure test page", f"A payment of {amount} asks for your authentication.", _FORM)


def decide(world: World, intent_id: str, body: str) -> web.Response:
    """POST `outcome=complete|fail`: carry on, then send the buyer back to the return URL."""
    intent = world.intents.get(intent_id)
    if intent is None:
        return _page("Not found", "There is no such payment.", status=404)
    outcome = decode(body).text("outcome")
    if outcome not in OUTCOMES:
        return _page("Bad request", "outcome is complete or fail.", status=400)
    if intent.status != "requires_action":
        return _page("Nothing to do", f"This payment is in status {intent.status}.", status=409)
    failure = charging.authenticated(world, intent, passed=outcome == "complete")
    return _back(intent, failed=failure is not None)


def _back(intent: Intent, *, failed: bool) -> web.Response:
    if not intent.return_url:
        return _page("Authentication failed" if failed else "Authentication complete", "You can close this page.")
    query = urlencode(
        {
            "payment_intent": intent.id,
            "payment_intent_client_secret": intent.client_secret,
            "redirect_status": "failed" if failed else "succeeded",
        }
    )
    joint = "&" if "?" in intent.return_url else "?"
    return web.Response(status=303, headers={"Location": f"{intent.return_url}{joint}{query}"})
