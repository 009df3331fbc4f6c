"""Payment batches and payments. The refCode is the guard: one refCode is at most one payment, ever.

What happens to a payment follows from the payee's refCode, so that a test can choose it (see `FATES`). Before it is
scheduled the payer's balance is charged with it; what comes back after all is credited there.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import msgspec

from sandbox.tipalti import model, payees
from sandbox.tipalti.errors import invalid, not_found
from sandbox.tipalti.funds import Account
from sandbox.tipalti.world import World

BATCH_MAX = 250
REF_CODE_LENGTH_MAX = 64
FINAL = ("Canceled", "Cleared", "Deferred", "Deferred (Internal)", "Rejected")
GIVEN_BACK = frozenset(["Canceled", "Deferred", "Deferred (Internal)", "Rejected"])
FEE_MINOR = 100
"""What Tipalti takes for a payment that was paid, and once more when the bank returns it."""
STEP_S = 2.0
FUNDS_RETRY_S = 60.0
"""How soon a payment that lacks funds is tried again, if none came in before."""
WAITING_MAX = 10_000
"""Payments that go on at once when money comes in; the others when their time comes."""
CLEAR_S = 3_600.0

FATES: dict[str, tuple[tuple[float, str], ...]] = {
    "rejected": ((STEP_S, "Scheduled"), (STEP_S, "Rejected")),
    "returned": ((STEP_S, "Scheduled"), (STEP_S, "Paid"), (CLEAR_S, "Rejected")),
    "canceled": ((STEP_S, "Scheduled"), (STEP_S, "Canceled")),
    "riskreview": ((STEP_S, "Risk review"), (600.0, "Scheduled"), (STEP_S, "Paid"), (CLEAR_S, "Cleared")),
    "pendingfunds": ((STEP_S, "Pending funds"), (600.0, "Scheduled"), (STEP_S, "Paid"), (CLEAR_S, "Cleared")),
    "internal": ((STEP_S, "Deferred (Internal)"),),
}
"""By a word in the payee's refCode: after how many seconds of the clock a payment goes to which state."""
FATE_DEFAULT = ((STEP_S, "Scheduled"), (STEP_S, "Paid"), (CLEAR_S, "Cleared"))
NOTICES = {
    "Submitted": "payment_submitted",
    "Deferred": "deferred",
    "Deferred (Internal)": "deferred",
    "Paid": "completed",
    "Cleared": "completed",
    "Rejected": "error",
    "Canceled": "payment_cancelled",
}
ZERO_DECIMAL = frozenset(
    ["BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF"]
)
THREE_DECIMAL = frozenset(["BHD", "JOD", "KWD", "OMR", "TND"])
FILTER_FIELDS = {"refCode": "ref_code", "status": "status", "payeeId": "payee", "batchId": "batch", "paymentBatchId": "batch"}


class Amount(msgspec.Struct):
    """Money in whole units of its currency, for example 12.34."""

    amount: Decimal
    currency: str = "USD"


class Instruction(msgspec.Struct):
    """One line of a batch. `amountSubmitted` is `{amount, currency}`, or a number beside `currency`."""

    payeeId: str
    amountSubmitted: Amount | Decimal
    refCode: str
    currency: str = "USD"


class NewBatch(msgspec.Struct):
    """The body of `POST /payment-batches`."""

    paymentInstructions: list[Instruction]


def register(world: World, account: Account) -> None:
    """Connect the timers of this module."""
    world.timers.on("payment", lambda payment: _step(world, account, payment))


def exponent(currency: str) -> int:
    """Decimal places of a currency's minor unit."""
    return 0 if currency in ZERO_DECIMAL else 3 if currency in THREE_DECIMAL else 2


def _minor(amount: Decimal, currency: str) -> int | None:
    """The amount in minor units, or None when it isn't a whole number of them or not above zero."""
    try:
        scaled = amount.scaleb(exponent(currency))
        whole = int(scaled)
    except (InvalidOperation, ValueError, OverflowError):
        return None
    return whole if whole == scaled and 0 < whole < 10**12 else None


def _money(minor: int, currency: str) -> dict[str, object]:
    return {"amount": Decimal(minor).scaleb(-exponent(currency)), "currency": currency}


def show(row: model.Payment) -> dict[str, object]:
    """A payment in the API's shape."""
    return {
        "id": row.id,
        "refCode": row.ref_code,
        "payeeId": row.payee,
        "paymentBatchId": row.batch,
        "status": row.status,
        "isFinal": row.status in FINAL,
        "amountSubmitted": _money(row.amount, row.currency),
        "payerFees": _money(row.fee, row.currency),
        "reason": row.reason,
        "submittedDate": row.created,
        "statusChangedDate": row.changed,
    }


def show_batch(row: model.Batch) -> dict[str, object]:
    """A batch with its lines."""
    return {"id": row.id, "createdDate": row.created, "paymentInstructions": row.lines}


def create_batch(world: World, account: Account, body: bytes) -> dict[str, object]:
    """POST /payment-batches: up to 250 lines, each of which comes to OK, Warning (deferred) or Error by itself."""
    asked = msgspec.json.decode(body, type=NewBatch)
    if not 1 <= len(asked.paymentInstructions) <= BATCH_MAX:
        raise invalid(f"A batch has from 1 to {BATCH_MAX} payment instructions.")
    batch = model.Batch(world.batches.new_id(), world.now_s(), [])
    batch.lines = [_line(world, account, batch, line) for line in asked.paymentInstructions]
    world.batches.save(batch)
    return show_batch(batch)


