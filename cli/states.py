"""The tables of docs/states.md: every state with an example of every event, run through `oncepay.transition.move`."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import get_args

from oncepay import payment as words
from oncepay.cart import Item, Share
from oncepay.errors import OncepayError
from oncepay.events import (
    AlreadyCommanded,
    AttemptDeclined,
    AttemptStarted,
    CaptureRefused,
    CaptureRequested,
    Commanded,
    DisputeSeen,
    Event,
    GiveUp,
    IntentCreated,
    IntentRefused,
    IntentSeen,
    RefundRefused,
    RefundRequested,
    RefundSeen,
    SuccessorNamed,
)
from oncepay.payment import (
    TERMINAL,
    WAITING,
    BalanceTransaction,
    Charge,
    DisputeView,
    Failure,
    IntentView,
    Key,
    Payment,
    Progress,
    RefundView,
    Status,
    Terms,
)
from oncepay.transition import CONFIRMABLE, move

AMOUNT = 4500
_SHARES = (Share("a", 3000, 300), Share("b", 1500, 150))
_HALF = (Share("a", 1500, 150), Share("b", 750, 75))
_FAILURE = Failure("card_declined", "Your card was declined.", "generic_decline")
_DECLINED = Charge("ch_1", "failed")
_PAID = Charge("ch_2", "succeeded", "txn_1", 161, 4339, AMOUNT, "usd")
_UNPOSTED = Charge("ch_2", "succeeded")
_REFUND = BalanceTransaction("txn_2", -2250, 0, -2250, "usd")
_WITHDRAWN = BalanceTransaction("txn_3", -AMOUNT, 1500, -6000, "usd")
_DISPUTE = DisputeView("dp_1", "needs_response", AMOUNT, transactions=(_WITHDRAWN,))
_INQUIRY = DisputeView("dp_2", "warning_needs_response", AMOUNT)

UNTRIED = frozenset({Status.CREATED, Status.ATTEMPTED})
"""In these no confirm was ever begun."""


def example(status: Status) -> Payment:
    """A payment of two sellers in that state, as it usually gets there: after one attempt, where there was one."""
    untried = status in UNTRIED
    declined = status in {Status.REQUIRES_PAYMENT_METHOD, Status.FAILED}
    return Payment(
        key=Key("k"),
        status=status,
        version=7,
        buyer="b",
        currency="usd",
        amount=AMOUNT,
        terms=Terms(items=(Item("a", 3000), Item("b", 1500)), shares=_SHARES, api_version="v"),
        fingerprint=b"f",
        created_at_ms=1,
        updated_at_ms=1,
        expires_at_ms=1,
        intent="" if status is Status.CREATED else "pi_1",
        amount_captured=AMOUNT if status is Status.SUCCEEDED else 0,
        progress=Progress(
            attempt=0 if untried else 1,
            payment_method="" if untried else "pm_1",
            charge="ch_2" if status is Status.SUCCEEDED else "",
            finished_charges=("ch_1",) if declined else (),
            failure=_FAILURE if declined else None,
        ),
    )


def _seen(status: str, charge: Charge | None = None, failure: Failure | None = None) -> IntentSeen:
    received = AMOUNT if status == "succeeded" else 0
    return IntentSeen(IntentView("pi_1", status, received, charge=charge, failure=failure))


def _refund(status: words.RefundStatus, transaction: BalanceTransaction | None) -> RefundSeen:
    return RefundSeen(RefundView("re_1", status, 2250, transaction=transaction), fee_back=True)


EXAMPLES: tuple[tuple[str, Event], ...] = (
    ("Stripe made the intent", IntentCreated("pi_1", "secret")),
    ("Stripe refused to make the intent", IntentRefused(Failure("resource_missing"))),
    ("attempt 1 starts", AttemptStarted(1, "pm_1")),
    ("attempt 2 starts", AttemptStarted(2, "pm_2")),
    ("confirm 1 is answered with a decline", AttemptDeclined(1, "ch_1", _FAILURE)),
    ("the intent is seen `requires_payment_method`, no attempt in it", _seen("requires_payment_method")),
    ("the declined charge of attempt 1 is seen", _seen("requires_payment_method", _DECLINED, _FAILURE)),
    ("a failure without a charge is seen (3-D Secure)", _seen("requires_payment_method", failure=_FAILURE)),
    ("the intent is seen `requires_action`", _seen("requires_action")),
    ("the intent is seen `processing`", _seen("processing")),
    ("the intent is seen `requires_capture`", _seen("requires_capture", _UNPOSTED)),
    ("the intent is seen `succeeded`, its balance transaction posted", _seen("succeeded", _PAID)),
    ("the intent is seen `succeeded`, not posted yet", _seen("succeeded", _UNPOSTED)),
    ("the intent is seen `canceled`", _seen("canceled")),
    ("another intent is seen `succeeded`", IntentSeen(IntentView("pi_9", "succeeded", AMOUNT, charge=_PAID))),
    ("given up by request", GiveUp("requested")),
    ("given up after a decline", GiveUp("declined")),
    ("given up, past its time", GiveUp("expired")),
    ("a successor is named", SuccessorNamed("k2")),
    ("a command's key is taken", Commanded("c1", "words")),
    ("capture is asked for", CaptureRequested(AMOUNT, _SHARES)),
    ("Stripe refuses the capture", CaptureRefused(1)),
    ("a refund is asked for", RefundRequested("r1", _HALF, "", 1)),
    ("a refund made at Stripe is seen `succeeded`, posted", _refund("succeeded", _REFUND)),
    ("a refund made at Stripe is seen `pending`", _refund("pending", None)),
    ("Stripe refuses the refund", RefundRefused("r1", "charge_disputed")),
    ("a dispute is seen, its funds withdrawn", DisputeSeen(_DISPUTE)),
    ("an inquiry is seen", DisputeSeen(_INQUIRY)),
)
"""What may happen, in words, and an example of it. Every event's type is among them."""