def _refused(line: Instruction, code: str, message: str) -> dict[str, str | None]:
    return {"refCode": line.refCode, "paymentId": None, "result": "Error", "errorCode": code, "errorMessage": message}


def _line(world: World, account: Account, batch: model.Batch, line: Instruction) -> dict[str, str | None]:
    submitted = line.amountSubmitted
    money = submitted if isinstance(submitted, Amount) else Amount(submitted, line.currency)
    currency = money.currency.upper()
    if not 1 <= len(line.refCode) <= REF_CODE_LENGTH_MAX:
        return _refused(line, "InvalidRefCode", f"refCode has from 1 to {REF_CODE_LENGTH_MAX} characters.")
    if world.payments.page(1, filters=[("ref_code", line.refCode)]):
        return _refused(line, "DuplicateRefCode", f"A payment with refCode {line.refCode} was submitted before.")
    payee = payees.find(world, line.payeeId)
    if payee is None:
        return _refused(line, "UnknownPayee", f"There is no payee {line.payeeId}.")
    amount = _minor(money.amount, currency)
    if amount is None or len(currency) != 3:
        return _refused(line, "InvalidAmount", f"{money.amount} {currency} can't be paid.")
    now = world.now_s()
    row = model.Payment(world.payments.new_id(), now, line.refCode, line.payeeId, batch.id, amount, currency, changed=now)
    result, code = "OK", None
    if not payees.not_payable(payee):
        world.payments.save(row)
        _notify(world, row)
        world.timers.add("payment", f"{row.id} 0", account.wait_s() + _fate(payee)[0][0])
    else:
        row.status, row.reason = "Deferred", "The payee is not payable."
        world.payments.save(row)
        _notify(world, row)
        result, code = "Warning", "PayeeNotPayable"
    return {"refCode": line.refCode, "paymentId": row.id, "result": result, "errorCode": code, "errorMessage": row.reason}


def _fate(payee: model.Payee) -> tuple[tuple[float, str], ...]:
    for word, steps in FATES.items():
        if word in payee.ref_code:
            return steps
    return FATE_DEFAULT


def _step(world: World, account: Account, subject: str) -> None:
    """A payment's next step, unless it was made before."""
    payment_id, _, number = subject.partition(" ")
    row = world.payments.get(payment_id)
    if row is None or row.status in FINAL or row.step != int(number):
        return
    payee = payees.find(world, row.payee)
    assert payee is not None
    steps = _fate(payee)
    status = steps[row.step][1]
    if status == "Scheduled" and not row.funded:
        row.funded = account.charge(row.currency, row.amount)
        if not row.funded:
            if row.status != "Pending funds":
                _become(world, account, row, "Pending funds")
            world.timers.add("payment", subject, FUNDS_RETRY_S)
            return
    row.step += 1
    _become(world, account, row, status)
    if row.step < len(steps):
        world.timers.add("payment", f"{row.id} {row.step}", steps[row.step][0])


def _become(world: World, account: Account, row: model.Payment, status: str) -> None:
    """The payment is in `status` now: what it costs or gives back moves with it."""
    was, row.status, row.changed = row.status, status, world.now_s()
    if status == "Paid" or (status == "Rejected" and was == "Paid"):
        row.fee += FEE_MINOR
        if not account.charge(row.currency, FEE_MINOR):
            account.add(row.currency, -FEE_MINOR)  # Tipalti takes its fee all the same
    if status == "Rejected":
        returned = was == "Paid"
        row.reason = "The bank returned the payment." if returned else "The payment provider rejected the payment."
    if status in GIVEN_BACK and row.funded:
        row.funded = False
        account.add(row.currency, row.amount)
    world.payments.save(row)
    _notify(world, row)


def funded(world: World, account: Account) -> None:
    """Money came in: payments that wait for it go on, the oldest first."""
    waiting = world.payments.page(WAITING_MAX, ascending=True, filters=[("status", "Pending funds")])
    for row in waiting:
        if not row.funded and payees.find(world, row.payee) is not None:
            _step(world, account, f"{row.id} {row.step}")


def _notify(world: World, row: model.Payment) -> None:
    type_ = NOTICES.get(row.status)
    if type_ is not None:
        world.notify(type_, paymentId=row.id, refCode=row.ref_code, payeeId=row.payee, status=row.status)


def retrieve(world: World, payment_id: str) -> dict[str, object]:
    """GET /payments/{id}."""
    row = world.payments.get(payment_id)
    if row is None:
        raise not_found(f"payment {payment_id}")
    return show(row)


def retrieve_batch(world: World, batch_id: str) -> dict[str, object]:
    """GET /payment-batches/{id}."""
    row = world.batches.get(batch_id)
    if row is None:
        raise not_found(f"payment batch {batch_id}")
    return show_batch(row)


def instructions(world: World, batch_id: str) -> dict[str, object]:
    """GET /payment-batches/{id}/instructions."""
    row = world.batches.get(batch_id)
    if row is None:
        raise not_found(f"payment batch {batch_id}")
    return {"items": row.lines, "totalCount": len(row.lines)}