class Unlisted(Exception):
    """An event has no example here."""


def check_complete() -> None:
    """Raises Unlisted when an event of `oncepay.events` has no example."""
    missing = {kind.__name__ for kind in get_args(Event)} - {type(event).__name__ for _, event in EXAMPLES}
    if missing:
        raise Unlisted(f"cli/states.py has no example of {', '.join(sorted(missing))}")


def outcome(before: Payment, event: Event) -> tuple[str, str] | None:
    """What becomes of the payment, and the kinds of the entries that are booked; None when nothing changes."""
    try:
        moved = move(before, event)
    except OncepayError as error:
        return f"`{error.slug}`", ""
    except AlreadyCommanded:
        return "replayed", ""
    if moved.payment is before:
        return None
    after = moved.payment.status
    kinds = [f"`{entry.kind}`" for entry in moved.entries]
    return f"**{after}**" if after is not before.status else "noted", ", ".join(kinds)


def transitions() -> Iterator[str]:
    """A table for each state: what changes it, and what is refused in it."""
    check_complete()
    for status in Status:
        before = example(status)
        yield f"### {status}\n"
        yield "| event | becomes | entries |"
        yield "| --- | --- | --- |"
        for (became, entries), group in itertools.groupby(_rows(before), key=lambda row: row[1:]):
            yield f"| {'; '.join(row[0] for row in group)} | {became} | {entries} |"
        yield ""


def _rows(before: Payment) -> Iterator[tuple[str, str, str]]:
    for text, event in EXAMPLES:
        found = outcome(before, event)
        if found is not None:
            yield text, *found


def states() -> Iterator[str]:
    """All states, with what they mean."""
    meanings = _meanings()
    yield "| state | meaning | who has the next move |"
    yield "| --- | --- | --- |"
    for status in Status:
        if status in TERMINAL:
            who = "nobody: it is over"
        elif status in WAITING:
            who = "the merchant" if status is Status.REQUIRES_CAPTURE else "the buyer"
        elif status in CONFIRMABLE:
            who = "the platform when the body brought a payment method, else the buyer"
        else:
            who = "Stripe" if status is Status.PROCESSING else "the platform"
        yield f"| `{status}` | {meanings.get(status.name, '')} | {who} |"


def _meanings() -> dict[str, str]:
    """The text below each member of Status, which Python itself doesn't keep."""
    [found] = [n for n in ast.parse(inspect.getsource(words)).body if isinstance(n, ast.ClassDef) and n.name == "Status"]
    meanings = {
        "SUCCEEDED": "Paid, once; refunds and disputes are entries beside it.",
        "FAILED": "Given up after a decline.",
        "CANCELED": "Given up by request, or with nothing tried.",
    }
    for member, text in itertools.pairwise(found.body):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            [target] = member.targets
            assert isinstance(target, ast.Name)
            meanings[target.id] = str(text.value.value)
    return meanings
